"""What a run shows: a progress bar, and lines that stay."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

from rslora_jax.terminal import bar_console, printable, start_bar
from rslora_jax.train.metrics import perplexity
from rslora_jax.train.writers import Record, RunInfo

_LONG = 2.0  # seconds of an evaluation after which its progress is shown
_T = TypeVar("_T")


def clock(seconds: float) -> str:
    """Write a duration.

    >>> clock(75), clock(3700)
    ('1:15', '1:01:40')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _numbers(record: Record, left: float | None) -> str:
    """Write one step's numbers as the bar shows them."""
    time_left = "" if left is None else f"  {clock(left)} left"
    use = f"  {record['mfu']:.0%} MFU" if "mfu" in record else ""
    return (
        f"loss {record['loss']:.3f}  ppl {perplexity(record['loss']):.1f}  grad {record['grad_norm']:.2f}  "
        f"{record['tokens_per_second']:.0f} tok/s{use}{time_left}"
    )


class Display:
    """Show a progress bar on a terminal, some plain lines elsewhere, or nothing.

    Raises:
      ImportError: something is to be shown, and rich is not installed.
    """

    def __init__(self, steps: int, show: bool = True, every: float = 15.0):
        self.steps, self.every, self.said = steps, every, time.monotonic()
        self.seconds: list[float] = []
        self.show = show
        if not show:
            return
        try:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        except ImportError as error:
            raise ImportError("progress needs rich: pip install 'rslora_jax[train]', or give show=False") from error
        self.console = bar_console(highlight=False, soft_wrap=True)
        self.bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}", markup=False),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("compiling", total=steps)

    def line(self, text: str) -> None:
        """Print a line that stays."""
        if self.show:
            self.console.print(printable(text) if self.console.is_terminal else text, markup=False)

    def scoring(self, batches: Iterable[_T], wait: Callable[[], object]) -> Iterator[_T]:
        """Give held-out batches one by one, and show how many are left of those that take long.

        `wait` waits for those that were given before the last one: without it what is only begun would count as done.
        """
        total, begun = len(batches) if isinstance(batches, Sized) else 0, time.monotonic()
        for done, batch in enumerate(batches):
            wait()
            if done and total and self.show and (seconds := time.monotonic() - begun) > _LONG:
                text = f"held-out batch {done}/{total}  {clock(seconds / done * (total - done))} left"
                self.bar.update(self.task, description=text)
                if not self.console.is_terminal and time.monotonic() - self.said >= self.every:
                    self.said = time.monotonic()
                    self.line(text)
            yield batch

    @contextlib.contextmanager
    def running(self, run: RunInfo) -> Iterator[Callable[[Record], None]]:
        """Show a run's records as they come: steps on the bar, evaluations as lines."""
        if not self.show:
            yield _ignore
            return
        self.bar.update(self.task, completed=run.start)
        start_bar(self.bar)
        try:
            yield self._update
        finally:
            self.bar.stop()

    def _update(self, record: Record) -> None:
        if "heldout_loss" in record:
            loss = record["heldout_loss"]
            self.line(f"step {record['step']}: held-out perplexity {perplexity(loss):.2f} (loss {loss:.4f})")
        if "loss" not in record:
            return
        self.seconds = [*self.seconds[-19:], record["seconds"]]
        # The first step's time is mostly compilation.
        steady = self.seconds[1:] if len(self.seconds) < 20 else self.seconds
        left = sum(steady) / len(steady) * (self.steps - record["step"]) if steady else None
        text = _numbers(record, left)
        self.bar.update(self.task, completed=record["step"], description=text)
        due = time.monotonic() - self.said >= self.every or record["step"] == self.steps
        if not self.console.is_terminal and due:
            self.said = time.monotonic()
            self.line(f"step {record['step']}/{self.steps}  {text}")


def _ignore(record: Record) -> None:
    """Show nothing."""
