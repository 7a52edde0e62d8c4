"""Finished trials: a JSON lines file with their curves, which a sweep can go on from, and a CSV without."""

import csv
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from paper.plan import Spec
from rslora_jax.train.sweep import Outcome

COLUMNS = (
    "optimizer",
    "rank",
    "scaling",
    "learning_rate",
    "seed",
    "steps",
    "train_loss",
    "heldout_loss",
    "heldout_error",
    "diverged",
    "first_factor_norm",
    "mean_factor_norm",
    "seconds",
)


def begin(file: Path, settings: Mapping[str, Any], start: Path | None = None) -> None:
    """Begin a file of trials with what they all have in common, or see that it is the same as in the file.

    Where there is no file yet, its trials are those of `start`.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    source = file if file.exists() else start
    if source is None:
        return write(file, json.dumps({"settings": dict(settings)}) + "\n")
    before = read_settings(source)
    for name in settings:
        if before.get(name) != settings[name]:
            raise ValueError(
                f"{source} has trials of {name} {before.get(name)}, and now it is {settings[name]}: give another --out"
            )
    if source is not file:
        write(file, source.read_text(encoding="utf-8"))


def read_settings(file: Path) -> dict[str, Any]:
    """Read what all trials of a file have in common: its first line."""
    with file.open(encoding="utf-8") as opened:
        try:
            settings = json.loads(opened.readline())["settings"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file} is not the trials.jsonl of a sweep: its first line has no settings") from None
    return dict(settings)


def save(file: Path, spec: Spec, outcome: Outcome, seconds: float) -> None:
    """Keep a finished trial. Curves have five digits: the file is to be small enough to be kept in a repository."""
    steps = len(outcome.losses)
    held = outcome.heldout[steps]

    def rounded(curve):
        return [float(f"{value:.5g}") for value in curve]

    trial = {
        "optimizer": spec.optimizer,
        "rank": spec.rank,
        "scaling": spec.scaling,
        "learning_rate": spec.rate,
        "seed": spec.seed,
        "steps": steps,
        "train_loss": float(np.mean(outcome.losses[-max(1, steps // 10) :])),
        "heldout_loss": held.loss,
        "heldout_error": held.error,
        "diverged": outcome.diverged,
        "seconds": round(seconds, 2),
        "losses": rounded(outcome.losses),
        "grad_norms": rounded(outcome.grad_norms),
        "factor_norms": rounded(outcome.factor_norms),
    }
    write(file, file.read_text(encoding="utf-8") + json.dumps(trial) + "\n")


def load(file: Path) -> dict[Spec, dict[str, Any]]:
    """Read the finished trials."""
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines()[1:]:
        trial = json.loads(line)
        norms = trial["factor_norms"]
        trial |= {"first_factor_norm": norms[0], "mean_factor_norm": float(np.mean(norms))}
        spec = Spec(trial["optimizer"], trial["rank"], trial["scaling"], trial["learning_rate"], trial["seed"])
        found[spec] = trial
    return found


def write_csv(file: Path, done: Mapping[Spec, Mapping[str, Any]]) -> None:
    """Write a line for each trial, without the curves."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(done[spec] for spec in sorted(done, key=lambda s: (s.optimizer, s.rank, s.scaling, s.rate, s.seed)))
    write(file, text.getvalue())


def write(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    draft = file.with_suffix(".tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(file)


def common_seeds(losses: Mapping[int, Mapping[int, float]]) -> list[int]:
    """Return the seeds that all ranks have: a seed has its own batches, and so its own loss.

    >>> common_seeds({4: {0: 1.0, 1: 3.0}, 8: {1: 5.0}})
    [1]
    """
    return sorted(set.intersection(*map(set, losses.values()))) if losses else []


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Return the mean and its standard error, NaN for less than two values.

    >>> mean_and_error([1.0, 3.0])
    (2.0, 1.0)
    """
    return float(np.mean(values)), float(scipy.stats.sem(values)) if len(values) > 1 else math.nan
