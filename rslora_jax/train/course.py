"""What decides a run's course beside its config and its base, as plain values to keep, and what of it differs."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
from collections.abc import Collection, Mapping
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
import optax

from rslora_jax.train.batch_stream import lay_out, words

NAMES = ("data", "heldout", "accumulate", "optimizer")


def describe(optimizer: optax.GradientTransformation, accumulate: int, heldout: str | None) -> dict[str, Any]:
    """Return what a checkpoint keeps of a run's course; its data tell of themselves by their first batch.

    Args:
      optimizer: its numbers and words are kept (`hyperparameters`).
      accumulate: in how many parts a batch is taken.
      heldout: of `digest`.
    """
    numbers = _hyperparameters(optimizer)
    return {"accumulate": accumulate, "heldout": heldout, "optimizer": numbers, "optax": version("optax")}


def digest(batches: Any, sharding: jax.sharding.Sharding | None) -> str | None:
    """Return a checksum of all batches, in their order; None where there are none.

    >>> digest([{"x": np.ones((2, 3), "f4")}], None) == digest([{"x": np.zeros((2, 3), "f4")}], None)
    False
    """
    if batches is None:
        return None
    every = hashlib.sha256()
    for batch in batches:
        every.update(json.dumps(words(lay_out(batch, sharding))).encode())
    return every.hexdigest()


def _hyperparameters(optimizer: optax.GradientTransformation) -> dict[str, Any]:
    """Return the numbers and words that an optimiser was made with, by the function that has them and their name there.

    optax's optimisers are functions within functions; what these hold is read. Arrays and keys are left out.

    >>> found = _hyperparameters(optax.adam(optax.constant_schedule(0.25), b1=0.5))
    >>> found["scale_by_adam.b1"], found["constant_schedule.value"]
    (0.5, 0.25)
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()

    def walk(name: str, value: Any) -> None:
        if isinstance(value, np.generic):
            value = value.item()
        elif isinstance(value, np.dtype | type):
            value = getattr(value, "name", None) or getattr(value, "__name__", "")
        if value is None or isinstance(value, bool | int | float | str):
            kept = value if not isinstance(value, float) or math.isfinite(value) else str(value)
            found[_free(name, found)] = kept
        elif id(value) not in seen:
            seen.add(id(value))
            for inner, held in _held(name, value):
                walk(inner, held)

    walk("", optimizer.update)
    return found


def _free(name: str, taken: Collection[str]) -> str:
    """Return a name that is not taken: with a number behind it, where need be."""
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name} ({number})"
    return free


def _held(name: str, value: Any) -> list[tuple[str, Any]]:
    """Return what a function, or a container, holds, by name."""
    if isinstance(value, functools.partial):
        return [(name, value.func), *((name, x) for x in value.args), *_held(name, value.keywords)]
    if isinstance(value, Mapping):
        return [(f"{name}.{key}", held) for key, held in value.items()]
    if isinstance(value, tuple | list):
        return [(name, held) for held in value]
    function = inspect.unwrap(value) if callable(value) else None
    if not inspect.isfunction(function):
        return []
    own = function.__qualname__.split(".")[0]
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    defaults = inspect.signature(function).parameters.values()
    return [
        *((f"{own}.{variable}", cell.cell_contents) for variable, cell in cells if _is_filled(cell)),
        *((f"{own}.{p.name}", p.default) for p in defaults if p.default is not p.empty),
    ]


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, str]:
    """Say, by `NAMES`, in what a run's course differs from the one that was saved; what was not saved does not.

    Args:
      saved, here: of `describe`, with the first batch (`words`) as "data" where it is known.

    >>> saved = {"accumulate": 2, "data": {"x": "int32[4,8] 01"}}
    >>> differences(saved, {"accumulate": 4, "data": {"x": "int32[8,8] 02"}})
    {'data': 'x of a batch is int32[8,8] here, int32[4,8] was saved', 'accumulate': '4 here, 2 was saved'}
    """
    found = {}
    if theirs := saved.get("data"):
        found["data"] = _of_batches(theirs, here.get("data") or {})
    if "heldout" in saved and saved["heldout"] != here["heldout"]:
        kinds = ["other batches" if side["heldout"] else "none" for side in (here, saved)]
        found["heldout"] = f"{kinds[0]} here than were saved" if len({*kinds}) == 1 else f"{kinds[0]} here"
    if "accumulate" in saved and saved["accumulate"] != here["accumulate"]:
        found["accumulate"] = f"{here['accumulate']} here, {saved['accumulate']} was saved"
    # Another optax may name what is in it otherwise.
    if saved.get("optax") == here.get("optax") and "optimizer" in saved:
        found["optimizer"] = _of_numbers(saved["optimizer"], here["optimizer"])
    return {name: said for name, said in found.items() if said}


def _of_batches(saved: Mapping[str, str], here: Mapping[str, str]) -> str:
    for path in {**saved, **here}:
        theirs, ours = (side.get(path, "nothing -").rpartition(" ") for side in (saved, here))
        if theirs[0] != ours[0]:
            return f"{path or 'what there is'} of a batch is {ours[0]} here, {theirs[0]} was saved"
        if theirs != ours:
            return f"the first batch has other values of {path}" if path else "the first batch has other values"
    return ""


def _of_numbers(saved: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    differing = [name for name in {**saved, **here} if saved.get(name, "none") != here.get(name, "none")]
    said = [f"{name} is {here.get(name, 'missing')} here, {saved.get(name, 'missing')} was saved" for name in differing]
    return "; ".join(said[:3]) + (f"; and {len(said) - 3} more" if len(said) > 3 else "")
