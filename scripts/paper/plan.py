"""Which trials a rank sweep is made of, and in which order: the most telling comparison first."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

# gamma as a function of the rank, over alpha. Beside those of the library: the other exponents of appendix B.6, and a
# scale of one with A drawn smaller by 1/sqrt(r) in its place, of B.3.
INIT_ONLY = "init-only"
GAMMAS: Mapping[str, Any] = {
    "rslora": "rslora",
    "lora": "lora",
    "constant": "constant",
    "quarter": lambda rank: rank**-0.25,
    "square": lambda rank: rank**-2.0,
    INIT_ONLY: "constant",
}


@dataclasses.dataclass(frozen=True)
class Spec:
    """One trial of the sweep; `rate` None stands for the best one of the first seed, once that is known."""

    optimizer: str
    rank: int
    scaling: str
    rate: float | None
    seed: int

    @property
    def name(self) -> str:
        return f"{self.optimizer}-r{self.rank}-{self.scaling}-lr{self.rate:g}-seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Grid:
    """All that is asked for. `rates` are by optimiser, in rising order."""

    optimizers: Sequence[str]
    ranks: Sequence[int]
    scalings: Sequence[str]
    rates: Mapping[str, Sequence[float]]
    seeds: int

    def middle(self, optimizer: str) -> float:
        """The rate at which ranks and scalings are compared in the figures: one for all, as in the paper."""
        rates = self.rates[optimizer]
        return rates[(len(rates) - 1) // 2]

    def specs(self) -> list[Spec]:
        """Return all trials in their order.

        First one seed at the middle rate for every rank and scaling, the likeliest to be compared; then the other
        rates of that seed, which the table needs; then the other seeds, at the middle rate and at the best one.

        >>> grid = Grid(["sgd"], [4], ["rslora", "lora"], {"sgd": [1e-2, 1e-1, 1.0]}, seeds=2)
        >>> for spec in grid.specs():
        ...     if spec.scaling == "lora":
        ...         print(spec.rate, spec.seed)
        0.1 0
        0.01 0
        1.0 0
        0.1 1
        None 1
        """

        def of(rates: Any, seeds: Sequence[int]) -> list[Spec]:
            cells = itertools.product(seeds, self.optimizers, self.ranks)
            return [
                Spec(o, rank, scaling, rate, seed)
                for seed, o, rank in cells
                for rate in rates(o)
                for scaling in self.scalings
            ]

        def others(o):
            return [rate for rate in self.rates[o] if rate != self.middle(o)]

        more = range(1, self.seeds)
        return of(lambda o: [self.middle(o)], [0]) + of(others, [0]) + of(lambda o: [self.middle(o), None], more)

    def best(self, done: Mapping[Spec, Any], optimizer: str, rank: int, scaling: str) -> float | None:
        """Return the rate of the least held-out loss of the first seed, of those done; None where none is."""
        found = {}
        for rate in self.rates[optimizer]:
            trial = done.get(Spec(optimizer, rank, scaling, rate, 0))
            if trial and trial["diverged"] is None and math.isfinite(trial["heldout_loss"]):
                found[rate] = trial["heldout_loss"]
        return min(found, key=found.__getitem__) if found else None

    def left(self, done: Mapping[Spec, Any]) -> list[Spec]:
        """Return the trials that are still to do, in order; a best rate that is not known yet stays None."""

        def settled(spec: Spec) -> Spec | None:
            if spec.rate is not None:
                return spec
            firsts = [Spec(spec.optimizer, spec.rank, spec.scaling, rate, 0) for rate in self.rates[spec.optimizer]]
            if not all(first in done for first in firsts):
                return spec
            best = self.best(done, spec.optimizer, spec.rank, spec.scaling)
            return None if best is None else dataclasses.replace(spec, rate=best)

        found = dict.fromkeys(settled(spec) for spec in self.specs())
        return [spec for spec in found if spec is not None and spec not in done]

    def next_unit(self, done: Mapping[Spec, Any], together: int) -> list[Spec]:
        """Return the next trials that go in one program: of one optimiser and rank, at most so many."""
        ready = [spec for spec in self.left(done) if spec.rate is not None]
        if not ready:
            return []

        # What starts otherwise is another program.
        def kind(spec):
            return (spec.optimizer, spec.rank, spec.scaling == INIT_ONLY)

        same = [spec for spec in ready if kind(spec) == kind(ready[0])]
        # Another round of the same rank is not to overtake the first one of the others.
        run = list(itertools.takewhile(lambda spec: spec in same, ready))
        return run[:together]
