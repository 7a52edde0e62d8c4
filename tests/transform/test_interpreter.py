"""What the walk keeps of a program and of its values, and for how long; and that it tells where each is from."""

import gc
import inspect
import types
import weakref

import jax
import jax.numpy as jnp
import pytest

import rslora_jax as rslora
from rslora_jax.transform import compat
from tests.program_models import normal

pytestmark = pytest.mark.usefixtures("compile_fast")

PARAMS = {"w": normal(0, 3, 12, 12), "v": normal(1, 12, 12)}
inner = jax.jit(lambda x, w: x @ w)


@jax.custom_jvp
def doubled(x, w):
    return x @ w


doubled.defjvp(lambda primals, tangents: (doubled(*primals), tangents[0] @ primals[1] + primals[0] @ tangents[1]))


def fn(p, x):
    """Every kind of call, some of them in each other."""
    x = jax.lax.scan(lambda x, w: (inner(x, w), None), x, p["w"])[0]
    x = jax.checkpoint(lambda x: jax.nn.softplus(inner(x, p["v"])))(x)
    x = jax.lax.cond(x.sum() > 0, lambda x: inner(x, p["v"]), lambda x: x, x)
    x = jax.lax.while_loop(lambda x: x.sum() > 1e9, lambda x: inner(x, p["v"]), x)
    return doubled(x, p["v"])


def collect():
    for _ in range(5):  # what JAX holds of a call is freed a level at a time
        gc.collect()


def entered():
    """Return the functions that stand for calls of some program, all there are."""
    functions = [f for f in gc.get_objects() if type(f) is types.FunctionType]
    return [f for f in functions if f.__module__ == "rslora_jax.transform.calls" and "build.<locals>" in f.__qualname__]


def wrapped():
    return rslora.wrap(fn, PARAMS, normal(2, 2, 12), config=rslora.LoraConfig(rank=3, alpha=7))


@pytest.mark.filterwarnings("ignore::rslora_jax.wrap.RsloraWarning")
@pytest.mark.by_day_on("oldest")
def test_compiled_calls_are_freed_by_clear_caches_and_with_the_function():
    collect()
    jax.clear_caches()
    collect()
    before = len(entered())
    lora = wrapped()
    adapters = lora.init(jax.random.key(0))
    shapes = range(2, 6)
    for n in shapes:
        jax.eval_shape(lora.apply, PARAMS, adapters, normal(2, n, 12))
    lora.apply(PARAMS, adapters, normal(2, n, 12))
    traced = [compat.opened(lora.program.trace(PARAMS, (normal(2, n, 12),), {})[0])[0] for n in shapes]
    programs = [weakref.ref(jaxpr) for jaxpr in traced]
    del traced
    collect()
    assert all(program() is not None for program in programs) and len(entered()) - before >= 8 * len(shapes)

    jax.clear_caches()
    collect()
    assert not any(program() is not None for program in programs) and len(entered()) == before
    assert jnp.isfinite(lora.apply(PARAMS, adapters, normal(2, 3, 12))).all()  # and begins anew

    gone = [weakref.ref(lora), weakref.ref(lora.program)]
    del lora
    collect()
    assert not any(reference() is not None for reference in gone) and len(entered()) == before


DATA = normal(2, 5, 12)


def deep(x):
    """Apply what keeps the shape, and could be freed at once, many times."""
    for _ in range(6):
        x = jnp.cos(x) + 1
    return x


def deep_products(p, x):
    for _ in range(6):
        x = jnp.cos(x @ p["v"])
    return x


def deep_and_the_first(p, x):
    first = x @ p["v"]
    return first, deep(first)


DEEP = {
    "entrywise": lambda p, x: deep(x) @ p["v"],
    "products": deep_products,
    "a value that is an output": deep_and_the_first,
    "jit": lambda p, x: jax.jit(deep)(x @ p["v"]),
    "scan": lambda p, x: jax.lax.scan(lambda x, w: (deep(x @ w), None), x, p["w"])[0],
    "cond": lambda p, x: jax.lax.cond(x.sum() < 1e9, lambda x: deep(x @ p["v"]), lambda x: x, x),
}


# Seconds each, op by op: by day, each end does every other one.
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.by_day_on(("oldest", "newest")[n % 2])) for n, name in enumerate(DEEP)],
)
def test_an_op_by_op_run_holds_no_more_values_at_once_than_the_function_itself(name, monkeypatch):
    fn, held = DEEP[name], []
    lora = rslora.wrap(fn, PARAMS, DATA, config=rslora.LoraConfig(rank=3, alpha=7))
    adapters, bind = lora.init(jax.random.key(0)), jax.lax.cos_p.bind

    def counted(x, **options):
        if not compat.is_tracer(x):
            held.append(sum(array.shape == DATA.shape for array in jax.live_arrays()))
        return bind(x, **options)

    monkeypatch.setattr(jax.lax.cos_p, "bind", counted)
    most = []
    for run in (lambda: fn(PARAMS, DATA), lambda: lora.apply(PARAMS, adapters, DATA)):
        collect()
        before = sum(array.shape == DATA.shape for array in jax.live_arrays())
        held.clear()
        with jax.disable_jit():
            run()
        assert len(held) >= 6
        most.append(max(held) - before)
    plain, adapted = most
    assert adapted <= plain < 3


def told(p, x):
    """A function with scopes around and inside every kind of call; each line stands for itself."""
    with jax.named_scope("first"):
        x = jnp.tanh(x @ p["v"])
    x = jnp.sin(x)

    def turn(x, w):
        with jax.named_scope("turn"):
            y = x @ w
            return jnp.cos(y), None

    with jax.named_scope("loop"):
        x = jax.lax.scan(turn, x, p["w"])[0]
    with jax.named_scope("saved"):
        x = jax.checkpoint(lambda x: jnp.exp2(x @ p["v"]))(x)
    with jax.named_scope("called"), jax.named_scope("inside"):
        x = jax.jit(lambda x: jnp.arctan(x @ p["v"]))(x)
    with jax.named_scope("branch"):
        x = jax.lax.cond(x.sum() > 0, lambda x: jnp.expm1(x @ p["v"]), lambda x: jnp.log1p(x), x)
    return jax.lax.while_loop(lambda x: x.sum() > 1e9, lambda x: jnp.sinh(x @ p["v"]), x)


def places(jaxpr, stack=""):
    """Give (primitive, named scopes, lines of `told`) of every equation, those inside of others too."""
    lines, first = inspect.getsourcelines(told)
    for eqn in compat.opened(jaxpr)[0].eqns:
        own = f"{stack}/{eqn.source_info.name_stack}".rstrip("/")
        frames = eqn.source_info.traceback.frames if eqn.source_info.traceback else ()
        here = {f.line_num for f in frames if f.file_name == __file__ and first < f.line_num < first + len(lines)}
        yield eqn.primitive, own, frozenset(here)
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if hasattr(compat.opened(inner)[0], "eqns"):
                    yield from places(inner, own)


def told_adapted():
    lora = rslora.wrap(told, PARAMS, DATA, config=rslora.LoraConfig(rank=3, alpha=7))
    return lora.apply, lora.init(jax.random.key(0))


def test_every_operation_of_the_function_keeps_its_scopes_and_its_line():
    apply, adapters = told_adapted()
    ours = set(places(jax.make_jaxpr(apply)(PARAMS, adapters, DATA)))
    anywhere = {(scopes, lines) for _, scopes, lines in ours}
    seen = 0
    for primitive, scopes, lines in places(jax.make_jaxpr(told)(PARAMS, DATA)):
        assert lines
        if primitive is jax.lax.dot_general_p:  # becomes several
            assert (scopes, lines) in anywhere
        else:
            assert (primitive, scopes, lines) in ours
            seen += "/" in scopes
    assert seen >= 8


def test_the_lowered_program_tells_the_scopes_and_lines_of_the_function():
    apply, adapters = told_adapted()
    text = jax.jit(apply).lower(PARAMS, adapters, DATA).as_text(debug_info=True)
    assert "first/tanh" in text and "turn/cos" in text
    lines, first = inspect.getsourcelines(told)
    for name in ("tanh", "sin", "cos", "exp2", "arctan", "expm1", "log1p", "sinh"):
        (at,) = (n for n, line in enumerate(lines, first) if f"jnp.{name}(" in line)
        assert f'test_interpreter.py":{at}:' in text
