"""Train on four virtual devices with optimisers that try adapters out, on a mesh, by pmap and on one device.

python -m tests.optimizer_program NAME [NAME ...]      prints the adapters after two steps, by optimiser and way
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

import rslora_jax as rslora
from rslora_jax.parallel import sharding
from rslora_jax.sites import named_leaves
from rslora_jax.train import TrainState, make_pmap_step, make_step, replicate

OPTIMIZERS = {
    "lbfgs": optax.lbfgs(),
    "polyak_sgd": optax.polyak_sgd(0.1),
    "hessian": optax.chain(contrib.hutchinson_estimator_diag_hessian(), optax.sgd(1e-2)),
    "sam": contrib.sam(optax.sgd(1e-2), optax.chain(contrib.normalize(), optax.sgd(0.1)), opaque_mode=True),
    "schedule_free": contrib.schedule_free_sgd(0.05),
    "lookahead": optax.lookahead(optax.sgd(1e-2), 2, 0.5),
    "noisy_sgd": optax.noisy_sgd(1e-2, key=jax.random.key(3, impl="rbg")),
}


def loss(run, batch):
    """A mean over rows of unequal weight, so that a mean of the devices' means would be another."""
    x, weight = batch
    return jnp.sum(weight[:, None] * (run(x) - 1) ** 2), jnp.sum(weight)


def batch(n: int):
    return np.random.default_rng(n).normal(size=(8, 5)).astype("float32"), np.arange(8, dtype="float32") + n


def problem():
    params = {"w": jax.random.normal(jax.random.key(0), (5, 8)) / 2}
    lora = rslora.wrap(lambda p, x: x @ p["w"], params, jnp.ones((2, 5)), config=rslora.LoraConfig(rank=3, alpha=7))
    return lora, params, jax.tree.map(lambda x: x + 0.05, lora.init(jax.random.key(1)))


def train(optimizer, way: str, parts: int):
    lora, params, adapters = problem()
    where, put = None, lambda rows: rows
    if way == "mesh":
        mesh = sharding.make_mesh("data=2,fsdp=2")
        params = jax.device_put(params, sharding.param_shardings(params, mesh, [("w", (None, "fsdp"))]))
        adapters = jax.device_put(adapters, sharding.adapter_shardings(lora.sites, params))
        where = sharding.batch_sharding(mesh)

        def put(rows):
            return jax.device_put(rows, where)

    state = TrainState.create(adapters, optimizer)
    if way == "pmap":
        state, params = replicate(state), replicate(params)

        def put(rows):
            return jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), rows)

        step = make_pmap_step(lora, loss, optimizer, accumulate=parts)
    else:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state) if where else None
        step = make_step(lora, loss, optimizer, accumulate=parts, shardings=shardings)
    for n in range(2):
        state, _ = step(state, params, put(batch(n)))
    if way == "pmap":
        used = jax.vmap(lambda state: state.to_use)(state)
        same = all(bool((leaf == leaf[:1]).all()) for leaf in jax.tree.leaves(used))
        return {"same": same, **listed(jax.tree.map(lambda leaf: leaf[2], used))}
    return {"compiled": step._cache_size(), **listed(state.to_use)}


def listed(adapters) -> dict:
    return {"adapters": {path: np.ravel(leaf).tolist() for path, leaf in named_leaves(adapters).items()}}


if __name__ == "__main__":
    assert len(jax.devices()) == 4
    ways = {"one": ("one", 1), "mesh": ("mesh", 1), "pmap": ("pmap", 1), "pmap in parts": ("pmap", 2)}
    print(
        json.dumps({name: {way: train(OPTIMIZERS[name], *how) for way, how in ways.items()} for name in sys.argv[1:]})
    )
