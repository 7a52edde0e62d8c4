"""Starts by name, as commands and files name them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from jax import Array

from rslora_jax.adapters import Adapters
from rslora_jax.pytrees import Params
from rslora_jax.starts.eva import eva
from rslora_jax.starts.loftq import loftq
from rslora_jax.starts.lora_ga import lora_ga
from rslora_jax.starts.olora import olora
from rslora_jax.starts.orthogonal import orthogonal
from rslora_jax.starts.pissa import pissa
from rslora_jax.starts.stream import Progress, unseen
from rslora_jax.wrap import Lora


class Named(NamedTuple):
    """A start by its name.

    Attributes:
      begin: the function.
      changes: whether it changes the base, to what a run's folder has to keep.
      data: whether it needs batches of data, and their loss.
      rounds: whether it puts the base into a format of few bits.
    """

    begin: Callable[..., tuple[Params, Adapters]]
    changes: bool
    data: bool = False
    rounds: bool = False


_STARTS = {
    "pissa": Named(pissa, changes=True),
    "olora": Named(olora, changes=True),
    "orthogonal": Named(orthogonal, changes=False),
    "eva": Named(eva, changes=False, data=True),
    "loftq": Named(loftq, changes=False, rounds=True),
    "lora-ga": Named(lora_ga, changes=True, data=True),
}


def named(text: str) -> tuple[Named, dict[str, Any]]:
    """Return the start of a name, and its options: "pissa:16" is `pissa` with `niter=16`.

    "loftq:5" is `loftq` with `steps=5`. Of "eva:2", whose ranks are shared out by `eva_config` with rho=2, that is the
    option.

    Raises:
      ValueError: there is none of this name; it says which there are.

    >>> named("pissa:16")[1], named("eva:1.5")[1], named("olora")[0].changes
    ({'niter': 16}, {'rho': 1.5}, True)
    """
    # PEFT's names say the same.
    name, _, option = text.replace("_niter_", ":").replace("_", "-").partition(":")
    if name not in _STARTS:
        close = difflib.get_close_matches(name, _STARTS, n=1)
        raise ValueError(
            f"start {text!r} is not known: " + (f"did you mean {close[0]}?" if close else f"use {', '.join(_STARTS)}")
        )
    return _STARTS[name], _option(text, name, option) if option else {}


def _option(text: str, name: str, option: str) -> dict[str, Any]:
    """Read what stands behind a start's name."""
    if name == "pissa" and option.isdigit():
        return {"niter": int(option)}
    if name == "eva" and re.fullmatch(r"\d+(\.\d+)?", option) and float(option) >= 1:
        return {"rho": float(option)}
    if name == "loftq" and option.isdigit() and int(option):
        return {"steps": int(option)}
    raise ValueError(
        f"start {text!r}: {option!r} is no option of {name}: pissa takes a number of iterations, as in pissa:16, loftq "
        "a number of turns, as in loftq:5, and eva how much a rank may grow, as in eva:2"
    )


def begin(
    text: str,
    lora: Lora,
    params: Params,
    key: Array,
    *,
    loss: Callable[..., Any] | None = None,
    batches: Iterable[Any] | None = None,
    format: str = "nf4",
    progress: Progress = unseen,
) -> tuple[Params, Adapters]:
    """Return (params, adapters) of the start of a name.

    Args:
      text: such as "pissa:16"; of "eva:2", `lora` is to have the ranks that `eva_config` gives.
      lora, params, key: as of the starts.
      loss, batches: for those that look at data.
      format: for those that put the base into few bits.
      progress: told what is done, and how much there is in all.

    Raises:
      ValueError: there is none of this name, or it needs data and there are none.
    """
    found, options = named(text)
    if found.rounds:
        options = {**options, "format": format}
    if not found.data:
        return found.begin(lora, params, key, progress=progress, **options)
    if loss is None or batches is None:
        raise ValueError(f"the start {text} looks at data: give batches of them, and the loss that takes one")
    return found.begin(lora, params, key, loss=loss, batches=batches, progress=progress)
