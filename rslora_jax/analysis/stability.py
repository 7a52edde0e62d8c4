"""How large each adapter's output and gradients are: the quantities of rank stability, for any wrapped function.

An adapter is rank-stabilised where these keep their size as its rank grows (arXiv 2312.03732, definition 3.1).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import primitives

from rslora_jax.chunk_sum import recomputed
from rslora_jax.pytrees import Params
from rslora_jax.sites import Site
from rslora_jax.transform import compat
from rslora_jax.transform.interpreter import Walk
from rslora_jax.transform.product import Parts, Product, adapted, times
from rslora_jax.transform.rules import RULES
from rslora_jax.transform.views import View
from rslora_jax.wrap import Adapters, Lora, tables_of

MOMENTS = (1, 2, 4)
_READING = 1 + len(MOMENTS)  # a count, and the sum of each power


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stability:
    """The size of one adapter's output and of the gradients that it passes on and gets.

    Every array has the shape of the site's stack, () for a weight that is not stacked. Experts used in one batched
    product share their first two values. Both are NaN where no gradient of
    the loss arrives, and the second is for a look-up.

    Attributes:
      output: by m, the mean of |entry|^m of the adapter's own output, gamma x A B.
      input_grad: by m, the mean of |entry|^m of the loss's gradient by the adapter's input along its own path,
        gamma dy B' A'.
      factor_grads: by name, the Frobenius norms of the loss's gradients by the adapter's arrays.
    """

    output: Mapping[int, Array]
    input_grad: Mapping[int, Array]
    factor_grads: Mapping[str, Array]


def measure(
    lora: Lora, loss: Callable[..., Array], params: Params, adapters: Adapters, *args: Any
) -> dict[str, Stability]:
    """Measure every adapter's output and gradients at one point of training (arXiv 2312.03732, definition 3.1).

    The entries of all uses of a weight count alike. Powers are summed in JAX's widest float: in float32 a fourth
    power is lost below 1e-9, so enable float64 for small updates. What is trained whole has no adapter to measure, and
    is left out. Works inside `jit`, `vmap` and `scan`.

    Args:
      lora: from `wrap`.
      loss: `loss(run, *args)` gives a scalar; `run` is the adapted function with its parameters bound.
      params: the base parameters.
      adapters: the adapters.
      *args: what `loss` takes beside `run`, such as a batch.

    Returns:
      What was found, by path.

    Raises:
      ValueError: for a use of a weight in which its adapter has no output of its own: a join with
        other weights, a materialised weight, a `shard_map`.

    >>> import rslora_jax as rslora
    >>> lora = rslora.wrap(lambda p, x: x @ p["w"], {"w": jnp.zeros((5, 4))}, jnp.ones((2, 5)),
    ...                    config=rslora.LoraConfig(rank=2, alpha=3, scaling="constant"))
    >>> adapters = {"w": {"a": jnp.ones((5, 2)), "b": jnp.ones((2, 4))}}
    >>> found = measure(lora, lambda run, x: run(x).sum(), {"w": jnp.zeros((5, 4))}, adapters, jnp.ones((2, 5)))
    >>> float(found["w"].output[1]), float(found["w"].output[2]), float(found["w"].input_grad[1])
    (30.0, 900.0, 24.0)
    """
    lora.check(params, adapters)
    walk = Walk(_MEASURED, on_fallback=_refuse, product=_measured_product, tables=tables_of(lora.sites))
    sites = {path: site for path, site in lora.sites.items() if site.scaled}
    meters = {path: jnp.ones((*site.sizes(site.stack_axes), 2 * _READING), float) for path, site in sites.items()}

    def value(adapters: Adapters, meters: Mapping[str, Array]) -> Array:
        def run(*args: Any, **kwargs: Any) -> Any:
            return lora.walked(walk, params, adapters, args, kwargs, functools.partial(_with_meter, lora, meters))

        return loss(run, *args)

    with recomputed():  # moments of a gradient are not linear in it
        grads, readings = jax.grad(value, (0, 1))(_widened(adapters), meters)
    return {path: _stability(site, grads[path], readings[path]) for path, site in sites.items()}


# How a reading gets out of a scan, a remat or a call of the program: as a gradient, which JAX carries to its weight,
# and to its element of a stack, whatever lies between. Beside its adapter, each weight has a meter m, ones for each
# element of its stack. What the program does to it on its way is linear, m' = L m, so a gradient
# c = reading m' / <m', m'> there is L'c at the weight, and <m, L'c> = <m', c> = reading.


def _with_meter(lora: Lora, meters: Mapping[str, Array], view: View) -> View:
    """Return a view with its weight's meter along."""
    site = lora.sites[view.sites[0]]
    if not site.scaled:  # trained rows
        return view
    sizes = [n if axis in site.stack_axes else 1 for axis, n in enumerate(site.shape)]
    # The stack's axes may lie anywhere in the weight; the meter's are in their order.
    order = [sorted(site.stack_axes).index(axis) for axis in site.stack_axes]
    meter = jnp.transpose(meters[site.path], (*(order.index(n) for n in range(len(order))), len(order)))
    return dataclasses.replace(view, along={**view.along, "meter": jnp.reshape(meter, (*sizes, 2 * _READING))})


def _widened(adapters: Adapters) -> Adapters:
    """Return adapters in JAX's widest float, in which readings are summed."""
    return jax.tree.map(lambda factor: factor.astype(float), adapters)


def _stability(site: Site, grads: Mapping[str, Array], readings: Array) -> Stability:
    """Put the gradients by an adapter and the readings of its meter together."""
    stack = len(site.stack_axes)

    def norm(grad: Array) -> Array:
        return jnp.sqrt(jnp.sum(jnp.square(grad.astype(float)), range(stack, grad.ndim)))

    def moments(of: Array) -> dict[int, Array]:
        return {m: of[..., n] / of[..., 0] for n, m in enumerate(MOMENTS, 1)}

    norms = {name: norm(grad) for name, grad in grads.items()}
    return Stability(moments(readings[..., :_READING]), moments(readings[..., _READING:]), norms)


def _measured_product(view: View, product: Product, x: Array, *extra: Array) -> Array:
    """Return what `product.adapted` does, all factored; the view's meter takes the readings."""
    if "meter" not in view.along:  # a stored weight without an adapter
        return adapted(view, product, x, *extra)
    if not product.factors:
        raise ValueError(f"{view.sites[0]} cannot be measured: its adapter has no factors")
    meter, parts = view.along["meter"], Parts(product.op, True, extra)
    x = times(x, product.before)
    seen = _read_gradient(x, meter[..., _READING:]) if jnp.issubdtype(x.dtype, jnp.inexact) else x
    first, second = product.factors
    update = _read_value(parts.leave(parts.meet(seen, first), second), meter[..., :_READING])
    y = parts.base(x, view.w)
    return times(y + update.astype(y.dtype), product.after)


def _reading(array: Array, meter: Array) -> Array:
    """Return the gradient that is a reading of an array to the meter."""
    size = jnp.abs(array.astype(meter.dtype))
    sums = jnp.stack([jnp.full((), array.size, meter.dtype), *(jnp.sum(size**m) for m in MOMENTS)])
    return sums * meter / jnp.sum(meter**2, range(meter.ndim - 1))


@jax.custom_vjp
def _read_value(array: Array, meter: Array) -> Array:
    """Return an array as it is; the meter reads it, once a gradient by it arrives."""
    return array


_read_value.defvjp(
    lambda array, meter: (array, (array, meter)),
    lambda kept, grad: (grad, _reading(*kept)),
)


@jax.custom_vjp
def _read_gradient(array: Array, meter: Array) -> Array:
    """Return an array as it is; the meter reads the gradient by it."""
    return array


_read_gradient.defvjp(
    lambda array, meter: (array, meter),
    lambda meter, grad: (grad, _reading(grad, meter)),
)


def _refuse(view: View, primitive: str) -> None:
    raise ValueError(
        f"{view.sites[0]} cannot be measured: it is used by {primitive}, where its adapter has no output of its "
        "own; exclude it"
    )


# Joined weights have one output between them, and inside a shard_map an array is only a device's part.
_UNMEASURED = (primitives.concatenate_p, lax.stack_p, lax.tile_p, compat.shard_map_p)
_MEASURED = {primitive: rule for primitive, rule in RULES.items() if primitive not in _UNMEASURED}
