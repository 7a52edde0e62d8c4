"""TensorBoard event files of a run's metrics, through tensorboardX (extra `tensorboard`)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rslora_jax.train.writers import Record, RunInfo

_SPEED = ("seconds", "tokens_per_second", "tflops", "mfu")


@contextlib.contextmanager
def event_file(folder: str | Path, start: int = 0) -> Iterator[Callable[[Record], None]]:
    """Open a new event file in a folder; give a function that appends a record of metrics to it.

    Each number of a record is a scalar at the record's "step". What describes the training data is under "train/", the
    held-out data ("heldout_loss") under "heldout/", and time under "speed/". Events reach the file within seconds, the
    last when it is closed.

    Args:
      folder: where to write, such as that of the run; `tensorboard --logdir` takes it.
      start: the step that the run goes on from. TensorBoard no longer shows what was written of later steps before;
        of a run that starts at 0, nothing.

    Raises:
      ImportError: tensorboardX is not installed.

    >>> import tempfile
    >>> with event_file(tempfile.mkdtemp()) as append:
    ...     append({"step": 1, "loss": 2.5, "heldout_loss": 2.25, "tokens_per_second": 1000.0})
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError("event files need tensorboardX: pip install 'rslora_jax[tensorboard]'") from error

    # TensorBoard drops the events of this step and after: a resumed run's first record is of the step after `start`.
    purge = start + 1 if start else 0
    # tensorboardX names files by the second, and would write over that of a run that ended within it.
    suffix = f".{time.time_ns()}"
    with SummaryWriter(str(folder), purge_step=purge, flush_secs=5, filename_suffix=suffix) as writer:

        def append(record: Record) -> None:
            for name, value in record.items():
                if name != "step" and _is_number(value):
                    writer.add_scalar(_tag(name), float(value), record["step"])

        yield append


def event_files(run: RunInfo) -> contextlib.AbstractContextManager[Callable[[Record], None]]:
    """Write a run's event files into its folder."""
    return event_file(run.folder, run.start)


def _tag(name: str) -> str:
    """Return the tag of a metric.

    >>> _tag("loss"), _tag("heldout_loss"), _tag("tokens_per_second")
    ('train/loss', 'heldout/loss', 'speed/tokens_per_second')
    """
    if name.startswith("heldout_"):
        return "heldout/" + name.removeprefix("heldout_")
    return f"speed/{name}" if name in _SPEED else f"train/{name}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
