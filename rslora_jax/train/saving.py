"""A run's checkpoints: what they hold, and a run that goes on where one cannot be written."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax

from rslora_jax.shown import reason_of
from rslora_jax.sites import from_paths, named_leaves
from rslora_jax.store import checkpoint
from rslora_jax.train import course
from rslora_jax.train.batch_stream import Feed
from rslora_jax.train.state import TrainState
from rslora_jax.train.update import averages
from rslora_jax.wrap import RsloraWarning


@dataclasses.dataclass
class Saver:
    """Save a run's state, and take it up again.

    Attributes:
      checkpoints: those of the run's folder.
      about: what is kept with each, from `checkpoint.describe`, and the run's course.
      say: shows a line of text.
      override: in what the course may differ from the one that was saved (`course.NAMES`).
      changed: in what it does, by name.
      failed: why checkpoints could not be written, by step.
    """

    checkpoints: checkpoint.Checkpoints
    about: Mapping[str, Any]
    say: Callable[[str], None]
    override: Collection[str] = ()
    changed: dict[str, Any] = dataclasses.field(default_factory=dict)
    failed: dict[int, str] = dataclasses.field(default_factory=dict)
    _writing: int | None = None

    def restore(self, state: TrainState, feed: Feed) -> TrainState:
        """Return the state of the last checkpoint that is whole, and bring the batches to its place.

        Args:
          state: of the form that is wanted.
          feed: the batches.

        Raises:
          ValueError: the checkpoint is of another course, and that is not in `override`.
        """
        check = functools.partial(self._check, feed)
        parts = (state.adapters, training(state), self.about, self.say, check)
        restored = checkpoint.restore(self.checkpoints, *parts)
        feed.go_to(restored[2]["data"])
        if "heldout" in self.changed:
            self.checkpoints.heldout.clear()  # "best" starts again
        return from_checkpoint(state, restored)

    def _check(self, feed: Feed, found: Mapping[str, Any]) -> None:
        """Compare the course of a checkpoint with this run's."""
        saved, first = found.get("course", {}), found["data"].get("first")
        here = {**self.about["course"], "data": feed.first() if first else None}
        differing = course.differences({**saved, "data": first}, here)
        if refused := [name for name in differing if name not in self.override]:
            listed = "; ".join(f"{name}: {differing[name]}" for name in refused)
            raise ValueError(
                f"{self.checkpoints.folder} was trained otherwise ({listed}): give it the same, or override "
                f"{', '.join(refused)} to change it on purpose"
            )
        settings, before = self.about["settings"], found.get("settings", {})
        of_settings = {
            name: [before[name], value] for name, value in settings.items() if before.get(name, value) != value
        }
        self.changed.clear()
        self.changed.update(of_settings | differing)

    def save(self, state: TrainState, feed: Feed, heldout_loss: float | None = None) -> None:
        """Save a state after its step; where that fails, say so."""
        step = int(state.step)
        self._wait()  # so that what fails of the save before is not held against this one
        self._writing = step
        try:
            about = {**self.about, "data": place(feed, step)}
            checkpoint.save(self.checkpoints, step, state.to_use, training(state), about, heldout_loss)
        except Exception as error:  # what orbax, tensorstore or the system raise
            self._failed(error)

    def save_last(self, state: TrainState, feed: Feed) -> None:
        """Save a state and wait until it is written; warn of what could not be, whether a run shows it or not."""
        self.save(state, feed)
        self._wait()
        if self.failed:
            steps = ", ".join(map(str, self.failed))
            warnings.warn(
                f"step {steps} could not be saved in {self.checkpoints.folder} ({[*self.failed.values()][-1]}); "
                f"{self._what_is_there()}",
                RsloraWarning,
                stacklevel=5,
            )

    def _wait(self) -> None:
        """Wait for the save under way, if there is one."""
        try:
            self.checkpoints.manager.wait_until_finished()
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        """Say that the save under way failed."""
        with contextlib.suppress(Exception):  # of the disk that failed: told below
            self.checkpoints.manager.reload()
        step, reason = self._writing, reason_of(error, 200)
        if step is not None and step not in self.failed:
            self.failed[step] = reason
            there = self._what_is_there()
            self.say(f"step {step}: a checkpoint could not be written, and {there}; training goes on ({reason})")

    def _what_is_there(self) -> str:
        last = checkpoint.steps_in(self.checkpoints.folder)
        return f"the last checkpoint is that of step {last[-1]}" if last else "there is no checkpoint yet"


def place(feed: Feed, step: int) -> dict[str, Any]:
    """Return where the data are after a step, and what their first batch is, as a checkpoint keeps it."""
    first = feed.first() if step else None
    return feed.place(step) | ({} if first is None else {"first": first})


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
