"""Operations of which the library knows nothing, made here: of a weight alone, and of a weight and data."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from tests.random_programs.scope import flat, table, widths


def operation(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function as a primitive of its own, which JAX can compile, differentiate and map."""
    primitive = Primitive(name)
    primitive.def_impl(jax.jit(fn))
    primitive.def_abstract_eval(lambda *avals: jax.core.ShapedArray(*shape_of(fn, avals)))
    mlir.register_lowering(primitive, mlir.lower_fun(fn, multiple_results=False))

    def jvp(primals: Any, tangents: Any) -> Any:
        tangents = tuple(jnp.zeros_like(p) if type(t) is ad.Zero else t for p, t in zip(primals, tangents, strict=True))
        primals = tuple(primals)
        return primitive.bind(*primals), jax.jvp(fn, primals, tangents)[1]

    def batch(values: Any, axes: Any) -> Any:
        return jax.vmap(fn, in_axes=tuple(axes))(*values), 0

    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batch
    return primitive.bind


def shape_of(fn: Callable[..., Any], avals: Any) -> tuple[tuple[int, ...], Any]:
    out = jax.eval_shape(fn, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals))
    return out.shape, out.dtype


squash = operation("squash", lambda w: w / (1 + w * w))
halve = operation("halve", lambda w: w.reshape(-1)[: max(1, w.size // 2)])
mystery_product = operation("mystery_product", lambda x, w: jnp.sin(x) @ w)
mystery_sum = operation("mystery_sum", lambda x, w: x * (w * w).sum())


def unknown_change(w, s):
    """A change of a weight's numbers, or of its shape."""
    return s.pick([squash, halve])(w)


def unknown_use(w, s):
    """A product, or some other function, of data and a weight."""
    w = w.reshape(-1, w.shape[-1])
    of = s.pick([mystery_product, mystery_sum])
    return flat(of(widths(s.x, w.shape[0]), w))


UNKNOWN_CHANGES = table(unknown_change)
UNKNOWN_USES = table(unknown_use)
