"""Models with state on a mesh of eight virtual devices beside one: a script for `tests.devices.run_on`, given a folder.

Prints, for each model, the largest difference of state and adapters between the two, and between a run on the mesh and
one that was resumed there.
"""

import dataclasses
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import rslora_jax as rslora
from rslora_jax.parallel import sharding
from tests.train.test_model_state import CONFIG, X, fitted, numbers, of_linen, of_nnx


def apart(one, other) -> float:
    def of(result):
        return numbers((result.model_state, result.adapters))

    return max(np.abs(a.astype(float) - b.astype(float)).max() for a, b in zip(of(one), of(other), strict=True))


def main(folder: str) -> None:
    mesh = sharding.make_mesh("data=4,fsdp=2")
    everywhere = NamedSharding(mesh, PartitionSpec())
    for make in (of_nnx, of_linen):
        case, where = make(), f"{folder}/{make.__name__}"
        lora = rslora.wrap(case.fn, case.params, case.state, X, **case.held, config=CONFIG)
        adapters = jax.tree.map(lambda leaf: leaf + 0.05, lora.init(jax.random.key(1)))
        alone = fitted(case, lora, adapters, f"{where}-one")
        spread = dataclasses.replace(case, params=jax.device_put(case.params, everywhere))
        adapters = jax.device_put(adapters, everywhere)
        options = {"batch_sharding": sharding.batch_sharding(mesh, 8)}
        whole = fitted(spread, lora, adapters, f"{where}-mesh", **options)
        fitted(spread, lora, adapters, f"{where}-parts", 3, **options)
        resumed = fitted(spread, lora, adapters, f"{where}-parts", resume=True, **options)
        assert {leaf.sharding for leaf in jax.tree.leaves(whole.model_state)} == {everywhere}
        print(apart(alone, whole), apart(whole, resumed))


if __name__ == "__main__":
    main(sys.argv[1])
