"""Checkpoints that hold the adapters and what goes on with them, never the base."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from rslora_jax.config import LoraConfig
from rslora_jax.sites import named_leaves


@contextlib.contextmanager
def open_checkpoints(folder: str | Path, *, resume: bool = False, keep: int = 2) -> Iterator[ocp.CheckpointManager]:
    """Open a folder for one run's checkpoints, `folder/checkpoints/<step>`; wait for the last save at the end.

    Args:
      folder: made if it is not there.
      resume: whether to go on from what the folder holds.
      keep: how many checkpoints to keep; older ones are deleted.

    Raises:
      ValueError: the folder is in use by a running process, holds a run and `resume` is False, or holds none
        and `resume` is True. Nothing in it is then touched.
    """
    folder = Path(folder).absolute()
    check_folder(folder, resume=resume)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        check_folder(folder, resume=resume)  # again: another process may have been quicker
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        with ocp.CheckpointManager(folder / "checkpoints", options=options, item_handlers=handlers()) as manager:
            yield manager


def handlers() -> dict[str, Any]:
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


def save(manager: ocp.CheckpointManager, step: int, adapters: Any, training: Any, about: Mapping[str, Any]) -> None:
    """Save one step; it is written in the background and appears whole or not at all.

    Args:
      manager: from `open_checkpoints`.
      step: the number of steps done.
      adapters: the adapters.
      training: any pytree of arrays that training goes on with, such as the optimiser's state.
      about: what `describe` gave.
    """
    if step in manager.all_steps():
        return
    manager.save(
        step,
        args=ocp.args.Composite(
            adapters=ocp.args.StandardSave(adapters),
            training=ocp.args.StandardSave(training),
            about=ocp.args.JsonSave(dict(about)),
        ),
        force=True,
    )


def restore(manager: ocp.CheckpointManager, adapters: Any, training: Any, about: Mapping[str, Any]) -> tuple[Any, Any]:
    """Read the last step back as (adapters, training), on the devices of the examples given.

    Args:
      manager: from `open_checkpoints`.
      adapters, training: examples with the shapes, dtypes and shardings to restore to.
      about: what `describe` gives for this run; its config and base must be those of the checkpoint.

    Raises:
      ValueError: the checkpoint is of another config, another base or another optimiser; what differs is named.
    """
    step = manager.latest_step()
    found = read_about(manager, step)
    where = f"{manager.directory}/{step}"
    for name, example in (("adapters", adapters), ("training", training)):
        compare(where, name, manager.item_metadata(step)[name], example)
    for name, what in (("config", "LoraConfig"), ("base", "base")):
        if found[name] != about[name]:
            theirs, ours = (
                ", ".join(f"{k}={side[name].get(k)}" for k in side[name] if found[name].get(k) != about[name].get(k))
                for side in (found, about)
            )
            raise ValueError(f"{where} was trained with another {what} ({theirs}; here {ours}): give it the same one")
    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            adapters=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, adapters)),
            training=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, training)),
        ),
    )
    return restored["adapters"], restored["training"]


def load_adapters(folder: str | Path, *, params: Any = None, step: int | None = None) -> tuple[LoraConfig, Any]:
    """Read (config, adapters) from a run's folder: what `wrap` and `Lora.apply` need.

    Args:
      folder: what was given to `open_checkpoints` or `fit`.
      params: the base; where given, it must be the one the adapters were trained on.
      step: which checkpoint; by default the last.

    Raises:
      ValueError: there is no such checkpoint, or it belongs to another base.
    """
    with reading(folder, step) as (manager, step):
        about = read_about(manager, step)
        if params is not None and (found := fingerprint(params)) != about["base"]["fingerprint"]:
            raise ValueError(
                f"{folder} was trained on another base (fingerprint {about['base']['fingerprint']}, here {found}): "
                "load the base it was trained on"
            )
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            manager.item_metadata(step)["adapters"].tree,
        )
        read = manager.restore(step, args=ocp.args.Composite(adapters=ocp.args.StandardRestore(like)))
    return LoraConfig.from_dict(about["config"]), read["adapters"]


def load_about(folder: str | Path) -> dict[str, Any]:
    """Read what `describe` said of a run's last checkpoint."""
    with reading(folder) as (manager, step):
        return read_about(manager, step)


@contextlib.contextmanager
def reading(folder: str | Path, step: int | None = None) -> Iterator[tuple[ocp.CheckpointManager, int]]:
    """Open a run's folder to read one step, by default the last."""
    folder = Path(folder).absolute()
    steps = steps_in(folder)
    if not steps or step not in (None, *steps):
        have = f"it has steps {', '.join(map(str, steps))}" if steps else "it holds none"
        raise ValueError(f"{folder} has no checkpoint{'' if step is None else f' of step {step}'}: {have}")
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(folder / "checkpoints", options=options, item_handlers=handlers()) as manager:
        yield manager, steps[-1] if step is None else step


def read_about(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    return manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]


def describe(config: LoraConfig, params: Any, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Say in plain JSON values what adapters belong to: their config, their base, and how they are trained."""
    leaves = jax.tree.leaves(params)
    return {
        "config": config.to_dict(),
        "base": {
            "fingerprint": fingerprint(params),
            "parameters": sum(math.prod(leaf.shape) for leaf in leaves),
        },
        "settings": dict(settings or {}),
    }


def fingerprint(params: Any, samples: int = 16) -> str:
    """Hash the paths, the shapes and a few values of every array, so that two bases can be told apart.

    Values are rounded to bfloat16 first: a base held in fewer bits is the same base.

    >>> fingerprint({"w": np.ones((4, 4))}) == fingerprint({"w": np.ones((4, 4), np.float32)})
    True
    >>> fingerprint({"w": np.ones((4, 4))}) == fingerprint({"w": np.zeros((4, 4))})
    False
    """
    digest = hashlib.sha256()
    for name, leaf in named_leaves(params).items():
        digest.update(f"{name}{tuple(leaf.shape)}".encode())
        size = math.prod(leaf.shape)
        if size:
            places = np.unravel_index(np.linspace(0, size - 1, min(size, samples)).astype(np.int64), leaf.shape)
            digest.update(np.asarray(leaf[places]).astype(jax.numpy.bfloat16).tobytes())
    return digest.hexdigest()[:16]


def compare(where: str, item: str, saved: Any, wanted: Any) -> None:
    """Raise a ValueError that names the first array whose path, shape or dtype is not the checkpoint's."""
    saved, wanted = named_leaves(getattr(saved, "tree", saved)), named_leaves(wanted)
    for name, leaf in wanted.items():
        shape = tuple(leaf.shape)
        if name not in saved:
            raise ValueError(f"{where} has no {item} for {name}, which this run needs with shape {shape}")
        if tuple(saved[name].shape) != shape:
            raise ValueError(
                f"{where} holds {item}/{name} with shape {tuple(saved[name].shape)}, where this run needs {shape}: "
                "it was trained with another config or on another base"
            )
    if extra := sorted(set(saved) - set(wanted)):
        raise ValueError(f"{where} holds {item}/{extra[0]}, which this run has no place for: is its config another?")


def steps_in(folder: Path) -> list[int]:
    """Return the finished checkpoints of a run's folder, by step."""
    found = (folder / "checkpoints").glob("*")
    return sorted(int(path.name) for path in found if path.name.isdigit() and path.is_dir())


def size_of(folder: str | Path) -> int:
    """Return the bytes that the files under a folder take."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
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
