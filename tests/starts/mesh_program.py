"""Starts on a mesh of four devices: the base's shardings stay, and all is as on one device."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import rslora_jax as rslora
from rslora_jax import starts
from rslora_jax.parallel.sharding import adapter_shardings
from tests.program_models import normal
from tests.reference import assert_near


def fn(p, x):
    def layer(x, w):
        return x + jnp.tanh(x @ w["up"]) @ w["down"], None

    return jax.lax.scan(layer, x, p)[0]


def loss(run, batch):
    return jnp.sum(jnp.sin(run(batch))), jnp.float32(8)


def products(lora, adapters):
    """Give what does not depend on the signs of singular vectors."""
    merged = lora.merge({path: jnp.zeros(site.shape) for path, site in lora.sites.items()}, adapters)
    return {path: (array, np.abs(np.asarray(adapters[path]["a"]))) for path, array in merged.items()}


def check(*names):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    here = {"up": normal(0, 3, 16, 32), "down": normal(1, 3, 32, 16)}
    spec = {"up": PartitionSpec(None, None, "model"), "down": PartitionSpec(None, "model", "data")}
    there = {name: jax.device_put(w, NamedSharding(mesh, spec[name])) for name, w in here.items()}
    x = normal(2, 8, 16)
    rows = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    every = {
        "pissa": starts.pissa,
        "olora": starts.olora,
        "lora_ga": functools.partial(starts.lora_ga, loss=loss, batches=[rows]),
        "eva": functools.partial(starts.eva, batches=[(rows,)]),
    }
    for method in ("lora", "dora"):
        lora = rslora.wrap(fn, here, x, config=rslora.LoraConfig(rank=3, alpha=7, method=method))
        for name in names:
            begin, key = every[name], jax.random.key(0)
            (alone, one), (params, adapters) = begin(lora, here, key), begin(lora, there, key)
            where = adapter_shardings(lora.sites, there)
            for path in here:
                assert params[path].sharding == there[path].sharding, (name, path)
                for of, array in adapters[path].items():
                    assert of == "m" or array.sharding == where[path][of], (name, path, of)
            assert_near(params, alone, 1e-4)
            assert_near(products(lora, adapters), products(lora, one), 5e-3 if name in ("eva", "lora_ga") else 1e-3)
            assert_near(jax.jit(lora.apply)(params, jax.device_put(adapters, where), rows), fn(here, x), 2e-5)
    print("all held on", len(jax.devices()), "devices")


if __name__ == "__main__":
    check(*sys.argv[1:])
