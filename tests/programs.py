"""The programs on which the laws are tested: each a function, its parameters and example arguments."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from tests.convolutions import convolution
from tests.program_models import Case, linen, mlp, nnx_transformer, normal, tokens


def stacked(name: str) -> Case:
    """Programs that take a stack of weights apart in different ways."""

    def by_scan(p, x):
        return lax.scan(lambda c, w: (jnp.tanh(c @ w), c.sum()), x, p["w"], reverse=True, unroll=2)

    def by_scanned_index(p, x):
        return lax.scan(lambda c, i: (jnp.tanh(c @ p["w"][i]), None), x, jnp.arange(3))[0]

    def by_hand(p, x):
        x = jnp.tanh(x @ p["w"][0]) + jnp.tanh(x @ p["w"][2])
        return x @ p["w"][(x.sum() > 0).astype(jnp.int32)].T

    def by_scan_of_one(p, x):
        return lax.scan(lambda c, _: (jnp.tanh(c @ p["w"][1]), None), x, None, length=3)[0]

    def experts(p, x):
        return jnp.einsum("etd,edf->etf", jnp.stack([x, 2 * x, x - 1]), p["w"])

    def nested(p, x):
        def outer(c, w):
            return lax.scan(lambda c, _: (jnp.tanh(c @ w), None), c, None, length=2)[0], None

        return lax.scan(jax.checkpoint(outer), x, p["w"])[0]

    def returned(p, x):  # as nnx.scan returns its module
        body = jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), (w.T, p["w"][0])))
        x, (back, first) = lax.scan(body, x, p["w"])
        return lax.scan(lambda c, ws: (jnp.tanh(c @ ws[0] @ ws[1]), None), x, (back, first))[0]

    fns = {f.__name__: f for f in (by_scan, by_scanned_index, by_hand, by_scan_of_one, experts, nested, returned)}
    return Case(fns[name], {"w": normal(3, 3, 12, 12)}, (normal(5, 6, 12),), sites=1)


def control(name: str) -> Case:
    """Programs that use one weight inside a loop, a branch or a call, or beside them."""

    def while_(p, x):
        return lax.while_loop(
            lambda c: (c[1] < 3) & (jnp.sum(c[0] @ p["w"]) < 1e9), lambda c: (jnp.sin(c[0] @ p["w"]), c[1] + 1), (x, 0)
        )[0]

    def while_each(p, x):
        def one(row):
            def going(c):
                return (c[1] < 4) & (jnp.sum(c[0] @ p["w"]) < 0.5)

            return lax.while_loop(going, lambda c: (jnp.sin(c[0] @ p["w"]), c[1] + 1), (row, 0))

        y, steps = jax.vmap(one)(x)
        return x @ p["w"] + y * (1 + steps[:, None])

    def while_carry(p, x):
        return lax.while_loop(lambda c: c[1] < 3, lambda c: (jnp.sin(c[0] @ c[2]), c[1] + 1, c[2]), (x, 0, p["w"]))[0]

    def fori_carry(p, x):
        return lax.fori_loop(0, 3, lambda i, c: (jnp.sin(c[0] @ c[1]), c[1]), (x, p["w"]))[0]

    def cond(p, x):
        return lax.cond(x.sum() > 0, lambda x: x @ p["w"], lambda x: jnp.sin(x) @ p["w"].T, x)

    def beside(p, x):
        y = lax.cond(x.sum() > 0, lambda x: jnp.sin(x) * x + x, lambda x: x * x - x, x)
        y = lax.while_loop(lambda c: c[1] < 3, lambda c: (jnp.sin(c[0]) * x + c[0] / 3, c[1] + 1), (y, 0))[0]
        y = lax.scan(lambda c, row: (c * row + jnp.sin(c), c / 3 - row), y, x)[1].sum(1)
        own = jax.custom_vjp(lambda y: lax.cond(y.sum() > 0, lambda y: jnp.sin(y) * y + y / 3, jnp.sin, y))
        own.defvjp(lambda y: (own(y), y), lambda y, dy: (y * dy,))
        return own(jax.jit(lambda y: jnp.sin(y) * y + y / 3)(x @ p["w"] + y))

    def switch_of_weights(p, x):
        w = lax.switch(1, [lambda w: w, lambda w: w.T], p["w"])
        return x @ p["w"] + x @ w

    def jit_of_transpose(p, x):
        turned = jax.jit(lambda w: w.T)(p["w"])
        return jax.jit(lambda x, w: x @ w)(x, turned) + jax.jit(lambda w, x: w @ x.T)(p["w"], x).T

    def scan_of_rows(p, x):
        rows = lax.scan(lambda c, row: (jnp.sin(c + row), c), x[0], p["w"])[1]
        return x @ p["w"] + rows[: len(x)]

    def checkpoint_policy(p, x):
        f = jax.checkpoint(lambda x: jnp.sin(x @ p["w"]) @ p["w"], policy=jax.checkpoint_policies.dots_saveable)
        return f(x)

    fns = {
        f.__name__: f
        for f in (
            *(while_, while_each, while_carry, fori_carry, cond, beside, switch_of_weights, scan_of_rows),
            *(jit_of_transpose, checkpoint_policy),
        )
    }
    loud = {"switch_of_weights": "cond", "scan_of_rows": "scan along an axis of A or B"}
    return Case(
        fns[name],
        {"w": normal(3, 12, 12)},
        (normal(5, 6, 12),),
        sites=1,
        fallback=loud.get(name, ""),
    )


def layout(name: str) -> Case:
    """Programs that store or reshape a weight in unusual ways."""

    def left(p, x):
        return jnp.einsum("fd,td->ft", p["w"].T, x)

    def split_heads(p, x):
        return jnp.einsum("td,dhk->thk", x, p["w"].reshape(12, 4, 6)).reshape(6, -1) @ p["w"].T

    def fused(p, x):
        q, k = p["w"][:, :8], p["w"][:, 8:]
        return (x @ q) @ (x @ k)[:, :8].T

    def strided(p, x):
        return x[:, ::2] @ p["w"][::2, 1::3]

    def batch_axis_of_out(p, x):  # as multi-head latent attention absorbs a projection
        w = p["w"].reshape(12, 4, 6)
        h = jnp.einsum("td,dhk->thk", x, w)
        return jnp.einsum("thk,dhk->thd", h, w)

    def cast_twice(p, x):
        return x @ p["w"].astype(jnp.bfloat16).astype(jnp.float32)

    def turned_and_split(p, x):  # in one operation, of which the order of the axes is a parameter
        w = lax.reshape(p["w"], (4, 6, 12), dimensions=(1, 0))
        return jnp.einsum("hkd,td->thk", w, x).reshape(6, -1) @ p["w"].T

    fns = {f.__name__: f for f in (left, split_heads, fused, strided, batch_axis_of_out, cast_twice, turned_and_split)}
    tolerance = 1e-2 if name == "cast_twice" else 1e-5
    return Case(fns[name], {"w": normal(3, 12, 24)}, (normal(5, 6, 12),), tolerance=tolerance, sites=1)


def arithmetic(name: str) -> Case:
    """Programs in which a weight meets its data only after arithmetic of its own."""

    def scaled(p, x):
        return x @ (p["w"] * 0.5 * p["column"]) + x @ (p["row"][:, None] * p["w"] / 3)

    def by_its_norm(p, x):  # as weight normalisation does
        return x @ (p["w"] * (p["column"] / jnp.sqrt((p["w"] ** 2).sum(0))))

    def shifted(p, x):
        return x @ (p["w"] - jnp.ones((12, 24))) + x @ (1 - (-p["w"] + p["other"]))

    def squashed(p, x):
        return x @ jnp.tanh(p["w"])

    def masked(p, x):
        return x @ jnp.tril(p["w"])

    def padded(p, x):
        return jnp.pad(x, ((0, 0), (0, 2))) @ jnp.pad(p["w"], ((0, 2), (1, 0)), constant_values=0.5)

    def reversed_(p, x):
        return x @ p["w"][::-1, ::-1]

    def rolled(p, x):
        return x @ jnp.roll(p["w"], 5, axis=0) + x @ jnp.roll(p["w"], 7, axis=1)

    def split_and_joined(p, x):
        left, right = jnp.split(p["w"], 2, axis=1)
        return x @ jnp.concatenate([right, jnp.zeros((12, 3)), left], axis=1)

    def fused(p, x):  # two weights joined into one product, as an LSTM joins its gates
        y = x @ jnp.concatenate([p["w"], p["other"]], axis=1)
        return y[:, :24] * y[:, 24:] + (x @ jnp.concatenate([p["w"].T, p["other"].T], axis=0).T)[:, :24]

    def stacked_here(p, x):
        w = jnp.stack([p["w"], p["other"], p["w"]], axis=1)
        first, *_ = jnp.unstack(w, axis=1)
        return lax.scan(lambda c, w: (c, c @ w), x, w.swapaxes(0, 1))[1] + x @ first

    def repeated(p, x):
        w = jnp.broadcast_to(p["w"][None], (2, 12, 24))
        return jnp.einsum("nti,nio->nto", jnp.stack([x, 2 * x]), w) + jnp.einsum("ti,nio->nto", x, w)

    def tiled(p, x):
        return x @ checkpoint_name(jnp.tile(p["w"], (1, 2)), "w") + jnp.tile(x, (1, 3)) @ jnp.tile(p["w"], (3, 2))

    def expanded(p, x):
        return jnp.einsum("tai,aio->to", x[:, None], p["w"][None]) + (x @ p["w"][:, None].reshape(12, 24))

    def stopped(p, x):
        return x @ lax.stop_gradient(p["w"]) + x @ jnp.sin(x.sum() * p["w"])

    fns = [scaled, by_its_norm, shifted, squashed, masked, padded, reversed_, rolled, split_and_joined, fused]
    fns += [stacked_here, repeated, tiled, expanded, stopped]
    fallbacks = {"by_its_norm": "integer_pow", "squashed": "tanh", "masked": "select_n", "stopped": "sin"}
    params = {"w": normal(3, 12, 24), "other": normal(4, 12, 24), "column": normal(5, 24), "row": normal(6, 12)}
    return Case(
        {f.__name__: f for f in fns}[name],
        params,
        (normal(5, 6, 12),),
        sites=2 if name in ("fused", "stacked_here") else 1,
        targets=["*"] if name in ("fused", "stacked_here") else ["w"],
        fallback=fallbacks.get(name, ""),
        tolerance=3e-5,
    )


def picked(name: str) -> Case:
    """Stacks of matrices of which the data picks its own."""

    def by_row(p, x):
        which = jnp.array([0, 2, 1, 2, 2, 0])
        return jnp.einsum("ti,tio->to", x, p["w"][which])

    def by_row_mapped(p, x):
        return jax.vmap(lambda x, n: x @ jnp.take(p["w"], n, axis=0))(x, jnp.array([0, 2, 1, 2, 2, 0]))

    def ragged(p, x):
        return jnp.tanh(lax.ragged_dot(x, p["w"], jnp.array([2, 0, 4]))) @ p["w"][1].T

    def ragged_back(p, x):  # down-projection with the same experts, transposed
        h = lax.ragged_dot(x, p["w"], jnp.array([1, 3, 2]))
        return lax.ragged_dot(jnp.tanh(h), jnp.swapaxes(p["w"], 1, 2), jnp.array([1, 3, 2]))

    def ragged_by_data(p, x):  # the sizes of the groups are computed, too
        sizes = jnp.array([3, 1, 2]) + (x.sum() > 1e9).astype(jnp.int32)
        return jnp.tanh(lax.ragged_dot(x, p["w"], sizes)) + lax.ragged_dot(jnp.tile(x, (8, 1)), p["w"], 8 * sizes)[:6]

    fns = {f.__name__: f for f in (by_row, by_row_mapped, ragged, ragged_back, ragged_by_data)}
    return Case(fns[name], {"w": normal(3, 3, 12, 24)}, (normal(5, 6, 12),), sites=1)


def mapped(name: str) -> Case:
    """Programs that hold a mapped program or an effect."""
    mesh = jax.make_mesh((1,), ("n",), axis_types=(jax.sharding.AxisType.Auto,))

    def shard_map_by_in(p, x):
        def body(w, x):
            return lax.psum(jnp.tanh(x @ w) @ w.T, "n")

        return jax.shard_map(body, mesh=mesh, in_specs=(P("n", None), P(None, "n")), out_specs=P())(p["w"], x)

    def shard_map_by_data(p, x):
        def body(w, x):
            return lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=2)[0]

        return jax.shard_map(body, mesh=mesh, in_specs=(P(), P("n")), out_specs=P("n"))(p["w"], x)

    def vmap_of_weights(p, x):
        split = p["w"].reshape(2, 6, 12)
        return jax.vmap(lambda w, x: x @ w)(split, x.reshape(6, 2, 6).swapaxes(0, 1))

    def pmap(p, x):
        return jax.pmap(lambda w, x: x @ w, in_axes=(None, 0))(p["w"], x[None])

    def associative_scan(p, x):
        return lax.associative_scan(lambda a, b: jnp.tanh((a + b) @ p["w"]), x)

    def printed(p, x):
        y = x @ p["w"]
        jax.debug.callback(lambda y: None, y.sum())
        return jnp.tanh(y) @ p["w"]

    fns = [shard_map_by_in, shard_map_by_data, vmap_of_weights, pmap, associative_scan, printed]
    return Case(
        {f.__name__: f for f in fns}[name], {"w": normal(3, 12, 12)}, (normal(5, 6, 12),), sites=1, tolerance=3e-5
    )


def lookup(name: str) -> Case:
    def tied(p, t):
        return jnp.tanh(p["table"][t] @ p["w"]) @ p["table"].T

    def take_with_fill(p, t):
        return jnp.take(p["table"], 2 * t, axis=0, fill_value=0) @ p["w"]

    def columns(p, t):
        return jnp.take(p["table"].T, t, axis=1).sum(1).T @ p["w"]

    fns = {f.__name__: f for f in (tied, take_with_fill, columns)}
    params = {"table": normal(2, 50, 12), "w": normal(3, 12, 12)}
    return Case(fns[name], params, (tokens(),), targets=["*"], sites=2)


def family(build: Callable[[str], Case], names: str) -> dict[str, Callable[[], Case]]:
    return {f"{build.__name__} {name}": functools.partial(build, name) for name in names.split()}


CASES: dict[str, Callable[[], Case]] = {
    "linen looped": linen,
    "linen scanned, remat": lambda: linen(scanned=True, sites=6),
    "linen every matrix": lambda: linen(targets=["*/{kernel,embedding}"], sites=14),
    "linen tied": lambda: linen(tied=True),
    "linen tied, every matrix": lambda: linen(tied=True, targets=["*/{kernel,embedding}"], sites=13),
    "linen bfloat16 compute": lambda: linen(dtype=jnp.bfloat16, tolerance=4e-2),
    "linen bfloat16 parameters": lambda: linen(
        dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, tolerance=4e-2, scanned=True, sites=6
    ),
    "nnx": nnx_transformer,
    "mlp": mlp,
    **family(stacked, "by_scan by_scanned_index by_hand by_scan_of_one experts nested returned"),
    **family(control, "while_ while_carry fori_carry cond switch_of_weights scan_of_rows jit_of_transpose"),
    **family(control, "checkpoint_policy while_each beside"),
    **family(layout, "left split_heads fused strided batch_axis_of_out cast_twice turned_and_split"),
    **family(arithmetic, "scaled by_its_norm shifted squashed masked padded reversed_ rolled split_and_joined fused"),
    **family(arithmetic, "stacked_here repeated tiled expanded stopped"),
    **family(convolution, "one_axis two_axes three_axes grouped depthwise tied scanned channels_first mapped"),
    **family(picked, "by_row by_row_mapped ragged ragged_back ragged_by_data"),
    **family(mapped, "shard_map_by_in shard_map_by_data vmap_of_weights pmap associative_scan printed"),
    **family(lookup, "tied take_with_fill columns"),
}


# One or two of each kind, for what goes over all of them at night.
BY_DAY = (
    "linen scanned, remat",
    "linen tied, every matrix",
    "stacked by_scan",
    "stacked experts",
    "control checkpoint_policy",
    "arithmetic split_and_joined",
    "arithmetic padded",
    "convolution grouped",
    "picked ragged",
    "mapped shard_map_by_in",
    "lookup tied",
)


def each_at_night() -> list[Any]:
    """The names of all cases, as parameters: those that are not in `BY_DAY` run at night."""
    assert set(BY_DAY) <= set(CASES)
    return [pytest.param(name, marks=[] if name in BY_DAY else [pytest.mark.nightly]) for name in CASES]
