"""Arguments that are no arrays: another value or another type is another trace, and a number that is traced is not."""

import dataclasses
import enum
import math
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rslora_jax as rslora
from rslora_jax.transform.program import Program
from rslora_jax.transform.static import exact, exact_structure
from tests.program_models import normal
from tests.reference import trained

pytestmark = pytest.mark.usefixtures("compile_fast")

PARAMS, X = {"w": normal(0, 12, 14)}, normal(1, 5, 12)
CONFIG = rslora.LoraConfig(rank=3, alpha=7)


class Level(enum.IntEnum):
    LOW = 0
    HIGH = 1


class Act(enum.Enum):
    RELU = 1
    TANH = 1.5


@dataclasses.dataclass(frozen=True)
class Options:
    first: object = None
    second: object = 0.0


NAN = float("nan")
PLAIN = [
    *(None, False, True, 0, 1, -1, 0.0, -0.0, 1.0, -1.0, 0.5, NAN, -NAN, math.inf, 1e300, 1j, 0j, complex(-0.0, 0)),
    *(complex(0, -0.0), complex(NAN, 0), complex(1, 0), "", "1", b"1", "gelu", np.str_("gelu"), Level.LOW, Level.HIGH),
    *(Act.RELU, Act.TANH, jnp.float32, np.float32, np.dtype("float32"), np.dtype(">f4"), "float32", ..., int, float),
]
HELD = [np.float32(0.0), np.float32(-0.0), np.float64(1), np.int32(1), np.bool_(True), np.float32(NAN)]
VALUES = st.recursive(
    st.sampled_from([*PLAIN, *HELD]),
    lambda inner: (
        st.lists(inner, max_size=2).map(tuple)
        | st.lists(inner, max_size=2).map(frozenset)
        | st.builds(Options, inner, inner)
    ),
    max_leaves=4,
)


def told(value):
    """What a program can tell of a value, as a text: not the code under test."""
    if isinstance(value, frozenset):
        return f"set{sorted(map(told, value))}"
    if isinstance(value, tuple):
        return f"tuple{[*map(told, value)]}"
    if isinstance(value, Options):
        return f"Options{[told(value.first), told(value.second)]}"
    sign = math.copysign(1, value) if isinstance(value, float) else ""
    return f"{type(value)} {value!r} {sign} {getattr(value, 'str', '') if isinstance(value, np.dtype) else ''}"


@settings(max_examples=400, deadline=None)
@given(VALUES, VALUES)
def test_a_key_is_equal_where_nothing_can_tell_two_values_apart(one, other):
    assert (exact(one) == exact(other)) == (told(one) == told(other))
    if exact(one) == exact(other):
        assert hash(exact(one)) == hash(exact(other))
    assert exact(one) == exact(one)


def test_a_key_looks_into_the_structure_of_a_pytree():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Model:
        w: object
        eps: object = dataclasses.field(metadata={"static": True}, default=0.0)

    trees = [
        {1: 5},
        {True: 5},
        [{1: 5}],
        ({1: 5},),
        None,
        [None],
        Model(2),
        Model(2, -0.0),
        Model(2, 0),
        Model(None),
        3,
    ]
    keys = [exact_structure(jax.tree.structure(tree)) for tree in trees]
    assert len(set(keys)) == len(keys)
    nans = [exact_structure(jax.tree.structure(Model(2, float("nan")))) for _ in range(2)]
    assert nans[0] == nans[1]


# What functions do with an argument: what jit can trace, what needs the value, and what needs its type.


def multiply(p, x, s):
    return x @ p["w"] * s


def mix(p, x, s):
    return jnp.where(jnp.isnan(s), 0, jnp.exp(-s)) * jnp.tanh(x @ p["w"])


def branch(p, x, s):
    return x @ p["w"] * (2 if s > 0.3 else 1)


def look_up(p, x, s):
    return x @ p["w"] * {0.5: 3.0, 1: 4.0}.get(s, 5.0)


def tell(p, x, s):
    """Depends on all there is to know of a value; a traced one is a fault."""
    assert not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(s))
    return x @ p["w"] * (1 + sum(told(s).encode()) % 17)


def reverse(p, x, s):
    """A gradient reversal: its rule closes over the number, which a trace that is over cannot give it."""

    @jax.custom_vjp
    def turned(y):
        return y

    turned.defvjp(lambda y: (y, None), lambda _, g: (-s * g,))
    return turned(x @ p["w"])


NUMBERS = [0.0, -0.0, 1.0, 0.5, 0.25, NAN, float("nan"), math.inf, 1e300, 0.1]
FREE = [multiply, mix]
KNOWING = [branch, look_up, tell, reverse]


def merged(adapters):
    return {"w": PARAMS["w"] + 7 / math.sqrt(3) * adapters["w"]["a"] @ adapters["w"]["b"]}


def counted(fn):
    """Return a function, and a list as long as it has come to its end often."""
    ends = []

    def counting(*args, **kwargs):
        out = fn(*args, **kwargs)
        ends.append(None)
        return out

    return counting, ends


@pytest.mark.parametrize("fn", FREE)
def test_numbers_are_one_trace_as_in_jit(fn):
    counting, ends = counted(fn)
    lora = rslora.wrap(counting, PARAMS, X, 0.7, config=CONFIG)
    adapters, jitted = lora.init(jax.random.key(0)), jax.jit(fn)
    for number in NUMBERS:
        with jax.disable_jit():
            got, want = lora.apply(PARAMS, adapters, X, number), fn(PARAMS, X, jnp.asarray(number))
        np.testing.assert_array_equal(got, want)
        np.testing.assert_allclose(lora.apply(PARAMS, adapters, X, number), jitted(PARAMS, X, number), rtol=1e-6)
    assert jitted._cache_size() == 1
    assert len(ends) == 2  # one of them op by op, which JAX keeps apart


@pytest.mark.parametrize("fn", KNOWING)
def test_numbers_that_a_function_must_know_are_static(fn):
    lora = rslora.wrap(fn, PARAMS, X, 0.7, config=CONFIG)
    adapters = trained(lora)
    for number in [0.5, 0.25, -0.0]:

        def loss(fn, number=number):
            return lambda *a: jnp.sum(jnp.sin(fn(*a, X, number)))

        got = jax.jit(jax.value_and_grad(loss(lora.apply), argnums=1))(PARAMS, adapters)
        want = jax.value_and_grad(lambda a, loss=loss: loss(fn)(merged(a)))(adapters)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([*PLAIN, (1,), (True,), Options(0.0), Options(-0.0)]), max_size=8), st.data())
def test_any_sequence_of_values_is_traced_as_often_as_it_has_values(values, data):
    """As `jax.jit` with a static argument; but numbers, where the function allows it, all in one."""
    fn = data.draw(st.sampled_from([tell, lambda p, x, s: x @ p["w"] * (s if type(s) is not str else 1)]))
    if fn is not tell:
        values = [v for v in values if isinstance(v, bool | int | float | complex | str) and type(v) is not np.str_]
    counting, ends = counted(fn)
    program = Program(counting)
    for value in values:
        program.trace(PARAMS, (X, value), {})

    def static(v):
        return fn is tell or type(v) not in (float, complex)

    assert len(ends) == len({told(v) if static(v) else type(v) for v in values})


def test_what_a_value_is_decides_what_is_computed():
    lora = rslora.wrap(tell, PARAMS, X, None, config=CONFIG)
    adapters = lora.init(jax.random.key(0))
    for value in [*PLAIN, (1, -0.0), (True, 0.0), Options(1), Options(True), {"on": True}, {"on": 1}]:
        got = lora.apply(PARAMS, adapters, X, value)
        np.testing.assert_allclose(got, tell(PARAMS, X, value), rtol=1e-6, err_msg=repr(value))


def test_numbers_in_containers_and_among_others():
    def fn(p, x, options, *, scale, n):
        y = x @ p["w"] * options["scale"] + scale[1] * n
        return jnp.tanh(y) if options["tanh"] else y

    counting, ends = counted(fn)

    def options(scale, tanh=True):
        return {"scale": scale, "tanh": tanh}

    lora = rslora.wrap(counting, PARAMS, X, options(0.5), scale=(1, 2.0), n=2, config=CONFIG)
    adapters = trained(lora)
    for scale, tanh, number, n, traces in [(0.25, True, 3.0, 2, 1), (0.3, False, 5.0, 2, 2), (0.5, True, 7.0, 3, 3)]:
        got = lora.apply(PARAMS, adapters, X, options(scale, tanh), scale=(1, number), n=n)
        want = fn(merged(adapters), X, options(scale, tanh), scale=(1, number), n=n)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
        assert len(ends) == traces


def test_the_length_of_a_loop_leaves_it_its_gradient():
    """Traced, as `jax.jit` would, an int would make it a loop that cannot be differentiated backwards."""

    def fn(p, x, n):
        return jax.lax.fori_loop(0, n, lambda _, y: jnp.tanh(y @ p["w"] @ p["w"].T), x).sum()

    lora = rslora.wrap(fn, PARAMS, X, 2, config=CONFIG)
    adapters = trained(lora)
    got = jax.grad(lambda a: lora.apply(PARAMS, a, X, 3))(adapters)
    want = jax.grad(lambda a: fn(merged(a), X, 3))(adapters)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got, want)


def test_a_number_among_the_parameters_is_static():
    def fn(p, x):
        return x @ p["w"] if p["eps"] > 0 else x @ p["w"] / 2

    lora = rslora.wrap(fn, PARAMS | {"eps": 0.0}, X, config=CONFIG)
    adapters = lora.init(jax.random.key(0))
    for eps in (0.5, 0.0):
        params = PARAMS | {"eps": eps}
        np.testing.assert_allclose(lora.apply(params, adapters, X), fn(params, X), rtol=1e-6)


def test_an_error_of_the_function_is_the_callers():
    def fn(p, x, s):
        if not 0 <= s <= 1:
            raise ValueError(f"{s} is not from 0 to 1")
        return x @ p["w"] * s

    lora = rslora.wrap(fn, PARAMS, X, 0.5, config=CONFIG)
    with pytest.raises(ValueError, match=r"^1\.5 is not from 0 to 1") as error:
        lora.apply(PARAMS, lora.init(jax.random.key(0)), X, 1.5)
    assert error.value.__context__ is None


def test_threads_that_give_numbers_do_not_disturb_each_other():
    program, got = Program(reverse), []

    def work(number):
        _, _, arrays = program.trace(PARAMS, (X, number), {})
        got.append(len(arrays))

    threads = [threading.Thread(target=work, args=(n / 3,)) for n in range(6)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert got == [2] * 6  # the number is none of the arrays
