"""A run's numbers as lines of JSON, a line for each step and each evaluation."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rslora_jax.train.writers import Record, RunInfo


def perplexity(loss: float) -> float:
    """Return exp(loss), infinite where it overflows.

    >>> perplexity(0.0), perplexity(1e6)
    (1.0, inf)
    """
    return math.exp(loss) if loss < 700 else (loss if math.isnan(loss) else math.inf)


def of_one_set(records: Sequence[Record]) -> Sequence[Record]:
    """Return the records since the held-out set was last changed: losses on two sets are not to be compared.

    >>> of_one_set([{"step": 0, "heldout_loss": 1.0}, {"step": 4, "new_heldout": True}, {"step": 5, "loss": 3.0}])
    [{'step': 4, 'new_heldout': True}, {'step': 5, 'loss': 3.0}]
    """
    return records[max((n for n, record in enumerate(records) if record.get("new_heldout")), default=0) :]


def read_metrics(path: Path, until: int) -> list[Record]:
    """Read the lines of a metrics file up to a step; a line that a crash cut short, or that is none, ends it."""
    records: list[Record] = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError):
            break
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            break
        if record["step"] <= until:
            records.append(record)
    return records


@contextlib.contextmanager
def metrics_file(run: RunInfo) -> Iterator[Callable[[Record], None]]:
    """Write `metrics.jsonl`, which begins with the records of the run that goes on; each line is flushed.

    A full disk does not end a run: it is said once, and what cannot be written is left out.
    """
    path, say_once = run.folder / "metrics.jsonl", functools.cache(run.say)
    # Written apart and moved: a crash in between loses no line.
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(map(_line, run.records)), encoding="utf-8")
    draft.replace(path)
    file = path.open("a", encoding="utf-8")

    def append(record: Record) -> None:
        try:
            file.write(_line(record))
            file.flush()
        except OSError as error:
            say_once(f"{path} cannot be written ({error.strerror}): training goes on without it")

    try:
        yield append
    finally:
        with contextlib.suppress(OSError):  # of the lines that could not be written, told above
            file.close()


def _line(record: Record) -> str:
    return json.dumps({name: _strict(value) for name, value in record.items()}) + "\n"


def _strict(value: Any) -> Any:
    """Write numbers that JSON has no name for as text.

    >>> _strict(float("nan")), _strict(1.5)
    ('nan', 1.5)
    """
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
