"""A folder of finished trials: one JSON file each, and all of them as a CSV."""

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

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


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write what all trials of a folder have in common, or see that it is the same as before."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "settings.json"
    if not file.exists():
        return write(file, json.dumps(settings, indent=1) + "\n")
    before = json.loads(file.read_text(encoding="utf-8"))
    for name in settings:
        if before.get(name) != settings[name]:
            raise ValueError(
                f"{folder} has trials of {name} {before.get(name)}, and now it is {settings[name]}: give another --out"
            )


def save(folder: Path, spec: Spec, outcome: Outcome, seconds: float) -> None:
    """Keep a finished trial."""
    steps = len(outcome.losses)
    held = outcome.heldout[steps]
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
        "losses": outcome.losses.tolist(),
        "grad_norms": outcome.grad_norms.tolist(),
        "factor_norms": outcome.factor_norms.tolist(),
    }
    (folder / "trials").mkdir(exist_ok=True)
    write(folder / "trials" / f"{spec.name}.json", json.dumps(trial))


def load(folder: Path) -> dict[Spec, dict[str, Any]]:
    """Read the finished trials."""
    found = {}
    for file in sorted((folder / "trials").glob("*.json")):
        trial = json.loads(file.read_text(encoding="utf-8"))
        norms = trial["factor_norms"]
        trial |= {"first_factor_norm": norms[0], "mean_factor_norm": float(np.mean(norms))}
        spec = Spec(trial["optimizer"], trial["rank"], trial["scaling"], trial["learning_rate"], trial["seed"])
        found[spec] = trial
    return found


def write_csv(folder: Path, done: Mapping[Spec, Mapping[str, Any]]) -> None:
    """Write `results.csv`, a line for each trial, without the curves."""
    file = folder / "results.csv.tmp"
    with file.open("w", newline="", encoding="utf-8") as opened:
        table = csv.DictWriter(opened, COLUMNS, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(
            done[spec] for spec in sorted(done, key=lambda s: (s.optimizer, s.rank, s.scaling, s.rate, s.seed))
        )
    file.replace(folder / "results.csv")


def read_csv(file: Path) -> dict[Spec, dict[str, Any]]:
    """Read what `write_csv` wrote, without the curves; nothing where there is no file."""
    if not file.is_file():
        return {}
    found = {}
    with file.open(newline="", encoding="utf-8") as opened:
        for line in csv.DictReader(opened):
            names = {"optimizer", "scaling"}
            trial = {name: text if name in names else float(text or "nan") for name, text in line.items()}
            trial["diverged"] = int(line["diverged"]) if line["diverged"] else None
            spec = Spec(
                trial["optimizer"], int(line["rank"]), trial["scaling"], trial["learning_rate"], int(line["seed"])
            )
            found[spec] = trial
    return found


def write(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    draft = file.with_suffix(".tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(file)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Return the mean and its standard error, NaN for less than two values.

    >>> mean_and_error([1.0, 3.0])
    (2.0, 1.0)
    """
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(np.mean(values)), error
