"""What writes down a run: files, a display, or a service of the user's own, all of one small protocol."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rslora_jax.config import LoraConfig

Record = dict[str, Any]  # "step" and its numbers: one line of metrics.jsonl


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """Tell a writer of a run that begins or goes on.

    Attributes:
      folder: where the run writes.
      start: the step that it goes on from; 0 for one that is new.
      steps: how many are to be done at its end.
      records: those of the run until `start`.
      config: of the adapters.
      settings: as `fit` was given them.
      say: shows a line of text.
    """

    folder: Path
    start: int
    steps: int
    records: Sequence[Record]
    config: LoraConfig
    settings: Mapping[str, Any]
    say: Callable[[str], None] = print


# A writer is entered when the run starts, gives a function that takes each record, and is left when the run ends, also
# by an error: `with writer(run) as record: record({"step": 1, "loss": 2.5})`.
Writer = Callable[[RunInfo], contextlib.AbstractContextManager[Callable[[Record], Any]]]


@contextlib.contextmanager
def open_writers(run: RunInfo, writers: Sequence[Writer]) -> Iterator[Callable[[Record], None]]:
    """Start writers; give a function that hands each a record. At the end they are closed, the last one first.

    >>> @contextlib.contextmanager
    ... def printed(run):
    ...     print(f"from step {run.start}")
    ...     yield print
    ...     print("end")
    >>> with open_writers(RunInfo(Path("run"), 3, 9, (), LoraConfig(rank=2, alpha=3), {}), [printed]) as record:
    ...     record({"step": 4, "loss": 2.5})
    from step 3
    {'step': 4, 'loss': 2.5}
    end
    """
    with contextlib.ExitStack() as stack:
        takers = [stack.enter_context(writer(run)) for writer in writers]

        def record(entry: Record) -> None:
            for take in takers:
                take(dict(entry))

        yield record
