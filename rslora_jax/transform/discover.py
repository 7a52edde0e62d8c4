"""Finding a program's weights: the same walk as in training, on abstract values and without factors."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rslora_jax.transform import calls, compat
from rslora_jax.transform.head import last_products
from rslora_jax.transform.interpreter import Rule, Use, Walk, as_arrays
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
    walk = Walk(SCOUTING, on_use=uses.append, otherwise=follow)

    def scout(arrays: Sequence[Any]) -> list[Any]:
        probes = [probe(w, name) for w, name in zip(arrays, names, strict=False)]
        return as_arrays(walk, walk.run(jaxpr, [*probes, *arrays[len(names) :]]))

    jax.eval_shape(scout, list(arrays))
    products: dict[int, set[str]] = {}
    for use in uses:
        if use.kind == "product":
            products.setdefault(id(use.eqn), set()).add(use.site)
    return uses, last_products(jaxpr, products)


def probe(w: Any, name: str) -> View:
    """Return a parameter as a view without factors; one without the axes or dtype of a weight has no site."""
    if w.ndim < 2 or not jnp.issubdtype(w.dtype, jnp.floating):
        return known(w)
    return View(w, None, None, tuple(frozenset({(name, n)}) for n in range(w.ndim)), w.dtype, (name,))


def known(w: Any, opaque: bool = False) -> View:
    """Return a value that depends on no data, and is no weight either."""
    return View(w, None, None, (frozenset(),) * w.ndim, w.dtype, (), opaque=opaque)


def follow(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    """Evaluate an equation for which there is no rule, and follow a weight through it.

    What depends on no data is still a parameter (`tanh(w)`, the norm of w), and where it has the shape of the
    weight it was made of, that weight is taken to have its axes there too. In training it will be
    materialised there, and said to be.
    """
    outs = compat.bind(eqn, *(v.base if isinstance(v, View) else v for v in values))
    if any(map(compat.is_tracer, values)):  # a view is none: this is data
        return outs
    weights = [v for v in values if isinstance(v, View) and v.sites]
    opaque = bool(weights) or any(isinstance(v, View) and v.opaque for v in values)

    def followed(out: Any) -> View:
        for v in weights:
            if v.shape == out.shape and jnp.issubdtype(out.dtype, jnp.floating):
                return View(out, None, None, v.axes, out.dtype, v.sites, opaque=opaque)
        return known(out, opaque)

    return [followed(o) for o in outs]


def scouting(name: str, rule: Rule) -> Rule:
    """Return a primitive's rule for values that may be parameters without being weights, which rules need not know."""

    def enter(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
        # Inside, a constant would look like data.
        return rule(
            walk, eqn, [v if isinstance(v, View) or compat.is_tracer(v) else known(jnp.asarray(v)) for v in values]
        )

    def meet(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
        # A position table added to data is data, and so is a token put before it; data may scale a weight.
        if any(compat.is_tracer(v) and (v.ndim or name not in ("mul", "div")) for v in values):
            return None
        return keep(walk, eqn, values)

    def keep(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
        plain = [v.base if isinstance(v, View) and not v.sites else v for v in values]
        if not any(isinstance(v, View) for v in plain):
            return None
        outs = rule(walk, eqn, plain)
        if outs is None or not any(isinstance(v, View) and v.opaque for v in values):
            return outs
        return [dataclasses.replace(o, opaque=True) if isinstance(o, View) else o for o in outs]

    joins_values = name in ("add", "add_any", "sub", "mul", "div", "concatenate", "stack")
    return enter if name in calls.RULES else meet if joins_values else keep


SCOUTING = {name: scouting(name, rule) for name, rule in RULES.items()}


def roles(shapes: Mapping[str, tuple[int, ...]], uses: Sequence[Use]) -> dict[str, dict[str, Any]]:
    """Give every axis of every weight used as a matrix its role, from all the uses.

    A table that is looked up has its indexed axis as the in-axis, also where it serves a second time as a
    tied head. Otherwise the first product decides. An axis that no use sees whole, because a scan or an
    index has taken it apart, is stacked.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in dict.fromkeys(use.site for use in uses):
        own = [use for use in uses if use.site == path]
        # A stack of matrices of which an index picks one for each row of the data is no table.
        shared = frozenset().union(*(use.batch for use in own))
        lookups = [use for use in own if use.kind == "lookup" and not use.contracted <= shared]
        use = (lookups or [use for use in own if use.kind != "lookup"] or own)[0]
        sizes = shapes[path]
        ins = tuple(n for n in range(len(sizes)) if n in use.contracted)
        outs = tuple(n for n in range(len(sizes)) if n in use.free and n not in use.contracted)
        if all(sizes[n] == 1 for n in ins) or all(sizes[n] == 1 for n in outs):
            continue  # a vector, with nothing to factor
        kinds = {"lookup": "embedding", "convolution": "convolution"}
        found[path] = {
            "in_axes": ins,
            "out_axes": outs,
            "stack_axes": tuple(n for n in range(len(sizes)) if n not in (*ins, *outs)),
            "kind": kinds.get(use.kind) or ("expert" if use.batch else "linear"),
        }
    return found
