"""Checkpoints that hold the adapters and what goes on with them, never the base.

A run's folder has `checkpoints/<step>`, each with three items: "adapters" and "training" (arrays), and "about" (JSON:
the config, what the base was, what decides the run's course, the place in the data, a checksum of every array and of
itself).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp

from rslora_jax.adapters import Adapters
from rslora_jax.config import LoraConfig
from rslora_jax.parallel.processes import first_decides
from rslora_jax.pytrees import Params, PyTree
from rslora_jax.shown import quoted, reason_of
from rslora_jax.sites import from_paths, named_leaves
from rslora_jax.store.about import (
    FORMAT,
    check_same,
    describe,
    find,
    heldout_losses,
    load_about,
    read_about,
    sealed,
)
from rslora_jax.store.arrays import as_saved, check_shapes, read_arrays, shapes_of, without_empty
from rslora_jax.store.checksum import checksums
from rslora_jax.store.damage import Damaged
from rslora_jax.store.folder import check_folder, check_writable, locked, size_of, steps_in
from rslora_jax.store.keys import as_data, as_keys
from rslora_jax.store.quiet import quiet_closed_loops
from rslora_jax.store.start import over_original

__all__ = [
    "FORMAT",
    "Checkpoints",
    "Damaged",
    "check_folder",
    "check_same",
    "describe",
    "find",
    "load_about",
    "load_adapters",
    "load_model_state",
    "open_checkpoints",
    "read_about",
    "restore",
    "save",
    "size_of",
    "steps_in",
]


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """The open checkpoints of one run: orbax's manager, and the held-out loss of each step that has one."""

    folder: Path
    manager: ocp.CheckpointManager
    heldout: dict[int, float]


@dataclasses.dataclass(frozen=True)
class _LastAndBest:
    """Say which checkpoints orbax keeps: the last few, and the one with the least held-out loss."""

    last: int
    heldout: Mapping[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [info.step for info in checkpoints]
        best = min((step for step in steps if step in self.heldout), key=self.heldout.__getitem__, default=None)
        return [step in steps[-self.last :] or step == best for step in steps]


@contextlib.contextmanager
def open_checkpoints(folder: str | Path, *, resume: bool = False, keep: int = 2) -> Iterator[Checkpoints]:
    """Open a folder for one run's checkpoints, `folder/checkpoints/<step>`; wait for the last save at the end.

    Args:
      folder: made if it is not there.
      resume: whether to go on from what the folder holds.
      keep: how many of the last checkpoints to keep, at least 1, beside the best; others are deleted.

    Raises:
      ValueError: the folder is in use by a running process, holds a run and `resume` is False, or holds none
        and `resume` is True. Nothing in it is then touched.
    """
    if keep < 1:
        raise ValueError(f"keep={keep} checkpoints would leave nothing to resume from: give at least 1")
    folder = Path(folder).absolute()
    quiet_closed_loops()
    with contextlib.ExitStack() as stack:

        def take() -> None:
            check_folder(folder, resume=resume)
            check_writable(folder)
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder))
            check_folder(folder, resume=resume)  # again: another process may have been quicker

        first_decides(take)
        heldout = heldout_losses(folder)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_LastAndBest(keep, heldout), cleanup_tmp_directories=True
        )
        manager = ocp.CheckpointManager(folder / "checkpoints", options=options, item_handlers=_handlers())
        stack.callback(_close, manager)
        yield Checkpoints(folder, manager, heldout)


def _close(manager: ocp.CheckpointManager) -> None:
    """Wait for what is being written and let go of it; what failed of it `save` or a wait before has told."""
    for finish in (manager.wait_until_finished, manager.close):
        with contextlib.suppress(Exception):
            finish()


def _handlers() -> dict[str, Any]:
    """Return how orbax reads and writes each item of a checkpoint."""
    arrays = ocp.StandardCheckpointHandler
    return {"adapters": arrays(), "training": arrays(), "about": ocp.JsonCheckpointHandler()}


def save(
    checkpoints: Checkpoints,
    step: int,
    adapters: Adapters,
    training: PyTree,
    about: Mapping[str, Any],
    heldout_loss: float | None = None,
) -> None:
    """Save one step; it is written in the background and appears whole or not at all.

    Args:
      checkpoints: from `open_checkpoints`.
      step: the number of steps done.
      adapters: the adapters.
      training: any pytree of arrays that training goes on with, such as the optimiser's state.
      about: what `describe` gave, and what else is to be read back, in plain JSON values.
      heldout_loss: the loss of these adapters on held-out data; the checkpoint with the least is kept.

    Raises:
      Exception: whatever orbax raises where it cannot write, or could not finish the save before this one.
    """
    manager = checkpoints.manager
    if step in manager.all_steps():
        return
    arrays, keys = as_data({"adapters": adapters, "training": training})
    words = checksums(arrays)
    if heldout_loss is not None and math.isfinite(heldout_loss):
        checkpoints.heldout[step] = heldout_loss
    about = {**about, "checksums": words, "keys": keys, "heldout_loss": checkpoints.heldout.get(step)}
    manager.save(
        step,
        args=ocp.args.Composite(
            **{item: ocp.args.StandardSave(without_empty(tree)) for item, tree in arrays.items()},
            about=ocp.args.JsonSave(sealed(about)),
        ),
        force=True,
    )


def restore(
    checkpoints: Checkpoints,
    adapters: Adapters,
    training: PyTree,
    about: Mapping[str, Any],
    say: Callable[[str], Any] = warnings.warn,
    check: Callable[[Mapping[str, Any]], Any] | None = None,
) -> tuple[Adapters, PyTree, dict[str, Any]]:
    """Read the last whole checkpoint as (adapters, training, about), on the devices of the examples given.

    A damaged one is passed over, and moved to `folder/damaged-<step>` once a whole one is found. Where there is none,
    or it is refused, nothing is moved.

    Args:
      checkpoints: from `open_checkpoints`.
      adapters, training: examples with the shapes, dtypes and shardings to restore to; the mesh, and the number of
        devices, may be other than those that saved.
      about: what `describe` gives for this run; its config and base must be those of the checkpoint.
      say: told of what is damaged.
      check: called with what the checkpoint tells about itself, before its arrays are read; it may refuse it.

    Raises:
      ValueError: the checkpoint is of another config, another base or another optimiser (what differs is named), it
        cannot be read just now, or there is no whole one.
    """
    damaged: dict[int, Damaged] = {}
    example = {"adapters": adapters, "training": training}
    for step in reversed(steps_in(checkpoints.folder)):
        where = checkpoints.folder / "checkpoints" / str(step)
        try:
            found = read_about(where)
            if check:
                check(found)
            like, impls = as_saved(example, found.get("keys", {}))
            for item, wanted in like.items():
                shapes_of(where, item, found)
                check_shapes(where, item, found, wanted)
            check_same(where, found, about)
            read = as_keys(read_arrays(where, found, like), impls)
        except Damaged as error:
            damaged[step] = error
            continue
        for bad, why in damaged.items():
            say(f"{why}: it is kept as {_set_aside(checkpoints, bad)}, and the checkpoint before it is taken")
        return read["adapters"], read["training"], found
    first = f" ({next(iter(damaged.values()))})" if damaged else ""
    raise ValueError(f"{checkpoints.folder} has no checkpoint that is whole{first}: start again in another folder")


def _set_aside(checkpoints: Checkpoints, step: int) -> Path:
    """Move a checkpoint out of the way of the one that will take its place."""
    place = checkpoints.folder / f"damaged-{step}"
    for number in range(2, 100):
        if not place.exists():
            break
        place = checkpoints.folder / f"damaged-{step}-{number}"
    first_decides(lambda: (checkpoints.folder / "checkpoints" / str(step)).rename(place))
    checkpoints.heldout.pop(step, None)
    checkpoints.manager.reload()
    return place


def load_adapters(
    folder: str | Path,
    *,
    params: Params = None,
    step: int | Literal["last", "best"] = "last",
    shardings: PyTree = None,
) -> tuple[LoraConfig, Adapters]:
    """Read (config, adapters) from a run's folder: what `wrap` and `Lora.apply` need.

    Of a run whose start changed the base (`rslora_jax.starts`), these are adapters of the base as it was: of twice the
    rank, and of the same scale.

    Args:
      folder: what was given to `open_checkpoints` or `fit`.
      params: the base; where given, it must be the one the adapters were trained on, bit for bit.
      step: which checkpoint: the last, the one with the least held-out loss, or that of a step.
      shardings: where the adapters are to lie, such as `sharding.adapter_shardings` gives; by default they are numpy
        arrays, on no device.

    Raises:
      ValueError: there is no such checkpoint, it is damaged, or it belongs to another base.
    """
    where = find(Path(folder).absolute(), step)
    about = read_about(where)
    if params is not None:
        check_same(where, about, {"base": checksums(params)})
    like = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes_of(where, "adapters", about))
    if shardings is not None:
        like = jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), like, shardings)
    config, adapters = _config_of(where, about), read_arrays(where, about, {"adapters": like})["adapters"]
    return (
        over_original(where.parent.parent, about, config, adapters, shardings) if about["start"] else (config, adapters)
    )


def _config_of(where: Path, about: Mapping[str, Any]) -> LoraConfig:
    try:
        if not isinstance(method := about["config"].get("method", "lora"), str):
            raise ValueError(f"its method is {quoted(method)}")
        return LoraConfig.from_dict(about["config"])
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{where} has a config that cannot be read ({reason_of(error)})") from error


def load_model_state(folder: str | Path, like: PyTree, *, step: int | Literal["last", "best"] = "last") -> PyTree:
    """Read what a model with state carried on (`fit(model_state=...)`): batch statistics, keys and counts, caches.

    Args:
      folder: what was given to `fit`.
      like: a pytree of the state's structure, such as what the run began with.
      step: which checkpoint: the last, the one with the least held-out loss, or that of a step.

    Returns:
      The structure of `like`, of numpy arrays, and of typed keys where there were keys.

    Raises:
      ValueError: there is no such checkpoint, it is damaged, or has no state of this structure.
    """
    where = find(Path(folder).absolute(), step)
    about = read_about(where)
    item = "training"
    arrays = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes_of(where, item, about))
    read = as_keys(read_arrays(where, about, {item: arrays}), about.get("keys", {}))[item]
    found = read.get("model_state", {})
    if {*found} != {*named_leaves(like)}:
        differing = sorted({*found} ^ {*named_leaves(like)})
        raise ValueError(f"{where} holds a model state of another structure: {differing[0]} is not in both")
    return from_paths(like, found)
