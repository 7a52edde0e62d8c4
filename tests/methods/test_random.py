"""Fresh adapters: the numbers that JAX draws op by op, whatever is compiled."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rslora_jax as rslora
from rslora_jax.methods.random import site_key

PARAMS = {
    **{f"wide{n}": jax.ShapeDtypeStruct((24, 30), "float32") for n in range(12)},
    **{f"tall{n}": jax.ShapeDtypeStruct((300, 24), "float32") for n in range(12)},
}
X = [jax.ShapeDtypeStruct((2, size), "float32") for size in (24, 300)]


def fn(p, xs):
    return [xs[w.shape[0] == 300] @ w for w in p.values()]


@pytest.fixture(autouse=True)
def compiled_here():
    """What other tests have compiled in a hurry rounds otherwise, and would be taken."""
    jax.clear_caches()


def wrapped(**config):
    return rslora.wrap(fn, PARAMS, X, config=rslora.LoraConfig(rank=5, alpha=7, **config))


def op_by_op(how, key, path, fan_in, dtype):
    """As it is written down: not compiled, so that each number is rounded after each operation."""
    stream = site_key(key, path)
    if how == "uniform":
        bound = 1 / math.sqrt(fan_in)
        return jax.random.uniform(stream, (fan_in, 5), dtype, -bound, bound)
    return jax.random.normal(stream, (fan_in, 5), dtype) / math.sqrt(fan_in)


@pytest.mark.parametrize(("how", "dtype"), [("uniform", "float32"), ("gaussian", "float32"), ("gaussian", "bfloat16")])
@pytest.mark.filterwarnings("ignore::rslora_jax.wrap.RsloraWarning")
def test_every_number_is_as_op_by_op_compiled_or_not(how, dtype):
    lora, key = wrapped(init=how, dtype=dtype, targets=["wide0", "tall1"]), jax.random.key(7)
    many = jax.jit(jax.vmap(lora.init))
    for init in (lora.init, lambda key: jax.tree.map(lambda a: a[0], many(key[None]))):
        adapters = init(key)
        for path, size in (("wide0", 24), ("tall1", 300)):
            np.testing.assert_array_equal(adapters[path]["a"], op_by_op(how, key, path, size, jnp.dtype(dtype)))
            assert adapters[path]["a"].dtype == dtype and not adapters[path]["b"].any()
    assert jax.eval_shape(lora.init, key) == jax.eval_shape(lambda: adapters)


def test_sites_of_one_shape_share_what_is_compiled():
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, _, **__: events.append(name))

    def compiled(lora):
        jax.clear_caches()
        before = len(events)
        lora.init(jax.random.key(0))
        return sum("backend_compile" in name for name in events[before:])

    assert 0 < compiled(wrapped(targets=["wide0", "tall1"])) == compiled(wrapped())


def test_a_function_that_cannot_be_compiled_may_draw():
    def draw(key, shape, dtype, fan_in):
        return jnp.asarray(np.arange(math.prod(shape)).reshape(shape) * float(jax.random.uniform(key)), dtype)

    lora = wrapped(init=draw, targets="wide0")
    key = jax.random.key(1)
    a = lora.init(key)["wide0"]["a"]
    assert float(a[0, 1]) == float(jax.random.uniform(site_key(key, "wide0")))
