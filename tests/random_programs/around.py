"""What stands around a use: (function of parameters and data, scope) -> such a function."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from tests.random_programs.scope import STACK, as_is, table

PLACES = (0, 0, 1, 2)  # where its axis may be; the first choice of each piece that does
FIRED: list[float] = []  # what the effects inside programs have seen


def axis(w: Any, at: int) -> int:
    """Where the stack axis of a parameter is, if `at` says which of the places that it has."""
    return at % w.ndim


def leading(p: Any, at: int) -> Any:
    return jax.tree.map(lambda w: jnp.moveaxis(w, axis(w, at), 0), p)


def jit(f, s):
    return s.pick([lambda p, x: jax.jit(f)(p, x), lambda p, x: jax.jit(lambda x: f(p, x))(x)])


def jit_twice(f, s):
    def twice(p, x):
        g = jax.jit(f)
        return g(p, x) + g(p, 0.5 * x)

    return twice


def checkpoint(f, s):
    policies = jax.checkpoint_policies
    policy = s.pick([None, policies.dots_saveable, policies.everything_saveable, policies.nothing_saveable])
    policy = s.pick([policy, policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names("n")])
    return jax.checkpoint(f, policy=policy, prevent_cse=s.pick([True, False]))


def scan_consts(f, s):
    options = {"reverse": s.pick([False, True]), "unroll": s.pick([1, 2])}

    def around(p, x):
        def body(c, _):
            return (as_is(f(p, c), c), c.sum())

        y, sums = lax.scan(body, x, None, length=2, **options)
        return y + sums.sum()

    return around


def scan_stack(f, s):
    at = s.pick(PLACES)
    options = {"reverse": s.pick([False, True]), "unroll": s.pick([1, 2])}
    passed = s.pick([False, False, True])  # hand the weight on, as a scanned nnx module does

    def around(p, x):
        def body(c, p):
            return (as_is(f(p, c), c), p if passed else None)

        return lax.scan(jax.checkpoint(body) if passed else body, x, leading(p, at), **options)[0]

    return around


def scan_index(f, s):
    at = s.pick(PLACES)

    def around(p, x):
        def body(c, i):
            return (as_is(f(jax.tree.map(lambda w: jnp.moveaxis(w, axis(w, at), 0)[i], p), c), c), None)

        return lax.scan(body, x, jnp.arange(STACK))[0]

    return around


def scan_carry(f, s):
    return lambda p, x: lax.scan(lambda c, _: ((as_is(f(c[1], c[0]), x), c[1]), None), (x, p), None, length=2)[0][0]


def fori(f, s):
    if s.pick(2):
        return lambda p, x: lax.fori_loop(0, 2, lambda i, c: as_is(f(p, c), c), x)
    return lambda p, x: lax.fori_loop(0, 2, lambda i, c: (as_is(f(c[1], c[0]), x), c[1]), (x, p))[0]


def while_loop(f, s):
    if s.pick(2):
        return lambda p, x: lax.while_loop(
            lambda c: c[1] < 2, lambda c: (as_is(f(c[2], c[0]), x), c[1] + 1, c[2]), (x, 0, p)
        )[0]

    def going(p, c):
        return (c[1] < 2) & (f(p, c[0]).sum() < 1e9)

    return lambda p, x: lax.while_loop(lambda c: going(p, c), lambda c: (as_is(f(p, c[0]), x), c[1] + 1), (x, 0))[0]


def cond(f, s):
    if s.pick(2):
        return lambda p, x: lax.cond(x.sum() > 0, f, lambda p, x: 0.5 * f(p, jnp.sin(x)), p, x)
    return lambda p, x: lax.cond(x.sum() > 0, lambda x: f(p, x), lambda x: 0.5 * f(p, -x), x)


def switch(f, s):
    branches = [lambda p, x: -f(p, x), f, lambda p, x: jnp.zeros_like(f(p, x))]
    return lambda p, x: lax.switch((x[0, 0] > 0).astype(int), branches, p, x)


def wrong(p, x, dp, dx):
    """A linear function of tangents that is no derivative of anything."""
    pairs = zip(jax.tree.leaves((p, x)), jax.tree.leaves((dp, dx)), strict=True)
    return sum((jnp.sin(v) * dv).sum() for v, dv in pairs)


def custom_jvp(f, s):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: (y := f(*primals), jnp.ones_like(y) * wrong(*primals, *tangents)))
    return g


def custom_vjp(f, s):
    g = jax.custom_vjp(f)
    g.defvjp(
        lambda p, x: (f(p, x), (p, x)),
        lambda kept, dy: jax.tree.map(lambda v: (jnp.cos(v) * dy.sum()).astype(v.dtype), kept),
    )
    return g


def vmap_data(f, s):
    return lambda p, x: jax.vmap(lambda x: f(p, x))(jnp.stack([x, 0.5 * x - 0.1])).sum(0)


def vmap_stack(f, s):
    at, both = s.pick(PLACES), s.pick([False, True])

    def around(p, x):
        axes = jax.tree.map(lambda w: axis(w, at), p)
        x = jnp.stack([x, jnp.cos(x)], 1) if both else x
        return jax.vmap(f, in_axes=(axes, 1 if both else None))(p, x).sum(0)

    return around


def map_rows(f, s):
    size = s.pick([None, 2])
    return lambda p, x: lax.map(lambda row: f(p, row[None])[0], x, batch_size=size)


def effect(f, s):
    def around(p, x):
        y = f(p, x)
        jax.debug.callback(FIRED.append, y.sum())
        return y

    return around


def shard_map(f, s):
    mesh = Mesh(np.array(jax.devices()[:1]), ("d",))
    rowwise = PartitionSpec("d") if s.pick(2) else PartitionSpec()
    return jax.shard_map(f, mesh=mesh, in_specs=(PartitionSpec(), rowwise), out_specs=rowwise)


def scope(f, s):
    if s.pick(2):
        return lambda p, x: jax.named_call(f, name="inner")(p, x)
    return jax.named_scope("inner")(f)


def tangent(f, s):
    def around(p, x):
        y, dy = jax.jvp(lambda x: f(p, x), (x,), (jnp.cos(x),))
        return y + dy

    return around


def force(f, s):
    """A gradient by the data inside the program, as in a force field."""
    return lambda p, x: f(p, x) + as_is(jax.grad(lambda x: jnp.sin(f(p, x)).sum())(x), f(p, x))


def inner_step(f, s):
    """A gradient step on the weights inside the program."""

    def around(p, x):
        dp = jax.grad(lambda p: jnp.sin(f(p, x)).sum())(p)
        return f(jax.tree.map(lambda w, dw: w - 0.1 * dw, p, dp), x)

    return around


AROUND = table(
    *(jit, jit_twice, checkpoint, scan_consts, scan_stack, scan_index, scan_carry, fori, while_loop, cond, switch),
    *(custom_jvp, custom_vjp, vmap_data, vmap_stack, map_rows, effect, shard_map, scope, tangent, force, inner_step),
)
STACKS = {"scan_stack", "scan_index", "vmap_stack"}  # the pieces that take a stack of weights apart
