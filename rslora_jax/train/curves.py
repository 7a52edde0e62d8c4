"""The loss over a run's steps, as a picture."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rslora_jax.train.metrics import perplexity
from rslora_jax.train.writers import Record, RunInfo


@contextlib.contextmanager
def loss_picture(run: RunInfo) -> Iterator[Callable[[Record], None]]:
    """Draw `loss.png` when a run ends; where that cannot be, say so."""
    records = list(run.records)
    try:
        yield records.append
    finally:
        try:
            _plot(records, run.folder / "loss.png", f"{run.folder.name}: rank {run.config.rank}, {run.config.scaling}")
        except OSError:  # of a full disk, told by what writes before
            pass
        except ImportError as error:
            run.say(f"there is no loss.png: {error}")


def _plot(records: Sequence[Record], path: Path, title: str) -> None:
    """Draw the loss of every step, its running mean and the held-out loss over the steps, as a PNG.

    Raises:
      ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot: no global state, no display
    except ImportError as error:
        raise ImportError("a picture of the loss needs matplotlib: pip install 'rslora_jax[train]'") from error

    train = [(r["step"], r["loss"]) for r in records if isinstance(r.get("loss"), float)]
    # A curve for each held-out set, where it was changed.
    starts = [0, *(n for n, r in enumerate(records) if r.get("new_heldout")), len(records)]
    sets = [records[start:end] for start, end in itertools.pairwise(starts)]
    curves = [[(r["step"], r["heldout_loss"]) for r in one if isinstance(r.get("heldout_loss"), float)] for one in sets]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="C0", alpha=0.3, linewidth=1, label="training, each step")
        axes.plot(steps, running_mean(losses), color="C0", linewidth=2, label="training, running mean")
    for number, held in enumerate(filter(None, curves)):
        steps, losses = zip(*held, strict=True)
        label = f"held-out, set {number + 1}" if number else "held-out"
        axes.plot(steps, losses, "o-", color=f"C{number + 1}", linewidth=2, label=label)
        for at in {0, len(held) - 1}:
            label = f"perplexity {perplexity(losses[at]):.1f}"
            side = "left" if at == 0 else "right"
            axes.annotate(label, held[at], xytext=(0, 8), textcoords="offset points", ha=side)
    axes.set(xlabel="step", ylabel="loss per token (nats)")
    axes.set_title(title, parse_math=False)  # a folder may have any name
    axes.margins(y=0.12)
    axes.grid(alpha=0.3)
    if train or any(curves):
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
