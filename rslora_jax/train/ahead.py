"""Steps that are begun before it is known how those before them went, so that a device need not wait for its host."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from typing import NamedTuple

import jax

from rslora_jax.train.batch_stream import REMEMBERED
from rslora_jax.train.flops import peak_flops
from rslora_jax.train.metrics import perplexity
from rslora_jax.train.speed import Stopwatch, speed
from rslora_jax.train.writers import Record

_SECONDS = 0.2  # a host is rarely held up for longer: garbage is collected, a line is written to a slow disk
_MOST = REMEMBERED - 4


class Ended(NamedTuple):
    """Tell of a step that is done: which it is, its batch's tokens (0 where that is not known), metrics, seconds."""

    number: int
    size: int
    metrics: Mapping[str, float]
    seconds: float

    def record(self, flops: int | None) -> Record:
        """Return what is recorded of it, where a step takes so many FLOPs; tokens a second count those without loss."""
        loss, tokens = self.metrics["loss"], self.metrics["tokens"]
        return {
            "step": self.number,
            "loss": loss,
            "perplexity": perplexity(loss),
            "grad_norm": self.metrics["grad_norm"],
            "tokens": int(tokens),
            "seconds": round(self.seconds, 4),
            "tokens_per_second": round((self.size or tokens) / max(self.seconds, 1e-9), 1),
            **speed(flops, self.seconds, peak_flops(jax.devices()[0])),
        }


def steps_ahead(seconds: float) -> int:
    """Return how many steps of so many seconds may be begun and not yet looked at.

    A long step is waited for with one more begun: so little is lost at Ctrl-C, or after a loss that is not finite.

    >>> steps_ahead(60.0), steps_ahead(0.15), steps_ahead(0.02), steps_ahead(0.0)
    (1, 1, 10, 16)
    """
    return max(1, min(_MOST, round(_SECONDS / max(seconds, 1e-6))))


class Ahead:
    """Hold the steps that are begun and not yet recorded, oldest first.

    Args:
      alone: whether one step more than the one that is waited for is all that is begun ahead. Processes that work
        together must begin the same steps, and each has a clock of its own.
    """

    def __init__(self, alone: bool = False):
        self.watch = Stopwatch()
        self._begun: collections.deque[tuple[int, int, Future[tuple[float, dict[str, float]]]]] = collections.deque()
        self._last: collections.deque[float] = collections.deque(maxlen=2)
        self._alone = alone

    def begin(self, number: int, size: int, metrics: Mapping[str, jax.Array]) -> None:
        """Take a step that was begun; nothing is waited for."""
        self._begun.append((number, size, self.watch.begun(metrics)))

    def ended(self, everything: bool = False) -> Iterator[Ended]:
        """Give steps, and wait for them, until no more are under way than may be; or all of them."""
        while len(self._begun) > (0 if everything else self._may_be()):
            number, size, end = self._begun.popleft()
            seconds, metrics = self.watch.seconds(end)
            self._last.append(seconds)
            yield Ended(number, size, metrics, seconds)

    def _may_be(self) -> int:
        """Return how many; of two steps the longer one counts, for a clock that was read late makes the next short."""
        return 1 if self._alone or not self._last else steps_ahead(max(self._last))
