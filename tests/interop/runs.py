"""Runs for the tests: a checkpoint as `rslora train` leaves it, without the training."""

from pathlib import Path

import jax
import numpy as np

import rslora_jax as rslora
from rslora_jax.interop.load import load_model
from rslora_jax.store import checkpoint


def make_run(folder: Path, model: Path | None, *, size=0.05, scan=True, steps=(4,), dtype="float32", **config):
    """Save adapters whose B is not zero, of rank 3 and alpha 7, one set a step; return (lora, loaded, adapters)."""
    loaded = load_model(model, scan_layers=scan, param_dtype=dtype)
    config = rslora.LoraConfig(**{"rank": 3, "alpha": 7, **config})
    tokens = jax.ShapeDtypeStruct((1, 4), "int32")
    lora = rslora.wrap(loaded.apply, loaded.variables, tokens, config=config)
    about = checkpoint.describe(config, loaded.variables, {"model": model and str(model), "param_dtype": dtype})
    rng, adapters = np.random.default_rng(0), {}
    shapes = jax.eval_shape(lora.init, jax.random.key(0))
    with checkpoint.open_checkpoints(folder, keep=9) as opened:
        for step in steps:
            adapters = jax.tree.map(lambda x: (size * rng.normal(size=x.shape)).astype(np.float32), shapes)
            checkpoint.save(opened, step, adapters, {"step": np.int32(step)}, about, heldout_loss=float(step))
    return lora, loaded, adapters
