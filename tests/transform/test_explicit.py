"""Where arrays lie, by their types: explicit axes, devices that differ, other memory. All as in the merged model."""

import os
import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    from jax import lax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P, reshard
    import rslora_jax as rslora
    from rslora_jax.parallel import sharding
    from tests.program_models import normal
    from tests.reference import merged_by_hand, trained
    from tests.reference import assert_near, gradients_by_hand

    mesh = jax.make_mesh((2, 2, 2), ("data", "in", "out"), axis_types=(AxisType.Explicit,) * 3)
    jax.set_mesh(mesh)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    dot = lambda x, w, *spec: jnp.dot(x, w, out_sharding=P(*spec))
    layer = jax.checkpoint(lambda c, w: (jnp.tanh(dot(c, w, "data", None)), None))
    x, w, stack = normal(5, 8, 12), normal(3, 12, 24), normal(3, 4, 12, 12)
    batched = lambda p, x: jnp.einsum("nti,nio->nto", x, p["w"], out_sharding=P("in", "data", "out"))
    tied = lambda p, x: dot(dot(x, p["w"], "data", "out"), p["w"].T, "data", None)
    resharded = lambda p, x: dot(x, reshard(p["w"], P("out", "in")), "data", "in")
    CASES = {
        "split in": (lambda p, x: dot(x, p["w"], "data", "out"), put(w, "in", None), put(x, "data", "in")),
        "split out": (lambda p, x: dot(x, p["w"], "data", "out"), put(w, None, "out"), put(x, "data", None)),
        "split as the rows": (lambda p, x: dot(x, p["w"], "data", None), put(w, None, "data"), put(x, "data", None)),
        "tied": (tied, put(w, "in", "out"), put(x, "data", None)),
        "scan": (lambda p, x: lax.scan(layer, x, p["w"])[0], put(stack, None, "in", "out"), put(x, "data", None)),
        "resharded": (resharded, put(w, "in", "out"), put(x, "data", None)),
        "batched": (batched, put(stack, "in", None, "out"), put(normal(1, 4, 8, 12), "in", "data", None)),
        "fallback": (lambda p, x: dot(x, jnp.tanh(p["w"]), "data", "out"), put(w, "in", "out"), put(x, "data", None)),
    }
    padded = lambda spec, ndim: (*spec, *(None,) * (ndim - len(spec)))
    lies = lambda tree: [padded(leaf.sharding.spec, leaf.ndim) for leaf in jax.tree.leaves(tree)]
    loss = lambda y: jnp.sum(jnp.sin(y))
    for name in sys.argv[1:] or CASES:
        fn, w, x = CASES[name]
        params = {"w": w}
        lora = rslora.wrap(fn, params, x, config=rslora.LoraConfig(rank=4, alpha=7, on_fallback="warn"))
        whole = trained(lora)
        by_hand = merged_by_hand(lora, jax.tree.map(np.asarray, params), whole)
        by_hand = jax.tree.map(lambda m, w: jax.device_put(m, w.sharding), by_hand, params)
        gradients = lambda fn: jax.grad(lambda p, x: loss(fn(p, x)), (0, 1))
        with_gradients = lambda fn: jax.jit(lambda p, x: (fn(p, x), gradients(fn)(p, x)))
        want, (dw, dx) = with_gradients(fn)(by_hand, x)
        for split_rank in (False, True):
            adapters = jax.device_put(whole, sharding.adapter_shardings(lora.sites, params, split_rank=split_rank))
            got, (da, got_dx) = with_gradients(lambda a, x: lora.apply(params, a, x))(adapters, x)
            assert_near([got, got_dx], [want, dx], 3e-5)
            assert_near(da, gradients_by_hand(lora, adapters, dw), 1e-4)
            assert lies([got, got_dx, da]) == lies([want, dx, adapters]), name
            for merged in (lora.merge(params, adapters), jax.jit(lora.merge)(params, adapters)):
                assert lies(merged) == lies(params)
                assert_near(merged, by_hand, 1e-6)
    print("all held on", len(jax.devices()), "devices")
"""


VARIED = """
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import PartitionSpec as P
    import rslora_jax as rslora
    from tests.program_models import normal
    from tests.reference import merged_by_hand, trained
    from tests.reference import assert_near, gradients_by_hand

    mesh = jax.make_mesh((4,), ("n",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ jnp.concatenate([p["w"], jnp.sin(p["w"])], 1)
    params, x = {"w": normal(0, 12, 12)}, normal(1, 8, 12)
    lora = rslora.wrap(fn, params, x, config=rslora.LoraConfig(rank=3, alpha=7))
    each = [trained(lora, seed) for seed in range(4)]
    loss = lambda y: jnp.sum(jnp.sin(y))

    for rows in (P("n"), P()):  # the data of its own for each device, or the same
        def body(adapters, x):
            own = jax.tree.map(lambda a: a[0], adapters)
            value = lambda a: lora.apply(params, a, x)
            return value(own), jax.tree.map(lambda g: g[None], jax.grad(lambda a: loss(value(a)))(own))

        there = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(P("n"), rows), out_specs=P("n")))
        y, grads = jax.device_get(there(jax.tree.map(lambda *leaves: jnp.stack(leaves), *each), x))
        for n, adapters in enumerate(each):
            by_hand, mine = merged_by_hand(lora, params, adapters), x[2 * n : 2 * n + 2] if rows else x
            assert_near(np.split(y, 4)[n], fn(by_hand, mine), 1e-5)
            dw = jax.grad(lambda p: loss(fn(p, mine)))(by_hand)
            assert_near(jax.tree.map(lambda g: g[n], grads), gradients_by_hand(lora, adapters, dw), 1e-4)

    host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    waiting = jax.device_put(params, host)
    fn = lambda p, x: x @ jax.device_put(p["w"], jax.memory.Space.Device)
    lora = rslora.wrap(fn, waiting, x, config=rslora.LoraConfig(rank=3, alpha=7, on_fallback="error"))
    for adapters in (each[0], jax.device_put(each[0], host)):
        assert_near(jax.jit(lora.apply)(waiting, adapters, x), x @ merged_by_hand(lora, params, each[0])["w"], 1e-5)
        assert lora.merge(waiting, adapters)["w"].sharding.memory_kind == "pinned_host"
    print("all held on", len(jax.devices()), "devices")
"""


@pytest.mark.by_day_on("newest")
def test_adapters_that_differ_by_device_and_a_base_in_other_memory():
    assert "all held on 8 devices" in run(VARIED)


@pytest.mark.by_day_on("oldest")
@pytest.mark.parametrize(
    "names", [("split in", "scan", "resharded"), pytest.param((), id="all", marks=pytest.mark.nightly)]
)
def test_results_lie_as_those_of_the_merged_model(names):
    assert "all held on 8 devices" in run(PROGRAM, *names)


def run(program: str, *args: str) -> str:
    """Return what a program prints on eight virtual devices."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(program), *args]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
