"""Adapters to a folder and back, in one call each, for who has a loop of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from rslora_jax.adapters import Adapters, check_adapters
from rslora_jax.config import LoraConfig
from rslora_jax.pytrees import Params, PyTree
from rslora_jax.shown import reason_of
from rslora_jax.store import checkpoint
from rslora_jax.wrap import Lora

_ALL = 1 << 30


def save(
    folder: str | Path,
    lora: Lora,
    adapters: Adapters,
    *,
    params: Params = None,
    model: str | None = None,
    step: int | None = None,
) -> Path:
    """Save adapters as a run's folder has them, which `load` and every command read; what is there stays.

    Args:
      folder: made if it is not there.
      lora: from `wrap`.
      adapters: its arrays.
      params: the base, whose checksums are then kept: `load` and the commands refuse another one.
      model: where the base is, as `rslora generate --model` takes it; then the commands need not be told.
      step: what number it is saved under, by default the one after the last, from 0.

    Returns:
      The folder of the checkpoint.

    Raises:
      ValueError: the adapters are not of this `lora`, the folder has the step, or a run of training, or it
        cannot be written.

    >>> import jax, jax.numpy as jnp, rslora_jax as rslora, tempfile
    >>> params, x = {"w": jnp.ones((8, 4))}, jnp.ones((2, 8))
    >>> lora = rslora.wrap(lambda p, x: x @ p["w"], params, x, config=rslora.LoraConfig(rank=3, alpha=5))
    >>> folder = tempfile.mkdtemp()
    >>> saved = save(folder, lora, lora.init(jax.random.key(0)), params=params)
    >>> config, adapters = load(folder, params=params)
    >>> config == lora.config, adapters["w"]["a"].shape
    (True, (8, 3))
    """
    check_adapters(lora.sites, adapters)
    folder = Path(folder).absolute()
    steps = checkpoint.steps_in(folder)
    if steps and "imported" not in checkpoint.load_about(folder)["settings"]:
        raise ValueError(f"{folder} holds a run of training, which goes on from its last step: save to another folder")
    if step is not None and (not isinstance(step, int) or step < 0):
        raise ValueError(f"step={step!r} is no number of a step: give 0, 1, 2, ..., or none for the next")
    step = steps[-1] + 1 if step is None and steps else step or 0
    if step in steps:
        raise ValueError(f"{folder} has a checkpoint of step {step}: give another step, or none for the next")
    # By "imported" commands know that there is no training to go on with.
    settings = {"imported": "rslora.save", "rank": lora.config.rank, "alpha": lora.config.alpha}
    settings |= {"model": str(Path(model).absolute()) if Path(model).exists() else str(model)} if model else {}
    about = checkpoint.describe(lora.config, {} if params is None else params, settings)
    with checkpoint.open_checkpoints(folder, resume=bool(steps), keep=_ALL) as saved:
        try:
            checkpoint.save(saved, step, adapters, {"step": np.int32(step)}, about)
            saved.manager.wait_until_finished()
        except Exception as error:  # what orbax, tensorstore or the system raise
            raise ValueError(f"{folder} cannot be written: {reason_of(error)}") from error
    return folder / "checkpoints" / str(step)


def load(
    folder: str | Path,
    *,
    params: Params = None,
    step: int | Literal["last", "best"] = "last",
    shardings: PyTree = None,
) -> tuple[LoraConfig, Adapters]:
    """Read (config, adapters) of a folder that `save`, `rslora_jax.train.fit` or `rslora train` wrote.

    `wrap(fn, params, ..., config=config)` then takes the adapters. Arguments and errors are those of
    `store.load_adapters`.
    """
    return checkpoint.load_adapters(folder, params=params, step=step, shardings=shardings)
