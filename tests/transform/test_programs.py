"""The table of equations that hold programs says how values go in and come out, and leaves none out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from rslora_jax.transform import calls, compat
from rslora_jax.transform.programs import PROGRAMS, fold, held
from tests.program_models import normal
from tests.programs import CASES

pytestmark = pytest.mark.usefixtures("compile_fast")

W = normal(0, 3, 6, 6)


@jax.custom_jvp
def doubled(x, w):
    return 2 * x @ w


doubled.defjvp(lambda primals, tangents: (doubled(*primals), 2 * tangents[0] @ primals[1]))


@jax.custom_vjp
def halved(x, w):
    return x @ w / 2


halved.defvjp(lambda x, w: (halved(x, w), w), lambda w, g: (g @ w.T / 2, jnp.zeros_like(w)))


def scanned(x, reverse=False):
    """Constants, two carried values and scanned ones, each of another shape."""

    def turn(carry, numbered):
        (y, total), (w, n) = carry, numbered
        return (jnp.tanh(y @ w) + W[1], total + n), y.sum(0) * total

    return lax.scan(turn, (x, jnp.float32(0)), (W, jnp.arange(3.0)), reverse=reverse)


def while_under(limit, x):
    """Constants of the condition and of the body, and two carried values."""
    bound, w = limit + 0 * x.sum(), jnp.tanh(W[0])

    def turn(carry):
        y, n = carry
        return y @ w + n, n + 1

    return lax.while_loop(lambda carry: carry[1] < bound, turn, (x, jnp.float32(0)))


def with_gradient(fn):
    return lambda x: jax.value_and_grad(lambda x: sum(jnp.sum(y**2) for y in jax.tree.leaves(fn(x))))(x)


PROGRAM = {
    "jit": lambda x: jax.jit(lambda x, w: (x @ w, x))(x, W[0]),
    "remat": lambda x: jax.checkpoint(lambda x: jnp.tanh(x @ W[0]))(x),
    "scan": scanned,
    "reversed scan": lambda x: scanned(x, reverse=True),
    "scan of a number": lambda x: lax.fori_loop(0, 4, lambda n, x: x @ W[0] + n, x),
    "while": lambda x: while_under(3.0, x),
    "while that does not turn": lambda x: while_under(0.0, x),
    "cond": lambda x: lax.cond(x.sum() < 1e9, lambda x, w: x @ w, lambda x, w: x + w, x, W[0]),
    "switch": lambda x: lax.switch(
        jnp.int32(x.sum() < 1e9) + 1, [lambda x: x, lambda x: x @ W[0], lambda x: x @ W[2]], x
    ),
    "custom_jvp": lambda x: doubled(x, W[0]),
    "custom_vjp": lambda x: halved(x, W[0]),
    # Under a gradient JAX makes of the part that is known a call of its own.
    "remat of scan": jax.checkpoint(lambda x: scanned(x)[0]),
    "one in another": lambda x: jax.jit(jax.checkpoint(lambda x: lax.map(lambda w: doubled(x, jnp.tanh(w)), W)))(x),
}
PROGRAM |= {f"gradient of {name}": with_gradient(fn) for name, fn in PROGRAM.items() if "while" not in name}


def evaluate(eqn, values):
    """Evaluate an equation in Python by what the table says of it."""
    programs = held(eqn)
    if programs is None or eqn.primitive is compat.shard_map_p:
        return compat.bind(eqn, *values)
    if programs.call:
        (inner,) = programs.inner
        assert list(inner.inputs) == list(range(len(values))) and inner.times == 1
        return fold(inner.jaxpr, values, evaluate)
    if programs.one_of:
        inner = programs.inner[int(values[0])]
        return fold(inner.jaxpr, [values[n] for n in inner.inputs], evaluate)
    *before, body = programs.inner
    return while_in_python(before[0], body, values) if before else scan_in_python(body, values, eqn)


def while_in_python(condition, body, values):
    assert body.gives and not condition.gives
    values = list(values)
    carry = [body.inputs[n] for n in body.carried]
    while fold(condition.jaxpr, [values[n] for n in condition.inputs], evaluate)[0]:
        outs = fold(body.jaxpr, [values[n] for n in body.inputs], evaluate)
        for n, out in zip(carry, outs, strict=True):
            values[n] = out
    return [values[n] for n in carry]


def scan_in_python(body, values, eqn):
    values, stacked = [values[n] for n in body.inputs], []
    last = body.carried.stop
    turns = range(body.times)
    for turn in reversed(turns) if eqn.params["reverse"] else turns:
        outs = fold(body.jaxpr, [*values[:last], *(x[turn] for x in values[last:])], evaluate)
        for n, out in zip(body.carried, outs, strict=False):
            values[n] = out
        stacked.append(outs[len(body.carried) :])
    ordered = stacked[::-1] if eqn.params["reverse"] else stacked
    return [*(values[n] for n in body.carried), *map(jnp.stack, zip(*ordered, strict=True))]


@pytest.mark.parametrize("name", PROGRAM)
def test_a_program_run_by_the_table_gives_what_jax_gives(name):
    fn, x = PROGRAM[name], normal(3, 6, 6)
    got = fold(jax.make_jaxpr(fn)(x), [x], evaluate)
    want = jax.tree.leaves(fn(x))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def primitives_in(jaxpr, holding):
    """Add the primitives of all equations that have a program among their parameters, and go into them."""
    for eqn in compat.opened(jaxpr)[0].eqns:
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if hasattr(compat.opened(inner)[0], "eqns"):
                    holding.add(eqn.primitive)
                    primitives_in(inner, holding)
    return holding


def test_the_walk_has_a_rule_for_each_and_the_programs_here_hold_no_others():
    assert set(calls.RULES) == set(PROGRAMS)
    seen = set()
    for fn in PROGRAM.values():
        primitives_in(jax.make_jaxpr(fn)(normal(3, 6, 6)), seen)
    assert seen == set(PROGRAMS) - {compat.shard_map_p}
    for make in CASES.values():
        case = make()
        primitives_in(jax.make_jaxpr(case.fn)(case.params, *case.args), seen)
    assert seen == set(PROGRAMS)


def test_a_shard_map_runs_once_on_each_device():
    mesh = jax.sharding.AbstractMesh((2, 3), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec("data", "tensor")
    for axes, times in (({"data", "tensor"}, 6), ({"data"}, 2)):
        spec = jax.sharding.PartitionSpec("data")
        cut = jax.shard_map(lambda x: x + 1, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=axes)
        (eqn,) = jax.make_jaxpr(cut)(jnp.ones((6, 6))).eqns
        assert [inner.times for inner in held(eqn).inner] == [times] and not held(eqn).call


def test_a_number_in_the_program_is_read_as_asked():
    jaxpr = jax.make_jaxpr(lambda x, y: (x + y, x * 2.0, 3.0))(1.0, 2.0)

    def united(eqn, values):
        return [set().union(*values)] * len(eqn.outvars)

    found = fold(jaxpr, [{"x"}, {"y"}], united, literal=lambda atom: {atom.val})
    assert found == [{"x", "y"}, {"x", 2.0}, {3.0}]
