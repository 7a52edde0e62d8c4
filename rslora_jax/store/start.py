"""What a run's adapters began as, where that changed the base: kept once, in `start` beside the checkpoints.

The adapters of such a run belong to the changed base (`rslora_jax.starts`). Its checkpoints tell of it, and whoever
loads adapters gets those of the base as it was.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from rslora_jax.adapters import Adapters
from rslora_jax.config import LoraConfig
from rslora_jax.layers import site_by_arrays
from rslora_jax.parallel.processes import first_decides
from rslora_jax.pytrees import PyTree
from rslora_jax.starts.original import doubled, less
from rslora_jax.store.about import read_about, sealed
from rslora_jax.store.arrays import read_arrays, shapes_of
from rslora_jax.store.checksum import checksums, read_form
from rslora_jax.store.damage import Damaged
from rslora_jax.trained import trained_whole


@dataclasses.dataclass(frozen=True)
class Start:
    """Hold what the adapters of a run began as, and the base as it was before.

    Attributes:
      name: how it was asked for, such as "pissa:16".
      adapters: the adapters at their start.
      base: `checksums` of the base as it was.
    """

    name: str
    adapters: Adapters
    base: Mapping[str, str]


def save_start(folder: str | Path, start: Start) -> None:
    """Write a run's start into its folder, in place of one that a run which never began has left."""
    where = Path(folder).absolute() / "start"
    first_decides(lambda: shutil.rmtree(where, ignore_errors=True))
    about = {"name": start.name, "base": dict(start.base), "checksums": checksums({"adapters": start.adapters})}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        arrays, told = ocp.args.StandardSave(start.adapters), ocp.args.JsonSave(json.loads(json.dumps(sealed(about))))
        writer.save(where, ocp.args.Composite(adapters=arrays, about=told))


def load_start(folder: str | Path, *, shardings: PyTree = None) -> Start:
    """Read the start of a run from its folder.

    Args:
      folder: the run's.
      shardings: where the adapters are to lie; by default they are numpy arrays.

    Raises:
      ValueError: it is damaged, or not there.
    """
    where = Path(folder).absolute() / "start"
    about = read_about(where)
    like = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes_of(where, "adapters", about))
    if shardings is not None:
        like = jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), like, shardings)
    adapters = read_arrays(where, about, {"adapters": like})["adapters"]
    return Start(about.get("name", ""), adapters, about["base"])


def over_original(
    folder: Path, about: Mapping[str, Any], config: LoraConfig, adapters: Adapters, shardings: PyTree = None
) -> tuple[LoraConfig, Adapters]:
    """Return a checkpoint's config and adapters as those of the base that a start has changed.

    Args:
      folder: the run's.
      about: what the checkpoint tells.
      config, adapters: as the checkpoint has them.
      shardings: where the adapters lie, and the start's are to lie.

    Raises:
      Damaged: the start is not that which the checkpoint tells of.
    """
    start = load_start(folder, shardings=shardings)
    for path, word in checksums({"adapters": start.adapters}).items():
        if about["start"].get(path) != word:
            raise Damaged(f"{folder / 'start'} is damaged: {path} is not what the run began with")
    forms, what = {path: read_form(text) for path, text in about["base"].items()}, "be taken over to another base"
    shapes = {path: form and form.shape for path, form in forms.items()}
    left = trained_whole(config, adapters)  # which are over any base what they are
    own = {path: of for path, of in adapters.items() if path not in left}
    sites = {path: site_by_arrays(config, path, of, shapes.get(path), what) for path, of in own.items()}
    made, _ = doubled(config, sites)
    joined = {path: less(site, adapters[path], start.adapters[path]) for path, site in sites.items()}
    return made, {path: joined.get(path, of) for path, of in adapters.items()}


def described(about: Mapping[str, Any], start: Start | None) -> dict[str, Any]:
    """Return what `describe` gave for a changed base as it is for the base as it was, with the start beside it.

    Raises:
      ValueError: the base is not changed.
    """
    if start is None:
        return {**about, "start": {}}
    if about["base"] == start.base:
        raise ValueError(
            f"the base is as it was before the start {start.name}, and the adapters belong to the changed one: give "
            "that, which the start returned, or `starts.changed(lora, params, start.adapters)`"
        )
    # The changed one follows from both, to the bit only where the devices are the same: what it is is not compared.
    told = {"name": start.name, **checksums({"adapters": start.adapters})}
    return {**about, "base": dict(start.base), "start": told}
