"""How large each adapter's output and gradients are: the quantities of rank stability, for any wrapped function.

An adapter is rank-stabilised where these keep their size as its rank grows (arXiv 2312.03732, definition 3.1).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import primitives

from rslora_jax.sites import Site
from rslora_jax.transform import compat
from rslora_jax.transform.interpreter import Walk, as_arrays
from rslora_jax.transform.product import Bilinear, Parts
from rslora_jax.transform.rules import RULES
from rslora_jax.transform.views import View
from rslora_jax.wrap import Adapters, Lora, array_leaves, views_of

MOMENTS = (1, 2, 4)
READING = 1 + len(MOMENTS)  # a count, and the sum of each power


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stability:
    """The size of one adapter's output and of the gradients that it passes on and gets.

    Every array has the shape of the site's stack, () for a weight that is not stacked. Experts used in one batched
    product share their first two values. Both are NaN where no gradient of the loss arrives.

    Attributes:
      output: by m, the mean of |entry|^m of the adapter's own output, gamma x A B.
      input_grad: by m, the mean of |entry|^m of the loss's gradient by the adapter's input along its own path,
        gamma dy B' A'.
      a_grad, b_grad: the Frobenius norms of the loss's gradients by A and by B.
    """

    output: Mapping[int, Array]
    input_grad: Mapping[int, Array]
    a_grad: Array
    b_grad: Array


def measure(
    lora: Lora, loss: Callable[..., Array], params: Any, adapters: Adapters, *args: Any
) -> dict[str, Stability]:
    """Measure every adapter's output and gradients at one point of training (arXiv 2312.03732, definition 3.1).

    The entries of all uses of a weight count alike. Powers are summed in JAX's widest float: in float32 a fourth
    power is lost below 1e-9, so enable float64 for small updates. Works inside `jit`, `vmap` and `scan`.

    Args:
      lora: from `wrap`.
      loss: `loss(run, *args)` gives a scalar; `run` is the adapted function with its parameters bound.
      params: the base parameters.
      adapters: the adapters.
      *args: what `loss` takes beside `run`, such as a batch.

    Returns:
      What was found, by path.

    Raises:
      ValueError: for a use of a weight in which its adapter has no output of its own: a look-up, a join with
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
    tables = frozenset(path for path, site in lora.sites.items() if site.kind == "embedding")
    walk = Walk(MEASURED, on_fallback=refuse, product=measured_product, tables=tables)
    names = list(array_leaves(params))

    def value(adapters: Adapters) -> Array:
        def run(*args: Any, **kwargs: Any) -> Any:
            jaxpr, tree, leaves = lora._program.trace(params, args, kwargs)
            outs = walk.run(jaxpr, views_of(leaves, names, lora.sites, adapters))
            return lora._program.returned(tree, as_arrays(walk, outs), args, kwargs)

        return loss(run, *args)

    metered = {path: {"a": with_meter(ab["a"]), "b": ab["b"]} for path, ab in adapters.items()}
    grads = jax.grad(value)(metered)
    return {path: stability(site, grads[path]) for path, site in lora.sites.items()}


# How a reading gets out of a scan, a remat or a call of the program: as a gradient, which JAX carries to its weight,
# and to its element of a stack, whatever lies between. A has columns of ones behind its rank, which no product
# meets; they are the meter m. What the program does to a weight on its way is linear, m' = L m, so a gradient
# c = reading m' / <m', m'> there is L'c at the weight, and <m, L'c> = <m', c> = reading.


def with_meter(a: Array) -> Array:
    """Return A with the meter's columns of ones behind its rank."""
    ones = jnp.ones((*a.shape[:-1], 2 * READING), float)
    return jnp.concatenate([a.astype(ones.dtype), ones], -1)


def stability(site: Site, grads: Mapping[str, Array]) -> Stability:
    """Take the gradients by a metered A and by B apart."""
    stack = len(site.stack_axes)
    norm = lambda g: jnp.sqrt(jnp.sum(jnp.square(g.astype(float)), range(stack, g.ndim)))
    a, meter = grads["a"][..., : site.rank], grads["a"][..., site.rank :]
    readings = jnp.sum(meter, range(stack, meter.ndim - 1))
    moments = lambda r: {m: r[..., n] / r[..., 0] for n, m in enumerate(MOMENTS, 1)}
    return Stability(moments(readings[..., :READING]), moments(readings[..., READING:]), norm(a), norm(grads["b"]))


def measured_product(op: Bilinear, x: Array, w: Array, first: Array, second: Array, *extra: Array) -> Array:
    """Return what `adapted_product` does; one of the factors has a meter, which takes the readings."""
    second = jnp.moveaxis(second, op.rank_axis, -1)
    rank = min(first.shape[-1], second.shape[-1])
    meter = (first if first.shape[-1] > rank else second)[..., rank:]
    first, second = first[..., :rank], jnp.moveaxis(second[..., :rank], -1, op.rank_axis)
    parts = Parts(op, True, extra)
    met = parts.meet(read_gradient(x, meter[..., READING:]), first)
    y, update = parts.base(x, w), read_value(parts.leave(met, second), meter[..., :READING])
    return y + update.astype(y.dtype)


def reading(array: Array, meter: Array) -> Array:
    """Return the gradient that is a reading of an array to the meter."""
    size = jnp.abs(array.astype(meter.dtype))
    sums = jnp.stack([jnp.full((), array.size, meter.dtype), *(jnp.sum(size**m) for m in MOMENTS)])
    return sums * meter / jnp.sum(meter**2, range(meter.ndim - 1))


@jax.custom_vjp
def read_value(array: Array, meter: Array) -> Array:
    """Return an array as it is; the meter reads it, once a gradient by it arrives."""
    return array


read_value.defvjp(
    lambda array, meter: (array, (array, meter)),
    lambda kept, grad: (grad, reading(*kept)),
)


@jax.custom_vjp
def read_gradient(array: Array, meter: Array) -> Array:
    """Return an array as it is; the meter reads the gradient by it."""
    return array


read_gradient.defvjp(
    lambda array, meter: (array, meter),
    lambda meter, grad: (grad, reading(grad, meter)),
)


def refuse(view: View, primitive: str) -> None:
    raise ValueError(
        f"{view.sites[0]} cannot be measured: it is used by {primitive}, where its adapter has no output of its "
        "own; exclude it"
    )


def picked(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
    """Pick from a stack; refuse a look-up."""
    if isinstance(values[0], View) and walk.tables.intersection(values[0].sites):
        refuse(values[0], "a look-up")
    return RULES[eqn.primitive](walk, eqn, values)


# Joined weights have one output between them, and inside a shard_map an array is only a device's part.
UNMEASURED = ("concatenate", "stack", "tile", "shard_map")
MEASURED = {primitive: rule for primitive, rule in RULES.items() if primitive.name not in UNMEASURED}
MEASURED[primitives.gather_p] = picked
