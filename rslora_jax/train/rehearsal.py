"""A run's step and its scoring before there is a run: compiled, and timed on a batch."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sized
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from rslora_jax.pytrees import Params, PyTree
from rslora_jax.train.batch_stream import lay_out
from rslora_jax.train.footprint import Memory, memory_of
from rslora_jax.train.loss import Loss
from rslora_jax.train.state import TrainState, lies, make_step
from rslora_jax.wrap import Lora

_TIMED = 1.0  # seconds in which something is timed, though at least once


class Took(NamedTuple):
    """Hold the seconds that something takes each time, and those that its compilation took."""

    seconds: float
    compiling: float


class Scored(NamedTuple):
    """Say what scoring held-out data takes: the seconds of a batch, its temporary bytes, and how many batches."""

    took: Took
    memory: int
    batches: int


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """Hold what a step is compiled of, and what has been compiled.

    Attributes:
      lora, loss, optimizer: as of `make_step`.
      state: the run's first; a step that is timed takes its memory.
      params: the base.
      batch: the run's first.
      skip: as of `make_step`.
      say: told what is under way.
      made: (the compiled step, its seconds) by the rows of a batch and the parts in which it is taken.
    """

    lora: Lora
    loss: Loss
    optimizer: optax.GradientTransformation
    state: TrainState
    params: Params
    batch: PyTree
    skip: bool
    say: Callable[[str], None]
    made: dict[tuple[int, int], tuple[Any, float]] = dataclasses.field(default_factory=dict)

    def compiled(self, parts: int, rows: int | None = None) -> tuple[Any, float]:
        """Compile the step that `fit` runs, once; return it and the seconds that this took.

        In place of the step there is None where the compiler says that it takes more memory than a device has.
        """
        rows = rows or rows_of(self.batch)
        if (rows, parts) in self.made:
            return self.made[rows, parts]
        self.say("compiling the step" + (f", with {rows} rows in {parts} parts" if self.made else ""))
        batch = self.batch if rows == rows_of(self.batch) else _with_rows(self.batch, rows)
        how: dict[str, Any] = {"accumulate": parts, "skip": self.skip, "shardings": lies(self.state)}
        step: Any = make_step(self.lora, self.loss, self.optimizer, **how)
        began, compiled = time.monotonic(), None
        try:
            compiled = step.lower(self.state, self.params, batch).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
        self.made[rows, parts] = compiled, time.monotonic() - began
        return self.made[rows, parts]

    def memory(self, parts: int, rows: int | None = None) -> Memory | None:
        """Return what a step takes of each device; None where the compiler says that none has as much."""
        compiled, _ = self.compiled(parts, rows)
        return None if compiled is None else memory_of(compiled, self.state, self.params)

    def timed(self, parts: int) -> Took:
        """Run the compiled step on the batch: once, and then for a second, at least once. The state is gone then."""
        compiled, compiling = self.compiled(parts)
        self.say("timing a step")
        state = self.state

        def once() -> Any:
            nonlocal state
            state, metrics = compiled(state, self.params, self.batch)
            return metrics

        return Took(_median_seconds(once), compiling)

    def scored(self, evaluate: Any, heldout: Iterable[PyTree], sharding: Any) -> Scored:
        """Compile and time the scoring of the first held-out batch, by what `make_evaluate` gives."""
        self.say("compiling the scoring")
        batch, began = lay_out(next(iter(heldout)), sharding), time.monotonic()
        given = (self.params, self.state.to_use, batch, self.state.model_state)
        compiled = evaluate.lower(*given).compile()
        took = Took(_median_seconds(lambda: compiled(*given)), time.monotonic() - began)
        batches = len(heldout) if isinstance(heldout, Sized) else sum(1 for _ in heldout)
        return Scored(took, compiled.memory_analysis().temp_size_in_bytes, batches)


def rows_of(batch: PyTree) -> int:
    """Return how many rows a batch has.

    >>> rows_of({"tokens": np.zeros((12, 5)), "weight": 0.5})
    12
    """
    return next(np.shape(leaf)[0] for leaf in jax.tree.leaves(batch) if np.ndim(leaf))


def rows_each(batch: PyTree) -> int:
    """Return how many rows of a batch each device has."""
    leaf = next(leaf for leaf in jax.tree.leaves(batch) if np.ndim(leaf))
    return leaf.sharding.shard_shape(leaf.shape)[0] if isinstance(leaf, jax.Array) else np.shape(leaf)[0]


def _with_rows(batch: PyTree, rows: int) -> PyTree:
    """Return the shapes of a batch of another number of rows, which lies as it does."""

    def one(leaf: Any) -> Any:
        if not np.ndim(leaf):
            return leaf
        where = {"sharding": leaf.sharding} if isinstance(leaf, jax.Array) else {}
        return jax.ShapeDtypeStruct((rows, *np.shape(leaf)[1:]), leaf.dtype, **where)

    return jax.tree.map(one, batch)


def _median_seconds(run: Callable[[], Any]) -> float:
    """Return the median of the seconds of some calls, after one that warms up."""
    jax.block_until_ready(run())
    times: list[float] = []
    while sum(times) < _TIMED and len(times) < 20:
        began = time.monotonic()
        jax.block_until_ready(run())
        times.append(time.monotonic() - began)
    return float(np.median(times))
