"""What the walk keeps of a program lives as long as the program itself."""

import gc
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
    traced = [compat.opened(lora._program.trace(PARAMS, (normal(2, n, 12),), {})[0])[0] for n in shapes]
    programs = [weakref.ref(jaxpr) for jaxpr in traced]
    del traced
    collect()
    assert all(program() is not None for program in programs) and len(entered()) - before >= 8 * len(shapes)

    jax.clear_caches()
    collect()
    assert not any(program() is not None for program in programs) and len(entered()) == before
    assert jnp.isfinite(lora.apply(PARAMS, adapters, normal(2, 3, 12))).all()  # and begins anew

    gone = [weakref.ref(lora), weakref.ref(lora._program)]
    del lora
    collect()
    assert not any(reference() is not None for reference in gone) and len(entered()) == before
