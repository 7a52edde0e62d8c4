"""Checkpoints that hold the adapters and what goes on with them, never the base.

A run's folder has `checkpoints/<step>`, each with three items: "adapters" and "training" (arrays), and "about" (JSON:
the config, what the base was, the place in the data, a checksum of every array).
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
from rslora_jax.sites import from_paths, named_leaves
from rslora_jax.store.checksum import checksums
from rslora_jax.store.items import (
    FORMAT,
    Damaged,
    as_saved,
    check_same,
    check_shapes,
    read_about,
    read_arrays,
    shapes_of,
    without_empty,
)
from rslora_jax.store.keys import as_data, as_keys


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
    with contextlib.ExitStack() as stack:

        def take() -> None:
            check_folder(folder, resume=resume)
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(folder))
            check_folder(folder, resume=resume)  # again: another process may have been quicker

        first_decides(take)
        heldout = _heldout_losses(folder)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_LastAndBest(keep, heldout), cleanup_tmp_directories=True
        )
        manager = ocp.CheckpointManager(folder / "checkpoints", options=options, item_handlers=_handlers())
        stack.callback(_close, manager)
        yield Checkpoints(folder, manager, heldout)


def _close(manager: ocp.CheckpointManager) -> None:
    with contextlib.suppress(Exception):  # `save` or `wait` has told of it
        manager.wait_until_finished()
    manager.close()


def _handlers() -> dict[str, Any]:
    """Return how orbax reads and writes each item of a checkpoint."""
    arrays = ocp.StandardCheckpointHandler
    return {"adapters": arrays(), "training": arrays(), "about": ocp.JsonCheckpointHandler()}


def check_folder(folder: str | Path, *, resume: bool = False) -> None:
    """Raise a ValueError where `open_checkpoints` would for what a folder holds."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder")
    steps = steps_in(folder)
    if resume and not steps:
        raise ValueError(f"{folder} holds no checkpoint to resume from: start a run there first")
    if steps and not resume:
        raise ValueError(f"{folder} already holds a run, at step {steps[-1]}: resume it, or give another folder")


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
    manager.save(
        step,
        args=ocp.args.Composite(
            **{item: ocp.args.StandardSave(without_empty(tree)) for item, tree in arrays.items()},
            about=ocp.args.JsonSave(
                {
                    **about,
                    "format": FORMAT,
                    "checksums": words,
                    "keys": keys,
                    "heldout_loss": checkpoints.heldout.get(step),
                }
            ),
        ),
        force=True,
    )


def restore(
    checkpoints: Checkpoints,
    adapters: Adapters,
    training: PyTree,
    about: Mapping[str, Any],
    say: Callable[[str], Any] = warnings.warn,
) -> tuple[Adapters, PyTree, dict[str, Any]]:
    """Read the last whole checkpoint as (adapters, training, about), on the devices of the examples given.

    A damaged one is moved to `folder/damaged-<step>`, and the one before is taken.

    Args:
      checkpoints: from `open_checkpoints`.
      adapters, training: examples with the shapes, dtypes and shardings to restore to; the mesh, and the number of
        devices, may be other than those that saved.
      about: what `describe` gives for this run; its config and base must be those of the checkpoint.
      say: told of what is damaged.

    Raises:
      ValueError: the checkpoint is of another config, another base or another optimiser (what differs is named), or
        there is no whole one.
    """
    example = {"adapters": adapters, "training": training}
    for step in reversed(steps_in(checkpoints.folder)):
        where = checkpoints.folder / "checkpoints" / str(step)
        try:
            found = read_about(where)
            like, impls = as_saved(example, found.get("keys", {}))
            for item, wanted in like.items():
                check_shapes(where, item, shapes_of(where, item), without_empty(wanted))
            check_same(where, found, about)
            read = as_keys(read_arrays(where, found, like), impls)
            return read["adapters"], read["training"], found
        except Damaged as error:
            say(f"{error}: it is kept as {_set_aside(checkpoints, step)}, and the checkpoint before it is taken")
    raise ValueError(f"{checkpoints.folder} has no checkpoint that is whole: start again in another folder")


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
    like = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes_of(where, "adapters"))
    if shardings is not None:
        like = jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), like, shardings)
    return LoraConfig.from_dict(about["config"]), read_arrays(where, about, {"adapters": like})["adapters"]


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
    arrays = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes_of(where, item))
    read = as_keys(read_arrays(where, about, {item: arrays}), about.get("keys", {}))[item]
    found = read.get("model_state", {})
    if {*found} != {*named_leaves(like)}:
        differing = sorted({*found} ^ {*named_leaves(like)})
        raise ValueError(f"{where} holds a model state of another structure: {differing[0]} is not in both")
    return from_paths(like, found)


def load_about(folder: str | Path) -> dict[str, Any]:
    """Read what was saved of a run's last whole checkpoint beside its arrays."""
    folder = Path(folder).absolute()
    for step in reversed(steps_in(folder)):
        with contextlib.suppress(Damaged):
            return read_about(folder / "checkpoints" / str(step))
    return read_about(find(folder, "last"))


def find(folder: Path, step: int | Literal["last", "best"]) -> Path:
    """Return the folder of one checkpoint."""
    steps = steps_in(folder)
    if step == "best" and steps:
        losses = _heldout_losses(folder)
        if not losses:
            raise ValueError(f"{folder} has no checkpoint with a held-out loss: ask for the last")
        step = min(losses.items(), key=lambda item: item[1])[0]
    if not steps or step not in ("last", *steps):
        have = f"it has steps {', '.join(map(str, steps))}" if steps else "it holds none"
        raise ValueError(f"{folder} has no checkpoint{'' if step == 'last' else f' of step {step}'}: {have}")
    return folder / "checkpoints" / str(steps[-1] if step == "last" else step)


def _heldout_losses(folder: Path) -> dict[int, float]:
    """Return the held-out loss of every checkpoint that has one, by step."""
    losses = {}
    for step in steps_in(folder):
        with contextlib.suppress(Damaged):
            losses[step] = read_about(folder / "checkpoints" / str(step)).get("heldout_loss")
    return {step: loss for step, loss in losses.items() if loss is not None}


def describe(config: LoraConfig, params: Params, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Say in plain JSON values what adapters belong to: their config, their base, and how they are trained.

    The base is told by the dtype, the shape and a checksum of every array (`checksum.checksums`).
    """
    return {"config": config.to_dict(), "base": checksums(params), "settings": dict(settings or {})}


def steps_in(folder: Path) -> list[int]:
    """Return the finished checkpoints of a run's folder, by step."""
    found = (folder / "checkpoints").glob("*")
    return sorted(int(path.name) for path in found if path.name.isdigit() and path.is_dir())


def size_of(folder: str | Path) -> int:
    """Return the bytes that the files under a folder take."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the system lets go of it even after a crash."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system: no lock is better than a lock that a crash leaves behind
        yield
        return
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is in use by another run: wait for it to end, or give another folder") from None
        yield
