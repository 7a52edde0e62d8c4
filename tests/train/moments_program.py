"""Train with moments in few bits on a mesh of four virtual devices and on one; print what the tests compare."""

import json

import jax
import numpy as np
import optax

from rslora_jax.parallel import sharding
from rslora_jax.train import TrainState, low_moments, make_step
from tests.train.test_moments import loss, wide


def run(form, mesh):
    lora, params, adapters, batches = wide()
    where, shardings = None, None
    if mesh:
        rules = [("*", ("fsdp", "tensor"))]
        params = jax.device_put(params, sharding.param_shardings(params, mesh, rules))
        adapters = jax.device_put(adapters, sharding.adapter_shardings(lora.sites, params))
        where = sharding.batch_sharding(mesh)
    optimizer = low_moments(optax.adam(1e-3), form)
    state = TrainState.create(adapters, optimizer)
    if mesh:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_step(lora, loss, optimizer, shardings=shardings)
    for x in batches[:6]:
        state, _ = step(state, params, jax.device_put(x, where) if mesh else x)
    return state, adapters, step


def specs(tree):
    return [[*leaf.sharding.spec, *[None] * leaf.ndim][: leaf.ndim] for leaf in jax.tree.leaves(tree)]


def main():
    assert len(jax.devices()) == 4
    found = {}
    for form in ("bfloat16", "int8"):
        one, _, _ = run(form, None)
        many, adapters, step = run(form, sharding.make_mesh("fsdp=2,tensor=2"))
        held = jax.tree.leaves(many.opt_state.inner[0].mu, is_leaf=lambda x: hasattr(x, "whole"))
        found[form] = {
            "specs": specs([x.values if form == "bfloat16" else x.codes for x in held]),
            "adapter_specs": specs(adapters),
            "compiled": step._cache_size(),
            **{
                name: np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.adapters)]).tolist()
                for name, state in (("one", one), ("mesh", many))
            },
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
