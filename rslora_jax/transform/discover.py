"""Finding a program's weights: the same walk as in training, on abstract values and without factors."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rslora_jax.transform import compat
from rslora_jax.transform.head import last_products
from rslora_jax.transform.interpreter import Use, Walk, as_arrays
from rslora_jax.transform.rules import RULES
from rslora_jax.transform.views import View


def discover(jaxpr: compat.Jaxpr, names: Sequence[str], arrays: Sequence[Any]) -> tuple[list[Use], set[str]]:
    """Return every use of a weight in a product or a look-up, and the weights that are output heads.

    Args:
      jaxpr: the program; its first inputs are the parameters.
      names: the parameters' paths, in the order of the program's inputs.
      arrays: all inputs, or their shapes.
    """
    uses: list[Use] = []
    walk = Walk(RULES, on_use=uses.append)

    def scout(arrays: Sequence[Any]) -> list[Any]:
        probes = [probe(w, name) for w, name in zip(arrays, names, strict=False)]
        return as_arrays(walk, walk.run(jaxpr, [*probes, *arrays[len(names) :]]))

    jax.eval_shape(scout, list(arrays))
    products: dict[int, set[str]] = {}
    for use in uses:
        if use.kind == "product":
            products.setdefault(id(use.eqn), set()).add(use.site)
    return uses, last_products(jaxpr, products)


def probe(w: Any, name: str) -> Any:
    """Return a parameter as a view without factors, if it has the axes and the dtype of a weight."""
    if w.ndim < 2 or not jnp.issubdtype(w.dtype, jnp.floating):
        return w
    return View(w, None, None, tuple(frozenset({n}) for n in range(w.ndim)), w.dtype, name)


def roles(shapes: Mapping[str, tuple[int, ...]], uses: Sequence[Use]) -> dict[str, dict[str, Any]]:
    """Give every axis of every weight used as a matrix its role, from all the uses.

    A table that is looked up has its indexed axis as the in-axis, also where it serves a second time as a
    tied head. Otherwise the first product decides. An axis that no use sees whole, because a scan or an
    index has taken it apart, is stacked.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in dict.fromkeys(use.site for use in uses):
        own = [use for use in uses if use.site == path]
        lookups = [use for use in own if use.kind == "lookup"]
        use = (lookups or own)[0]
        sizes = shapes[path]
        ins = tuple(n for n in range(len(sizes)) if n in use.contracted)
        outs = tuple(n for n in range(len(sizes)) if n in use.free and n not in use.contracted)
        if all(sizes[n] == 1 for n in ins) or all(sizes[n] == 1 for n in outs):
            continue  # a vector, with nothing to factor
        found[path] = {
            "in_axes": ins,
            "out_axes": outs,
            "stack_axes": tuple(n for n in range(len(sizes)) if n not in (*ins, *outs)),
            "kind": "embedding" if lookups else "expert" if use.batch else "linear",
        }
    return found
