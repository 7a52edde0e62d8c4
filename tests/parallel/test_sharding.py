"""Sharded parameters on four devices: constraints inside the program, and what merge gives back."""

import os
import subprocess
import sys
import textwrap

PROGRAM = """
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    import rslora_jax as rslora
    from tests.program_models import normal
    from tests.reference import merged_by_hand, trained

    mesh = jax.sharding.Mesh(np.reshape(jax.devices(), (2, 2)), ("data", "model"))
    on = lambda *spec: NamedSharding(mesh, P(*spec))
    params = {
        "up": jax.device_put(normal(0, 3, 16, 32), on(None, None, "model")),
        "down": jax.device_put(normal(1, 3, 32, 16), on(None, "model", None)),
    }
    x = jax.device_put(normal(2, 8, 16), on("data", None))

    def fn(p, x):
        def layer(x, w):
            up = jax.lax.with_sharding_constraint(w["up"], on(None, "model"))
            down = jax.lax.with_sharding_constraint(w["down"], on("model", None))
            h = jax.lax.with_sharding_constraint(jnp.tanh(x @ up), on("data", "model"))
            return x + h @ down, None
        return jax.lax.scan(layer, x, p)[0]

    lora = rslora.wrap(fn, params, x, config=rslora.LoraConfig(rank=3, alpha=7, on_fallback="error"))
    adapters = trained(lora)
    merged = lora.merge(params, adapters)
    assert all(merged[k].sharding == params[k].sharding for k in params)
    want = fn(merged_by_hand(lora, params, adapters), x)
    got = jax.jit(lora.apply)(params, adapters, x)
    np.testing.assert_allclose(got, want, atol=2e-5)
    loss = lambda apply: lambda a: jnp.sum(jnp.sin(apply(a)))
    grads = jax.jit(jax.grad(loss(lambda a: lora.apply(params, a, x))))(adapters)
    wanted = jax.jit(jax.grad(loss(lambda a: fn(lora.merge(params, a), x))))(adapters)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), grads, wanted)
    # The constraints are kept: some collective must join what the model axis has split.
    text = jax.jit(lora.apply).lower(params, adapters, x).compile().as_text()
    assert "all-reduce" in text
    print("all held on", len(jax.devices()), "devices")
"""


def test_constraints_and_shardings_are_kept():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)], capture_output=True, text=True, env=environment
    )
    assert "all held on 4 devices" in run.stdout, run.stderr[-3000:]
