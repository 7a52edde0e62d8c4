"""Train a small Llama on eight virtual devices in several ways and print what the tests compare.

python -m tests.mesh_program WAY [WAY ...]      each a mesh, "one" (device), "pmap", or "MESH then MESH" (a resume)

A mesh may go on with " of N", for the first N devices, and then with " remat NAME".
"""

import dataclasses
import json
import re
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rslora_jax as rslora
from rslora_jax.models.decoder import SHARDING_RULES, Decoder, DecoderConfig, Embed, Layer
from rslora_jax.parallel import sharding
from rslora_jax.sites import named_leaves, path_name
from rslora_jax.train import TrainState, fit, make_pmap_step, make_step, replicate, token_loss
from rslora_jax.train.batches import Batch

STEPS, ROWS, LENGTH = 20, 8, 16
CONFIG = DecoderConfig(
    vocab_size=96, width=64, mlp_width=128, num_layers=3, num_heads=8, num_kv_heads=4, scan_layers=True
)
LOSS, OPTIMIZER = token_loss(LENGTH, chunk=LENGTH // 3), optax.adamw(3e-3)
TOKENS = jax.ShapeDtypeStruct((1, 4), "int32")


def batch(step: int) -> Batch:
    """Make a batch whose rows have different numbers of tokens with loss."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, CONFIG.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
    mask = (positions >= np.arange(ROWS)[:, None]).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], mask, positions, np.ones((ROWS, LENGTH), np.int32))


def gathered(text: str) -> list[int]:
    """Return how many numbers each all-gather of a compiled program makes."""
    found = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather(?:-start)?\(", text)
    return sorted(int(np.prod([int(n) for n in shape.split(",") if n])) for shape in found)


class Setup:
    """The base, the adapters and the batches' place, on a mesh or on one device."""

    def __init__(self, mesh_text: str | None):
        mesh_text, _, remat = (mesh_text or "").partition(" remat ")
        model = Decoder(dataclasses.replace(CONFIG, remat=remat or None))
        variables, apply, self.where = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)), model.apply, None
        if mesh_text:
            mesh_text, _, number = mesh_text.partition(" of ")  # "fsdp=4 of 4": on the first four devices
            mesh = sharding.make_mesh(mesh_text, jax.devices()[: int(number or 8)])
            variables = jax.device_put(variables, sharding.param_shardings(variables, mesh, SHARDING_RULES))
            self.where = sharding.batch_sharding(mesh, ROWS)
            apply = sharding.pin_rows(model.apply, self.where, (Embed, Layer))
        self.variables, self.apply = variables, apply
        self.lora = rslora.wrap(apply, variables, TOKENS, config=rslora.LoraConfig(rank=6, alpha=10))
        self.adapters = self.lora.init(jax.random.key(1))
        if mesh_text:
            self.adapters = jax.device_put(self.adapters, sharding.adapter_shardings(self.lora.sites, variables))

    def fit(self, folder: str, steps: int, **options):
        return fit(
            *(self.lora, self.variables, self.adapters),
            batches=[batch(n) for n in range(STEPS)],
            heldout=[batch(STEPS)],
            loss=LOSS,
            optimizer=OPTIMIZER,
            steps=steps,
            folder=folder,
            batch_sharding=self.where,
            show=False,
            **options,
        )

    def programs(self) -> tuple[str, str]:
        """Return the compiled text of the step, and of what the base model alone would do.

        That is its loss, and the gradient of its norms, which goes through every layer.
        """

        def base_loss(scales, params, batch):
            whole = jax.tree_util.tree_map_with_path(lambda path, w: scales.get(path_name(path), w), params)
            return LOSS(lambda *args, **kwargs: self.apply(whole, *args, **kwargs), batch)[0]

        first = jax.device_put(batch(0), self.where)
        scales = {path: w for path, w in named_leaves(self.variables).items() if path.endswith("scale")}
        state = TrainState.create(self.adapters, OPTIMIZER)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        step = make_step(self.lora, LOSS, OPTIMIZER, shardings=shardings)
        base = jax.jit(jax.value_and_grad(base_loss)).lower(scales, self.variables, first)
        return step.lower(state, self.variables, first).compile().as_text(), base.compile().as_text()


def on_mesh(mesh_text: str | None) -> dict:
    setup = Setup(mesh_text)
    with tempfile.TemporaryDirectory() as folder:
        result = setup.fit(folder, STEPS)

    def spec(leaf):
        return [*leaf.sharding.spec, *[None] * leaf.ndim][: leaf.ndim] if mesh_text else None

    def specs(tree):
        return {path: spec(leaf) for path, leaf in named_leaves(tree).items()}

    state = TrainState.create(setup.adapters, OPTIMIZER)
    found = outcome(result) | {
        "adapter_specs": specs(result.adapters),
        "moment_specs": specs(state.opt_state[0].mu),
        "base_specs": specs(setup.variables),
        "merged_specs": specs(setup.lora.merge(setup.variables, result.adapters)),
    }
    if mesh_text:
        ours, base = setup.programs()
        found |= {"base_gathers": gathered(base), "gathers": gathered(ours)}
    return found


def outcome(result) -> dict:
    losses = [record["loss"] for record in result.records if "loss" in record]
    return {"losses": losses, "heldout": list(result.heldout.values()), **listed(result.adapters)}


def listed(adapters) -> dict:
    return {"adapters": {path: np.ravel(leaf).tolist() for path, leaf in named_leaves(adapters).items()}}


def resumed(first: str, then: str) -> dict:
    """Train half on one mesh, and go on from the checkpoint on another."""
    with tempfile.TemporaryDirectory() as folder:
        Setup(first).fit(folder, STEPS // 2)
        return outcome(Setup(then).fit(folder, STEPS, resume=True))


def with_pmap() -> dict:
    setup = Setup(None)
    step = make_pmap_step(setup.lora, LOSS, OPTIMIZER)
    state = replicate(TrainState.create(setup.adapters, OPTIMIZER))
    variables, losses = replicate(setup.variables), []
    for n in range(STEPS):
        rows = jax.tree.map(lambda x: x.reshape(8, ROWS // 8, *x.shape[1:]), batch(n))
        state, metrics = step(state, variables, rows)
        losses.append(float(metrics["loss"][0]))
    return {"losses": losses, **listed(jax.tree.map(lambda x: x[3], state.adapters))}


def train(way: str) -> dict:
    first, _, then = way.partition(" then ")
    if then:
        return resumed(first, then)
    return with_pmap() if way == "pmap" else on_mesh(None if way == "one" else way)


if __name__ == "__main__":
    assert len(jax.devices()) == 8
    print(json.dumps({way: train(way) for way in sys.argv[1:]}))
