"""What a checkpoint tells about itself, in JSON: what its arrays belong to, and checksums of them and of this."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import orbax.checkpoint as ocp

from rslora_jax.config import LoraConfig
from rslora_jax.pytrees import Params
from rslora_jax.shown import quoted, shown
from rslora_jax.store.checksum import checksums, same_form
from rslora_jax.store.damage import Damaged, read_or_say
from rslora_jax.store.folder import steps_in

# What a checkpoint's "about" is told by: 0, or none, before configs named a method; 1 before it had a checksum of its
# own; 2 since; 3 where a start has changed the base, which earlier versions would pass over.
FORMAT = 3


def describe(config: LoraConfig, params: Params, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Say in plain JSON values what adapters belong to: their config, their base, and how they are trained.

    The base is told by the dtype, the shape and a checksum of every array (`checksum.checksums`).

    Raises:
      ValueError: the settings are no plain JSON values.
    """
    try:
        kept = json.loads(json.dumps(dict(settings or {})))
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings are kept with the checkpoints as JSON, and these cannot be: {error}") from error
    return {"config": config.to_dict(), "base": checksums(params), "settings": kept}


def sealed(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is written: the plain JSON values, with the format and a checksum over all of it.

    >>> sealed({"step": 3})
    {'step': 3, 'format': 2, 'checksum': '214f8a1411f54d5a83ee018077749ea16b75eaaa64c7288ce6e21219d5473693'}
    """
    plain = json.loads(json.dumps({**about, "format": FORMAT if about.get("start") else FORMAT - 1}))
    return plain | {"checksum": _checksum(plain)}


def _checksum(about: Mapping[str, Any]) -> str:
    """Return the SHA-256 of all values but the checksum's own, whatever their order."""
    rest = {name: value for name, value in about.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_about(where: Path) -> dict[str, Any]:
    """Read the item "about" of one checkpoint.

    Raises:
      Damaged: it does not hold what was saved.
      ValueError: it cannot be read, or a later version wrote it, in a form that this one does not know.
    """
    about = read_or_say(where / "about", lambda: dict(ocp.JsonCheckpointHandler().restore(where / "about")))
    # First, and in all formats to come: a format that one bit made another is damage.
    from_before = "checksum" not in about and about.get("format", 0) in (0, 1)
    if not from_before and about.get("checksum") != _checksum(about):
        raise Damaged(f"{where / 'about'} is damaged (it is not what was saved)")
    if type(about.get("format", 0)) is not int:
        raise Damaged(f"{where / 'about'} is damaged (format is {quoted(about['format'])})")
    if about.get("format", 0) > FORMAT:
        raise ValueError(
            f"{where} is of format {quoted(about['format'])}, and this version reads up to {FORMAT}: install a newer "
            "rslora_jax"
        )
    about = _checked(where / "about", about)
    # What a config did not have yet, it has by default.
    return about | {"config": LoraConfig().to_dict() | about["config"]} if "config" in about else about


def _checked(where: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint tells, each part of the kind that it is to be: whoever can write may seal anything."""
    about = {"base": {}, "settings": {}, "checksums": {}, "start": {}} | about
    for name in ("config", "base", "settings", "checksums", "start", "keys", "data", "course"):
        if not isinstance(about.get(name, {}), dict):
            raise Damaged(f"{where} is damaged ({name} is {quoted(about[name])})")
    for name in ("base", "checksums", "start", "keys"):
        if not all(isinstance(text, str) for text in about.get(name, {}).values()):
            raise Damaged(f"{where} is damaged ({name} is {quoted(about[name])})")
    if type(loss := about.get("heldout_loss")) not in (int, float, type(None)):
        raise Damaged(f"{where} is damaged (heldout_loss is {quoted(loss)})")
    return about


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
        losses = heldout_losses(folder)
        if not losses:
            raise ValueError(f"{folder} has no checkpoint with a held-out loss: ask for the last")
        step = min(losses.items(), key=lambda item: item[1])[0]
    if not steps or step not in ("last", *steps):
        have = f"it has steps {', '.join(map(str, steps))}" if steps else "it holds none"
        raise ValueError(f"{folder} has no checkpoint{'' if step == 'last' else f' of step {step}'}: {have}")
    return folder / "checkpoints" / str(steps[-1] if step == "last" else step)


def heldout_losses(folder: Path) -> dict[int, float]:
    """Return the held-out loss of every checkpoint that has one on the last one's held-out set, by step."""
    losses, sets = {}, {}
    for step in steps_in(folder):
        with contextlib.suppress(Damaged):
            about = read_about(folder / "checkpoints" / str(step))
            losses[step], sets[step] = about.get("heldout_loss"), about.get("course", {}).get("heldout")
    last = sets[max(sets)] if sets else None
    return {step: loss for step, loss in losses.items() if loss is not None and sets[step] in (None, last)}


def check_same(where: Path, found: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise a ValueError that names what differs in the config or the base."""
    for name, what in (("config", "LoraConfig"), ("base", "base"), ("start", "start")):
        if name not in here or found[name] == here[name]:
            continue
        both = {**found[name], **here[name]}
        differing = [key for key in both if found[name].get(key) != here[name].get(key)]
        first = differing[0]
        theirs, ours = (str(side[name].get(first, "missing")) for side in (found, here))
        if name != "config" and theirs != ours and same_form(theirs, ours):
            said = f"{shown(first)} has other values"
        else:
            said = f"{shown(first)} is {shown(theirs)} there, {shown(ours)} here"
        more = f", and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise ValueError(f"{where} was trained with another {what} ({said}{more}): give it the same one")
