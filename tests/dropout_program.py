"""Dropout on two devices beside one: a script.

XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m tests.dropout_program
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import rslora_jax as rslora

SIZE, RATE = 48, 0.3
KEY = jax.random.key(5)
X = 1 + jnp.abs(jax.random.normal(jax.random.key(0), (30, SIZE)))
ZERO = jnp.zeros((SIZE, SIZE))


def seen_by(fn, x):
    """What a function of zeros gives whose adapters are the identity: the data as they are seen."""
    config = rslora.LoraConfig(rank=SIZE, alpha=1, scaling="constant", dropout=RATE)
    lora = rslora.wrap(fn, {"w": ZERO}, x, config=config)
    eye = {"w": {"a": jnp.eye(SIZE), "b": jnp.eye(SIZE)}}
    return np.asarray(jax.jit(lora.apply)({"w": ZERO}, eye, x, dropout_key=KEY))


def product(p, x):
    return x @ p["w"]


def main():
    mesh = jax.make_mesh((2,), ("n",), axis_types=(jax.sharding.AxisType.Auto,))
    alone = seen_by(product, X)
    for spec in (P("n"), P(None, "n"), P()):
        np.testing.assert_array_equal(seen_by(product, jax.device_put(X, NamedSharding(mesh, spec))), alone)
    print("the masks on a mesh are those on one device")

    def by_hand(p, x):
        mapped = jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(P(), P("n")), out_specs=P("n"))
        return mapped(p["w"], x)

    parts = [half != 0 for half in np.split(seen_by(by_hand, X), 2)]
    both = (parts[0] & parts[1]).mean()
    assert abs(both - (1 - RATE) ** 2) < 0.05, both
    print("each device that has data of its own draws for itself")


if __name__ == "__main__":
    main()
