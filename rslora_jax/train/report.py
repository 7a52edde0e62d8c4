"""What a run shows and writes beside its checkpoints: metrics, curves, a progress bar."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]  # one line of metrics.jsonl: "step" and its numbers


def perplexity(loss: float) -> float:
    """Return exp(loss), infinite where it overflows.

    >>> perplexity(0.0), perplexity(1e6)
    (1.0, inf)
    """
    return math.exp(loss) if loss < 700 else (loss if math.isnan(loss) else math.inf)


def read_metrics(path: Path, until: int) -> list[Record]:
    """Read the lines of a metrics file up to a step; a line that a crash cut short ends it."""
    records: list[Record] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break
            if record["step"] <= until:
                records.append(record)
    return records


@contextlib.contextmanager
def metrics_file(path: Path, records: Sequence[Record], say: Callable[[str], Any]) -> Iterator[Any]:
    """Open a metrics file that starts with `records`; give a function that appends one and flushes it.

    A full disk does not end a run: it is said once, and what cannot be written is left out.
    """
    line = lambda record: json.dumps({k: strict(v) for k, v in record.items()}) + "\n"
    # Written apart and moved: a crash in between loses no line.
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(map(line, records)), encoding="utf-8")
    draft.replace(path)
    said = False
    file = path.open("a", encoding="utf-8")

    def append(record: Record) -> None:
        nonlocal said
        try:
            file.write(line(record))
            file.flush()
        except OSError as error:
            if not said:
                say(f"{path} cannot be written ({error.strerror}): training goes on without it")
            said = True

    try:
        yield append
    finally:
        with contextlib.suppress(OSError):  # of the lines that could not be written, told above
            file.close()


def strict(value: Any) -> Any:
    """Write numbers that JSON has no name for as text.

    >>> strict(float("nan")), strict(1.5)
    ('nan', 1.5)
    """
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def plot(records: Sequence[Record], path: Path, title: str) -> None:
    """Draw the loss of every step, its running mean and the held-out loss over the steps, as a PNG.

    Raises:
      ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot: no global state, no display
    except ImportError as error:
        raise ImportError("a picture of the loss needs matplotlib: pip install 'rslora_jax[train]'") from error

    train = [(r["step"], r["loss"]) for r in records if isinstance(r.get("loss"), float)]
    held = [(r["step"], r["heldout_loss"]) for r in records if isinstance(r.get("heldout_loss"), float)]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="C0", alpha=0.3, linewidth=1, label="training, each step")
        axes.plot(steps, running_mean(losses), color="C0", linewidth=2, label="training, running mean")
    if held:
        steps, losses = zip(*held, strict=True)
        axes.plot(steps, losses, "o-", color="C1", linewidth=2, label="held-out")
        for at in {0, len(held) - 1}:
            label = f"perplexity {perplexity(losses[at]):.1f}"
            side = "left" if at == 0 else "right"
            axes.annotate(label, held[at], xytext=(0, 8), textcoords="offset points", ha=side)
    axes.set(xlabel="step", ylabel="loss per token (nats)", title=title)
    axes.margins(y=0.12)
    axes.grid(alpha=0.3)
    if train or held:
        axes.legend()
    figure.savefig(path, dpi=150)


def running_mean(values: Sequence[float]) -> list[float]:
    """Smooth a series: an exponential mean that forgets over a tenth of it, without the bias of its start.

    >>> running_mean([2.0, 2.0])
    [2.0, 2.0]
    """
    decay = 1 - 1 / max(len(values) / 10, 1)
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        means.append(total / weight)
    return means


def clock(seconds: float) -> str:
    """Write a duration.

    >>> clock(75), clock(3700)
    ('1:15', '1:01:40')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def numbers(record: Record, steps: int, left: float | None) -> str:
    """Write one step's numbers as the bar shows them."""
    time_left = "" if left is None else f"  {clock(left)} left"
    use = f"  {record['mfu']:.0%} MFU" if "mfu" in record else ""
    return (
        f"loss {record['loss']:.3f}  ppl {perplexity(record['loss']):.1f}  grad {record['grad_norm']:.2f}  "
        f"{record['tokens_per_second']:.0f} tok/s{use}{time_left}"
    )


class Display:
    """A progress bar on a terminal, some plain lines elsewhere, or nothing.

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
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        except ImportError as error:
            raise ImportError("progress needs rich: pip install 'rslora_jax[train]', or give show=False") from error
        self.console = Console(highlight=False, soft_wrap=True)
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
            self.console.print(text, markup=False)

    def update(self, record: Record) -> None:
        """Show one step."""
        if not self.show:
            return
        self.seconds = [*self.seconds[-19:], record["seconds"]]
        # The first step's time is mostly compilation.
        steady = self.seconds[1:] if len(self.seconds) < 20 else self.seconds
        left = sum(steady) / len(steady) * (self.steps - record["step"]) if steady else None
        text = numbers(record, self.steps, left)
        self.bar.update(self.task, completed=record["step"], description=text)
        due = time.monotonic() - self.said >= self.every or record["step"] == self.steps
        if not self.console.is_terminal and due:
            self.said = time.monotonic()
            self.line(f"step {record['step']}/{self.steps}  {text}")

    @contextlib.contextmanager
    def running(self, start: int) -> Iterator[None]:
        """Show the bar, from a step on."""
        if not self.show:
            yield
            return
        self.bar.update(self.task, completed=start)
        with self.bar:
            yield


def progress_line(what: str, after: float = 2.0) -> Callable[[int, int], None]:
    """Return `progress(done, total)`, which shows a bar with the time left for what takes more than some seconds."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console()
    # Elsewhere than on a terminal, a bar that goes away leaves an empty line.
    begun, bar = time.monotonic(), Progress(console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(what, total=None)

    def progress(done: int, total: int) -> None:
        if done < total and time.monotonic() - begun > after:
            bar.start()
            bar.update(task, completed=done, total=total)
        if done == total:
            bar.stop()

    return progress
