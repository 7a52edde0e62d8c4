"""An optimiser whose moments are held in 16 or 8 bits between the steps, and computed with in float32."""

from __future__ import annotations

import difflib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rslora_jax.train.rounded import Bfloat16, EightBits, mixed, rounded
from rslora_jax.train.update import taken_by
from rslora_jax.transform.programs import fold

FORMS = ("float32", "bfloat16", "int8")

# What these hold are parameters and gradients to take differences of, or to use again in place of computing them.
_WHOLE = (optax.ScaleByLBFGSState, optax.ScaleByZoomLinesearchState, optax.ScaleByBacktrackingLinesearchState)


class LowMoments(NamedTuple):
    """Hold the state of `low_moments`: the optimiser's, with its moments in few bits, and the number of updates."""

    inner: Any
    number: Array


def low_moments(optimizer: optax.GradientTransformation, form: str) -> optax.GradientTransformation:
    """Make an optimiser hold its moments in few bits between the updates; each update computes in float32.

    Moments are those float32 arrays of the state that have a parameter's shape and did not begin as its value: the
    averages, sums and traces of any optimiser, not the parameters that some keep (schedule-free ones, lookahead,
    `float32_masters`). They are rounded at random, so that what moves slowly does not stand still (`rounded`): a mean
    over many steps is that of float32, with noise. Of Adam's second moment, with b2 of 0.999, the noise is some 3 % in
    bfloat16. 8 bits are block by block, of the logarithm (after arXiv 2110.02861, whose codes are others and whose
    rounding is to the nearest); arrays of less than 4,096 numbers stay float32.

    Put it around the whole optimiser. The same state gives the same update: a run that is resumed ends as one that was
    not interrupted, bit for bit.

    Args:
      optimizer: any optax optimiser.
      form: "bfloat16", 2 bytes a number; "int8", 1 byte and 8 for each block of 32 to 256; "float32" changes nothing.

    Returns:
      The optimiser.

    Raises:
      ValueError: there is no such form.

    >>> parameters = {"a": jnp.ones((64, 64))}
    >>> state = low_moments(optax.adam(1e-3), "bfloat16").init(parameters)
    >>> sum(leaf.nbytes for leaf in jax.tree.leaves(state)) - 2 * 2 * 64 * 64  # beside two moments, two counts
    8
    """
    if form not in FORMS:
        near = difflib.get_close_matches(form, FORMS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"moments in {form!r}{hint}: they are held in {', '.join(FORMS[:-1])} or {FORMS[-1]}")
    if form == "float32":
        return optimizer

    def init(params: Any) -> LowMoments:
        leaves, structure = jax.tree.flatten(optimizer.init(params))
        count = jnp.zeros((), jnp.int32)
        held = [
            _held(leaf, form, count, n) if is_moment else leaf
            for n, (leaf, is_moment) in enumerate(zip(leaves, _moments(optimizer, params), strict=True))
        ]
        return LowMoments(jax.tree.unflatten(structure, held), count)

    def update(updates: Any, state: LowMoments, params: Any = None, **extra: Any) -> tuple[Any, LowMoments]:
        held, structure = jax.tree.flatten(state.inner, is_leaf=_is_held)
        whole = [leaf.whole() if _is_held(leaf) else leaf for leaf in held]
        updates, new = optimizer.update(
            updates, jax.tree.unflatten(structure, whole), params, **taken_by(optimizer, extra)
        )
        count = state.number + 1
        kept = [
            _held(leaf, form, count, n) if _is_held(before) else leaf
            for n, (before, leaf) in enumerate(zip(held, jax.tree.leaves(new), strict=True))
        ]
        return updates, LowMoments(jax.tree.unflatten(structure, kept), count)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_held(leaf: Any) -> bool:
    return isinstance(leaf, Bfloat16 | EightBits)


def _held(leaf: Array, form: str, count: Array, number: int) -> Any:
    """Return a moment in a form, by noise of the number of the update and of its place in the state."""
    seed = mixed(mixed(count.astype(jnp.uint32)) + jnp.uint32(number))
    found = rounded(leaf, form, seed)
    return leaf if found is None else found


def _moments(optimizer: optax.GradientTransformation, params: Any) -> list[bool]:
    """Say which leaves of an optimiser's state are moments of the parameters."""
    program, state = jax.make_jaxpr(optimizer.init, return_shape=True)(params)
    given = fold(
        program,
        [True] * len(jax.tree.leaves(params)),
        lambda eqn, values: [any(values)] * len(eqn.outvars),
        constant=lambda value: False,
        literal=lambda atom: False,
    )
    whole = jax.tree.map(lambda node: jax.tree.map(lambda _: isinstance(node, _WHOLE), node), state, is_leaf=_is_whole)
    shapes = {jnp.shape(leaf) for leaf in jax.tree.leaves(params)} - {()}
    return [
        not (of_params or keep) and leaf.shape in shapes and leaf.dtype == jnp.float32
        for of_params, keep, leaf in zip(given, jax.tree.leaves(whole), jax.tree.leaves(state), strict=True)
    ]


def _is_whole(node: Any) -> bool:
    return isinstance(node, _WHOLE)
