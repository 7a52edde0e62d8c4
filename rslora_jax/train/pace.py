"""When a run evaluates, saves and ends."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from rslora_jax.train.metrics import of_one_set
from rslora_jax.train.writers import Record


@dataclasses.dataclass(frozen=True)
class Pace:
    """Say when a run evaluates, saves and ends, by the number of steps that are done.

    Attributes:
      steps: how many are to be done at the end.
      eval_every: steps between evaluations; by default there are three in a run.
      save_every: steps between checkpoints; by default a quarter of the run, at most 500.
      patience: the run ends after so many evaluations in a row without a new least held-out loss; None: it does not.
    """

    steps: int
    eval_every: int | None = None
    save_every: int | None = None
    patience: int | None = None

    def looks(self, at: int) -> bool:
        """Say whether the held-out loss is taken after a step.

        >>> [at for at in range(1, 10) if Pace(9, eval_every=4).looks(at)]
        [4, 8, 9]
        """
        return at % (self.eval_every or max(1, math.ceil(self.steps / 3))) == 0 or at == self.steps

    def saves(self, at: int) -> bool:
        """Say whether a checkpoint is due after a step; that of the end is no matter of pace.

        >>> [at for at in range(1, 10) if Pace(9).saves(at)]
        [3, 6, 9]
        """
        return at % (self.save_every or max(1, min(math.ceil(self.steps / 4), 500))) == 0

    def gives_up(self, records: Sequence[Record]) -> bool:
        """Say whether too many evaluations in a row brought no new least held-out loss.

        >>> Pace(9, patience=2).gives_up([{"heldout_loss": loss} for loss in (2.0, 1.0, 1.5, 1.2)])
        True
        """
        return self.patience is not None and since_least(records) >= self.patience


def since_least(records: Sequence[Record]) -> int:
    """Count the evaluations after the one with the least held-out loss.

    >>> since_least([{"heldout_loss": 2.0}, {"loss": 1.0}, {"heldout_loss": 1.5}])
    0
    """
    losses = [r["heldout_loss"] for r in of_one_set(records) if "heldout_loss" in r]
    losses = [loss if isinstance(loss, float) and not math.isnan(loss) else math.inf for loss in losses]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0
