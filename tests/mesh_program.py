"""Train a small Llama on a mesh and print what the tests compare; run with the mesh as its argument, or none.

python -m tests.mesh_program data=2,fsdp=2,tensor=2
"""

import json
import re
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rslora_jax as rslora
from rslora_jax import sharding
from rslora_jax.models.llama import SHARDING_RULES, Llama, LlamaConfig
from rslora_jax.sites import named_leaves, path_name
from rslora_jax.train import TrainState, fit, make_step, token_loss
from rslora_jax.train.batches import Batch

STEPS, ROWS, LENGTH = 20, 8, 16
CONFIG = LlamaConfig(
    vocab_size=96, width=64, mlp_width=128, num_layers=3, num_heads=8, num_kv_heads=4, scan_layers=True
)


def batch(step: int) -> Batch:
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, CONFIG.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
    ones = np.ones((ROWS, LENGTH), np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), positions, ones)


def gathered(text: str) -> list[int]:
    """Return how many numbers each all-gather of a compiled program makes."""
    found = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather(?:-start)?\(", text)
    return sorted(int(np.prod([int(n) for n in shape.split(",") if n])) for shape in found)


def main(mesh_text: str | None) -> None:
    model, loss = Llama(CONFIG), token_loss(LENGTH)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    lora = rslora.wrap(model.apply, variables, jnp.zeros((1, 4), jnp.int32), config=rslora.LoraConfig(rank=6, alpha=10))
    adapters, optimizer = lora.init(jax.random.key(1)), optax.adamw(3e-3)
    where = None
    if mesh_text:
        mesh = sharding.make_mesh(mesh_text)
        variables = jax.device_put(variables, sharding.param_shardings(variables, mesh, SHARDING_RULES))
        adapters = jax.device_put(adapters, sharding.adapter_shardings(lora.sites, variables))
        where = sharding.batch_sharding(mesh, ROWS)
    state, step = TrainState.create(adapters, optimizer), make_step(lora, loss, optimizer)

    # What the base model alone would do: its loss, and the gradient of its norms, which goes through every layer.
    def base_loss(scales, params, batch):
        whole = jax.tree_util.tree_map_with_path(lambda path, w: scales.get(path_name(path), w), params)
        return loss(lambda *args, **kwargs: model.apply(whole, *args, **kwargs), batch)[0]

    first = jax.device_put(batch(0), where)
    scales = {path: w for path, w in named_leaves(variables).items() if path.endswith("scale")}
    base = gathered(jax.jit(jax.value_and_grad(base_loss)).lower(scales, variables, first).compile().as_text())
    ours = gathered(step.lower(state, variables, first).compile().as_text())
    with tempfile.TemporaryDirectory() as folder:
        result = fit(
            *(lora, variables, adapters),
            batches=[batch(n) for n in range(STEPS)],
            heldout=[batch(STEPS)],
            loss=loss,
            optimizer=optimizer,
            steps=STEPS,
            folder=folder,
            batch_sharding=where,
            show=False,
        )
    losses = [record["loss"] for record in result.records if "loss" in record]
    spec = lambda leaf: [*leaf.sharding.spec, *[None] * leaf.ndim][: leaf.ndim] if mesh_text else None
    specs = lambda tree: {path: spec(leaf) for path, leaf in named_leaves(tree).items()}
    found = {
        "devices": len(jax.devices()),
        "losses": losses,
        "heldout": list(result.heldout.values()),
        "adapters": {path: np.ravel(leaf).tolist() for path, leaf in named_leaves(result.adapters).items()},
        "adapter_specs": specs(result.adapters),
        "moment_specs": specs(state.opt_state[0].mu),
        "base_specs": specs(variables),
        "merged_specs": specs(lora.merge(variables, result.adapters)),
        "base_gathers": base,
        "gathers": ours,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
