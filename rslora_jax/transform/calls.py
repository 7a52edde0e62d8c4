"""Primitives that hold programs of their own: views are carried into them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import primitives
from jax.sharding import PartitionSpec as P

from rslora_jax.stored.form import is_stored
from rslora_jax.transform import compat
from rslora_jax.transform.dropout import at_place, is_masked
from rslora_jax.transform.interpreter import Rule, Walk
from rslora_jax.transform.views import View, materialise


def _constrain(value: Any, sharding: Any) -> Any:
    if sharding is None or isinstance(value, View):
        return value
    return lax.with_sharding_constraint(value, sharding)


def _jit(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    """Enter a jit call, and keep it a call: it is traced and compiled once for the views it sees."""

    def build() -> Any:
        asked_in, asked_out = compat.call_shardings(eqn)

        def body(*args: Any) -> Any:
            outs = walk.run(eqn.params["jaxpr"], [*map(_constrain, args, asked_in)])
            return [*map(_constrain, outs, asked_out)]

        body.__name__ = body.__qualname__ = eqn.params["name"]
        return jax.jit(body, inline=eqn.params["inline"], keep_unused=eqn.params["keep_unused"])

    return walk.call(eqn, build)(*values)


def closed_call(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    """Go through a call as if it were not there."""
    return walk.run(eqn.params["call_jaxpr"], values)


def _remat(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    """Enter a rematerialised block under its own policy, so that the adapters' values are recomputed too."""

    def build() -> Any:
        def body(*args: Any) -> Any:
            return walk.run(eqn.params["jaxpr"], args)

        kept = jax.checkpoint(body, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
        return jax.jit(kept, inline=True)

    return walk.call(eqn, build)(*values)


def _scan(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    """Enter a scan: stacked weights travel with their stacked factors, shared ones as constants."""
    num_consts, num_carry = compat.scan_counts(eqn)
    loose = _changing(eqn.params["jaxpr"], num_consts, num_carry)
    values = [walk.array(v, "scan carry") if n - num_consts in loose else v for n, v in enumerate(values)]
    # A view's leading axis is the scan's own only where both factors span it.
    for n, v in enumerate(values[num_consts + num_carry :], num_consts + num_carry):
        if isinstance(v, View) and not v.stacked:
            unstacked = is_stored(v.w) and not v.w.stack
            values[n] = walk.array(v, "scan of a stored weight" if unstacked else "scan along an axis of A or B")

    def build() -> Any:
        def whole(*values: Any) -> list[Any]:
            consts, carry, xs = _split(values, num_consts, num_carry)
            fixed, moving = _hold(carry)
            # Of a weight that all turns share, each turn drops for itself; those of a stack have a key each.
            shared = any(map(is_masked, (*consts, *fixed.values())))

            def body(moving: list[Any], numbered: Any) -> Any:
                turn, xs = numbered
                own = [at_place(c, turn) for c in consts] if shared else consts
                carry = [at_place(fixed[n], turn) if n in fixed else c for n, c in enumerate(moving)]
                outs = walk.run(eqn.params["jaxpr"], [*own, *carry, *map(_enter, xs)])
                kept = [None if n in fixed else walk.array(o, "scan carry") for n, o in enumerate(outs[:num_carry])]
                return kept, outs[num_carry:]

            options = {k: eqn.params[k] for k in ("reverse", "length", "unroll")}
            turns = jnp.arange(eqn.params["length"]) if shared else None
            moved, ys = lax.scan(body, moving, (turns, xs), **options)
            return [*(fixed.get(n, c) for n, c in enumerate(moved)), *map(_leave, ys)]

        return jax.jit(whole, inline=True)

    return walk.call(eqn, build)(*values)


def _while_(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    """Enter a while loop: weights as constants of the condition and the body, or carried unchanged."""
    p = eqn.params
    counts = p["cond_nconsts"], p["body_nconsts"]
    loose = _changing(p["body_jaxpr"], p["body_nconsts"], len(values) - sum(counts))
    values = [walk.array(v, "while carry") if n - sum(counts) in loose else v for n, v in enumerate(values)]

    def build() -> Any:
        def whole(*values: Any) -> list[Any]:
            cond_consts, body_consts, carry = _split(values, *counts)
            fixed, moving = _hold(carry)
            counted = any(map(is_masked, (*body_consts, *fixed.values())))  # then each turn drops for itself

            def full(moving: list[Any]) -> list[Any]:
                return [fixed.get(n, c) for n, c in enumerate(moving)]

            def going(state: Any) -> Any:
                return walk.run(p["cond_jaxpr"], [*cond_consts, *full(state[1])])[0]

            def body(state: Any) -> Any:
                turn, moving = state
                values = [*body_consts, *full(moving)]
                values = [at_place(v, turn) for v in values] if counted else values
                outs = walk.run(p["body_jaxpr"], values)
                kept = [None if n in fixed else walk.array(o, "while carry") for n, o in enumerate(outs)]
                return None if turn is None else turn + 1, kept

            def each(state: Any) -> Any:
                on, (turn, outs) = going(state), body(state)
                return turn, [None if o is None else _where(on, o, c) for o, c in zip(outs, state[1], strict=True)]

            start = (jnp.zeros((), jnp.int32) if counted else None, moving)
            # A loop under vmap has an end for each, where that depends on data: the last one ends it.
            if compat.opened(p["cond_jaxpr"])[0].outvars[0].aval.shape:
                return full(lax.while_loop(lambda state: going(state).any(), each, start)[1])
            return full(lax.while_loop(going, body, start)[1])

        return jax.jit(whole, inline=True)

    return walk.call(eqn, build)(*values)


def _cond(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    """Enter every branch of a conditional."""
    values = [walk.array(values[0], "cond"), *values[1:]]

    def build() -> Any:
        def branch(jaxpr: compat.Jaxpr) -> Any:
            return lambda *args: [walk.array(o, "cond") for o in walk.run(jaxpr, args)]

        branches = [branch(jaxpr) for jaxpr in eqn.params["branches"]]
        return jax.jit(lambda index, *args: lax.switch(index, branches, *args), inline=True)

    return walk.call(eqn, build)(*values)


def _custom_jvp(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    """Enter a function with a derivative rule of its own for its value; differentiate it by that rule.

    The rule is written for the weight itself, so under differentiation the weight is materialised.
    """
    for v in values:
        if isinstance(v, View):
            walk.on_fallback(v, "derivative rule of custom_jvp")

    return _with_own_derivative(walk, eqn, values)


def _custom_vjp(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
    """Materialise under a backward rule of the function's own, which is written for the weight itself.

    Op by op, the call is entered all the same.
    """
    if not compat.op_by_op():
        return None
    return _with_own_derivative(walk, eqn, [walk.array(v, eqn.primitive.name) for v in values])


def _with_own_derivative(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    """Enter a call for its value; leave its derivative to the call itself."""

    def build() -> Any:
        @jax.custom_jvp
        def value(*args: Any) -> list[Any]:
            return [o if not isinstance(o, View) else materialise(o) for o in walk.run(eqn.params["call_jaxpr"], args)]

        @value.defjvp
        def rule(primals: Any, tangents: Any) -> Any:
            def exact(*args: Any) -> Any:
                return compat.bind(eqn, *(materialise(v) if isinstance(v, View) else v for v in args))

            return jax.jvp(exact, primals, tangents)

        return jax.jit(value, inline=True)

    return walk.call(eqn, build)(*values)


def _shard_map(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    """Enter a shard_map: a factor is split as the weight is along the axes it spans, its rank is whole."""

    values = [_whole_where_cut(walk, v, spec) for v, spec in zip(values, eqn.params["in_specs"], strict=True)]

    def spec_of(value: Any, spec: Any) -> Any:
        if not isinstance(value, View):
            return spec
        full = (*spec, *[None] * (len(value.shape) - len(spec)))
        spec = P(*spec[: len(value.w.stack)]) if is_stored(value.w) else spec  # its arrays may have few axes behind

        def part(array: Any) -> Any:
            return P(*(s if size == n else None for s, size, n in zip(full, array.shape, value.shape, strict=False)))

        return value.with_parts(spec, [part(array) for array in value.parts])

    def build() -> Any:
        params = compat.shard_map_params(eqn)

        def enter(value: Any, spec: Any) -> Any:
            """Note along which axes all devices have the same part: those along which it is not split."""
            if not isinstance(value, View):
                return value
            same = tuple(frozenset(params["axis_names"]) - _split_over(of) for of in spec.parts)
            return dataclasses.replace(value, uniform=same)

        def mapped(*values: Any) -> Any:
            specs = tuple(map(spec_of, values, eqn.params["in_specs"]))

            def body(*args: Any) -> Any:
                outs = walk.run(eqn.params["jaxpr"], [*map(enter, args, specs)])
                return tuple(walk.array(o, "output of shard_map") for o in outs)

            return jax.shard_map(body, in_specs=specs, **params)(*values)

        return jax.jit(mapped, inline=True)

    return walk.call(eqn, build)(*values)


def _whole_where_cut(walk: Walk, value: Any, spec: Any) -> Any:
    """Return a value as it is, or as an array where it is a stored weight that a mesh cuts behind its stack."""
    cut = isinstance(value, View) and is_stored(value.w) and any(spec[len(value.w.stack) :])
    return walk.array(value, "shard_map of a stored weight") if cut else value


def _split_over(spec: Any) -> frozenset[Any]:
    """Return the mesh axes that a partition spec names."""
    return frozenset(name for of in spec or () for name in (of if isinstance(of, tuple) else (of,)) if name is not None)


def _split(values: Sequence[Any], *counts: int) -> list[list[Any]]:
    """Split a flat list into runs of the given lengths and the rest."""
    runs, at = [], 0
    for count in counts:
        runs.append(list(values[at : at + count]))
        at += count
    return [*runs, list(values[at:])]


def _enter(value: Any) -> Any:
    """Take the scanned axis off a view's label: scanning has taken it off its arrays."""
    if not isinstance(value, View):
        return value
    return dataclasses.replace(value, axes=value.axes[1:])


def _leave(value: Any) -> Any:
    """Put an axis before a view's label: scanning has stacked its arrays again."""
    if not isinstance(value, View):
        return value
    return dataclasses.replace(value, axes=(frozenset(), *value.axes))


def _where(on: Array, new: Array, old: Array) -> Array:
    """Choose by the leading axes."""
    return lax.select(lax.broadcast_in_dim(on, new.shape, range(on.ndim)), new, old)


def _changing(body: compat.Jaxpr, num_consts: int, num_carry: int) -> set[int]:
    """Return which of the values that a loop carries its body does not pass on as it got them."""
    jaxpr, _ = compat.opened(body)
    ins = jaxpr.invars[num_consts : num_consts + num_carry]
    return {n for n, (i, o) in enumerate(zip(ins, jaxpr.outvars[:num_carry], strict=True)) if i is not o}


def _hold(carry: list[Any]) -> tuple[dict[int, View], list[Any]]:
    """Take the views out of a loop's carry, where they do not change; leave None in their places."""
    fixed = {n: c for n, c in enumerate(carry) if isinstance(c, View)}
    return fixed, [None if n in fixed else c for n, c in enumerate(carry)]


RULES: dict[compat.Primitive, Rule] = {
    primitives.jit_p: _jit,
    primitives.closed_call_p: closed_call,
    primitives.remat_p: _remat,
    primitives.scan_p: _scan,
    primitives.while_p: _while_,
    primitives.cond_p: _cond,
    primitives.custom_jvp_call_p: _custom_jvp,
    primitives.custom_vjp_call_p: _custom_vjp,
    compat.shard_map_p: _shard_map,
}
