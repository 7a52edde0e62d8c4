"""A run's checkpoints: what they hold, and a run that goes on where one cannot be written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from rslora_jax.sites import from_paths, named_leaves
from rslora_jax.store import checkpoint
from rslora_jax.train.batch_stream import Feed
from rslora_jax.train.state import TrainState
from rslora_jax.train.update import averages


@dataclasses.dataclass(frozen=True)
class Saver:
    """Save a run's state, and take it up again.

    Attributes:
      checkpoints: those of the run's folder.
      about: what is kept with each, from `checkpoint.describe`.
      say: shows a line of text.
    """

    checkpoints: checkpoint.Checkpoints
    about: Mapping[str, Any]
    say: Callable[[str], None]

    def restore(self, state: TrainState, feed: Feed) -> TrainState:
        """Return the state of the last checkpoint that is whole, and bring the batches to its place.

        Args:
          state: of the form that is wanted.
          feed: the batches.
        """
        restored = checkpoint.restore(self.checkpoints, state.adapters, training(state), self.about, self.say)
        feed.go_to(restored[2]["data"])
        return from_checkpoint(state, restored)

    def save(self, state: TrainState, feed: Feed, heldout_loss: float | None = None) -> None:
        """Save a state after its step; where that fails, say so."""
        step = int(state.step)
        about = {**self.about, "data": feed.place() | {"batch": step}}
        try:
            checkpoint.save(self.checkpoints, step, state.to_use, training(state), about, heldout_loss)
        except Exception as error:  # what orbax, tensorstore or the system raise
            self._failed(step, error)

    def save_last(self, state: TrainState, feed: Feed) -> None:
        """Save a state and wait until it is written."""
        self.save(state, feed)
        try:
            self.checkpoints.manager.wait_until_finished()
        except Exception as error:
            self._failed(int(state.step), error)

    def _failed(self, step: int, error: Exception) -> None:
        self.checkpoints.manager.reload()
        last = checkpoint.steps_in(self.checkpoints.folder)
        there = f"the last checkpoint is that of step {last[-1]}" if last else "there is no checkpoint yet"
        reason = " ".join(str(error).split())[:300]
        self.say(f"step {step}: a checkpoint could not be written, and {there}; training goes on ({reason})")


def training(state: TrainState) -> dict[str, Any]:
    """Return what a checkpoint holds beside the adapters to use: all that the next step needs."""
    held = {"step": state.step, "opt_state": state.opt_state, "skipped": state.skipped}
    if averages(state.opt_state):
        held["trained"] = state.adapters
    if jax.tree.leaves(state.model_state):
        held["model_state"] = named_leaves(state.model_state)
    return held if state.key is None else held | {"key": state.key}


def from_checkpoint(state: TrainState, restored: tuple[Any, Any, Any]) -> TrainState:
    """Return a state with what `checkpoint.restore` gave."""
    adapters, rest, _ = restored
    adapters = rest.pop("trained", adapters)
    model_state = from_paths(state.model_state, rest.pop("model_state", {}))
    # What is restored is bound to its devices: were this not, the second step would compile again.
    finite = jax.device_put(state.finite, rest["step"].sharding)
    return dataclasses.replace(state, adapters=adapters, finite=finite, model_state=model_state, **rest)
