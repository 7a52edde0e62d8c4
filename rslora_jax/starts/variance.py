"""The directions in which the data that weights meet vary most, without forming these data's covariances.

With X what a weight meets, X'X A is found as a gradient by A of the adapter's own path: the data that met A, X A, are
given back as if they were the gradient by themselves, and JAX carries them to X'(X A), whatever the operation and
whatever lies between: scans, remat, branches. So X'X is multiplied, batch by batch, and never there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rslora_jax.adapters import Adapters
from rslora_jax.chunk_sum import recomputed
from rslora_jax.pytrees import Params
from rslora_jax.starts.passes import Matrices, Passes, drawn, filled, listed, split, summed, with_rank
from rslora_jax.starts.stream import Progress
from rslora_jax.starts.svd import basis_of
from rslora_jax.transform import compat
from rslora_jax.transform.interpreter import Walk
from rslora_jax.transform.product import Parts, Product, adapted, times
from rslora_jax.transform.rules import RULES
from rslora_jax.transform.views import View, wide
from rslora_jax.wrap import Lora, tables_of

_MORE = 10  # directions beside those asked for (arXiv 0909.4061, section 4.2)
_PROBES = 8  # random directions by which the rest of the variance is estimated


class Spread(NamedTuple):
    """Hold how the data that one weight meets are spread, each array with the weight's stack in front.

    Attributes:
      directions: (*stack, in, n), orthonormal, that of the most variance first.
      shares: (*stack, n), the part of the sum of squares along each.
    """

    directions: Array
    shares: Array


def spread(
    lora: Lora,
    params: Params,
    key: Array,
    ranks: Mapping[str, int],
    batches: Iterable[Any],
    *,
    loss: Callable[..., Any] | None,
    passes: int,
    progress: Progress,
) -> dict[str, Spread]:
    """Find the directions of most variance by subspace iteration over all batches.

    Each pass but the last multiplies random directions by X'X; the last gives their part by Nystroem's method, and
    an estimate of all that is left (arXiv 2010.09649, "Hutch++").

    Args:
      lora: from `wrap`.
      params: the base.
      key: a PRNG key.
      ranks: how many directions of each weight, by path.
      batches: arguments of the function, a tuple for each batch; or what `loss` takes.
      loss: `loss(run, batch)`, to run the model on a batch; what it returns does not matter.
      passes: how many times to go over the batches.
      progress: told how many batches of how many are done.
    """
    widths = {path: min(n + _MORE, lora.sites[path].in_size) for path, n in ranks.items()}
    wider = with_rank(lora, {path: n + _PROBES for path, n in widths.items()})
    walk = Walk(_RULES, on_fallback=_refuse, product=_tapped, tables=tables_of(wider.sites))

    def act(params: Params, adapters: Adapters, batch: Any) -> Adapters:
        def value(adapters: Adapters) -> Array:
            def run(*args: Any, **kwargs: Any) -> Any:
                return wider.walked(walk, params, adapters, args, kwargs)

            return summed(run(*batch) if loss is None else loss(run, batch))

        with recomputed():  # what is given back does not depend on what arrives
            return jax.grad(value)(adapters)

    going = Passes(act, listed(batches, "this start"), passes, progress)
    block = drawn(wider, key, first=True)
    probes = drawn(wider, jax.random.fold_in(key, 1), first=True)
    for number in range(passes):
        last = number == passes - 1
        block = {path: _next(block[path], probes[path], widths[path], last) for path in block}
        met, _ = split(wider, going.sum(params, filled(wider, block, None)))
        if last:
            return {path: _spread(block[path], met[path], widths[path], ranks[path]) for path in block}
        block = _checked(met)
    raise ValueError(f"passes={passes} finds nothing: give 1 or more")


def _checked(met: Matrices) -> Matrices:
    """Return what data gave, or say which weight met none."""
    for path, array in met.items():
        if not bool(jnp.any(array != 0)):
            raise ValueError(f"{path} met no data of which the function's result has a gradient: exclude it")
    return met


@functools.partial(jax.jit, static_argnums=(2, 3))
def _next(met: Array, probes: Array, width: int, last: bool) -> Array:
    """Return a basis of the directions; with probes outside it behind, where they are to be looked at."""
    basis = basis_of(met[..., :width])
    signs = jnp.sign(probes[..., width:])
    outside = signs - basis @ (jnp.swapaxes(basis, -1, -2) @ signs) if last else jnp.zeros_like(signs)
    return jnp.concatenate([basis, outside], -1)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _spread(block: Array, met: Array, width: int, number: int) -> Spread:
    """Return the leading directions by Nystroem's method, C ~ Y (Q'Y)^-1 Y' with Y = C Q, and their shares."""
    q, y = block[..., :width], met[..., :width]
    core = jnp.swapaxes(q, -1, -2) @ y
    values, vectors = jnp.linalg.eigh((core + jnp.swapaxes(core, -1, -2)) / 2)
    enough = values > jnp.finfo(values.dtype).eps * width * jnp.max(values, -1, keepdims=True)
    roots = jnp.where(enough, jax.lax.rsqrt(jnp.where(enough, values, 1)), 0)
    u, s, _ = jnp.linalg.svd(y @ (vectors * roots[..., None, :]), full_matrices=False)
    rest = jnp.sum(block[..., width:] * met[..., width:], (-2, -1)) / _PROBES
    total = jnp.trace(core, axis1=-2, axis2=-1) + jnp.maximum(rest, 0)
    shares = s**2 / jnp.where(total > 0, total, 1)[..., None]
    # Of an expert that met nothing, the directions are as good as any.
    found = jnp.where((total > 0)[..., None, None], u, q)
    return Spread(found[..., :number], shares[..., :number])


def _tapped(view: View, product: Product, x: Array, *extra: Array) -> Array:
    """Return the base's product; the first factor's gradient is that of which the module's docstring speaks."""
    if not product.factors or not jnp.issubdtype(x.dtype, jnp.inexact):
        return adapted(view, product, x, *extra)
    seen, first = _silent(times(x, product.before)), product.factors[0]
    dtype = wide(seen.dtype, first.dtype)
    met = product.op.meet(seen.astype(dtype), first.astype(dtype), *extra)
    y = Parts(product.op, True, extra).base(seen, view.w)
    return times(_given_back(y, met), product.after)


@jax.custom_vjp
def _silent(x: Array) -> Array:
    """Return data as they are; the gradient by them is zero, but arrives where they come from."""
    return x


_silent.defvjp(lambda x: (x, None), lambda _, grad: (jnp.zeros_like(grad),))


@jax.custom_vjp
def _given_back(y: Array, met: Array) -> Array:
    """Return `y`; once a gradient by it arrives, that by `met` is `met`."""
    return y


_given_back.defvjp(lambda y, met: (y, met), lambda met, grad: (grad, met))


def _refuse(view: View, primitive: str) -> None:
    raise ValueError(
        f"the data that meet {view.sites[0]} cannot be looked at: it is used by {primitive}, where its adapter meets "
        "none; exclude it"
    )


# Inside a shard_map an array is only a device's part.
_RULES = {primitive: rule for primitive, rule in RULES.items() if primitive is not compat.shard_map_p}
