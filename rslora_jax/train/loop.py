"""The loop around the step: data in, metrics and checkpoints out."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax

from rslora_jax.parallel.processes import is_first, stop_requests
from rslora_jax.pytrees import Params, PyTree
from rslora_jax.store import checkpoint
from rslora_jax.store.arrays import check_dtypes
from rslora_jax.store.start import Start, described, save_start
from rslora_jax.train import course
from rslora_jax.train.ahead import Ahead, Ended
from rslora_jax.train.batch_stream import Batches, Feed, lay_out
from rslora_jax.train.curves import loss_picture
from rslora_jax.train.events import event_files
from rslora_jax.train.given_back import give_back
from rslora_jax.train.loss import Loss
from rslora_jax.train.metrics import metrics_file, of_one_set, perplexity, read_metrics
from rslora_jax.train.pace import Pace, since_least
from rslora_jax.train.rates import rates_of
from rslora_jax.train.report import Display
from rslora_jax.train.saving import Saver, training
from rslora_jax.train.speed import count_flops
from rslora_jax.train.state import Step, TrainState, first_state, lies, make_evaluate, make_step
from rslora_jax.train.update import rehearse
from rslora_jax.train.writers import Record, RunInfo, Writer, open_writers
from rslora_jax.wrap import Adapters, Lora

_STOPPING = "stopping after the steps under way; press Ctrl-C again to quit at once"
_MOST_SKIPPED = 10  # batches in a row that are not finite: then it is the state, not a batch


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient was not a number; what was learnt before is saved."""


@dataclasses.dataclass(frozen=True)
class Result:
    """Hold what `fit` returns.

    Attributes:
      adapters: the trained adapters, of the last step: those to use (`TrainState.to_use`).
      step: how many steps are done in all.
      records: the lines of `metrics.jsonl`.
      signal: the signal that stopped the run before its last step (Ctrl-C is SIGINT), or None.
      early: whether the held-out loss stopped it (`patience`).
      saved: the step of the last checkpoint, `step` unless the disk failed.
      model_state: what the model carries on after the last step, where it has state.
    """

    adapters: Adapters
    step: int
    records: Sequence[Record]
    signal: int | None
    early: bool
    saved: int | None
    model_state: PyTree = None

    @property
    def heldout(self) -> dict[int, float]:
        """The held-out perplexity by step."""
        return {r["step"]: perplexity(r["heldout_loss"]) for r in of_one_set(self.records) if "heldout_loss" in r}


def fit(
    lora: Lora,
    params: Params,
    adapters: Adapters,
    *,
    batches: Batches,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    steps: int,
    folder: str | Path,
    heldout: Iterable[PyTree] | None = None,
    heldout_loss: Loss | None = None,
    model_state: PyTree = None,
    batch_sharding: jax.sharding.Sharding | None = None,
    accumulate: int = 1,
    key: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
    on_nonfinite: Literal["stop", "skip"] = "stop",
    eval_every: int | None = None,
    patience: int | None = None,
    save_every: int | None = None,
    keep: int = 2,
    tensorboard: bool = False,
    writers: Sequence[Writer] = (),
    settings: Mapping[str, Any] | None = None,
    schedule: optax.ScalarOrSchedule | None = None,
    steps_an_epoch: float | None = None,
    resume: bool = False,
    override: Collection[str] = (),
    base: Params = None,
    start: Start | None = None,
    show: bool = True,
) -> Result:
    """Train adapters, and leave checkpoints, `metrics.jsonl` and `loss.png` in a folder.

    Args:
      lora: from `wrap`.
      params: the base; it stays as it is.
      adapters: where to start, from `lora.init`; they stay as they are too.
      batches: training batches by number: `batches[n]` for step n, the same whenever it is asked for, or an iterable
        of grain's (see `Feed`); so a resumed run goes on as if it had not stopped.
      loss: such as `token_loss(rows.places)`.
      optimizer: any optax optimiser.
      steps: how many steps to have done at the end, those before a resume included.
      folder: where to write.
      heldout: batches to evaluate on: before, every `eval_every` steps (by default three times), and after.
      heldout_loss: the loss on them, such as that of the model without dropout; by default `loss`.
      model_state: what the model carries from call to call (batch statistics, rng counts, caches), any pytree of
        arrays: `loss(run, batch, model_state[, key])` is given it and returns `(sum, count, model_state)`, where
        `run(model_state, *args)` is the wrapped `fn(params, model_state, *args)` (see `with_state`). It goes with the
        adapters: into checkpoints, and back on a skipped batch. Held-out batches read it and leave it as it is.
      batch_sharding: where batches lie, such as `sharding.batch_sharding(mesh)`; base and adapters stay where they
        are given (`sharding.param_shardings`, `sharding.adapter_shardings`), and the optimiser's state lies with them.
      accumulate: in how many parts to take each batch, one after the other, for less memory.
      key: a PRNG key, for a loss that takes one: `loss(run, batch, key)`, with None in place of it on held-out
        batches. A resumed run draws on from it.
      dropout_key: a PRNG key for what adapters drop, where the config has `dropout`; by default `jax.random.key(0)`.
        Evaluation drops nothing.
      on_nonfinite: what a loss or gradient that is not finite does: "stop" the run, or "skip" the batch (ten in a
        row stop it). Either way the state before it is kept.
      patience: stop after so many evaluations in a row without a new least held-out loss.
      save_every: steps between checkpoints; by default a quarter of the run, at most 500. The end is saved too, and
        each new least held-out loss.
      keep: how many of the last checkpoints to keep, beside the best.
      tensorboard: write event files too (extra `tensorboard`), in the same folder.
      writers: what else is told of the run, such as a service of your own, each entered as
        `with writer(run) as record:` for a `RunInfo`, and given every record (`train.Writer`); of several processes in
        the first alone. An error in one ends the run, whose state is saved.
      settings: plain JSON values to keep with the checkpoints (`checkpoint.load_about` reads them).
      schedule: the learning rate that the optimiser was made with, or its function of the step, for the metrics.
      steps_an_epoch: how many steps take each row once, such as `len(rows.rows) / batch_size`, for the metrics.
      resume: go on from the folder's last checkpoint. What decides the run's course must be as it was: the config, the
        base, the first batch ("data"), the held-out batches ("heldout"), `accumulate` ("accumulate"), and the numbers
        that the optimiser was made with, those of its schedule among them, and the dtypes of its state ("optimizer").
      override: which of these names may differ; it is recorded. Another held-out set has a "best" of its own.
      base: what checkpoints call the base, where `params` are made of it: as it was, without the rows of new tokens.
      start: of adapters that began as `rslora_jax.starts` has it, with `params` the base that this changed: what they
        began as, which the folder keeps, and the base as it was, to which the run belongs (`store.load_start`).
      show: print progress.

    Raises:
      NonFiniteLoss: the loss or its gradient was not finite; says at which step. The state before it is saved.
      ValueError: the folder cannot be used, its checkpoint is of another config, base or course, the optimiser cannot
        train adapters, or a checkpoint could not hold the settings, the state, or where the batches are.

    On Ctrl-C (or SIGTERM) the step in progress is finished and saved, and `fit` returns; a second Ctrl-C ends
    it at once. Where a checkpoint cannot be written, training goes on, and the ones before stay; a warning tells
    of it at the end.
    """
    folder = Path(folder)
    rehearse(optimizer, adapters)
    if unknown := [name for name in override if name not in course.NAMES]:
        raise ValueError(f"override has {unknown[0]!r}, which is none of {', '.join(course.NAMES)}")
    of_course = course.describe(optimizer, accumulate, course.digest(heldout, batch_sharding))
    described_base = params if base is None or start else base
    about = described(checkpoint.describe(lora.config, described_base, settings), start) | {"course": of_course}
    state = first_state(lora, adapters, optimizer, key=key, model_state=model_state, dropout_key=dropout_key)
    check_dtypes({"adapters": state.to_use, "training": training(state)})
    skip, feed = on_nonfinite == "skip", Feed(batches, batch_sharding)
    step = make_step(lora, loss, optimizer, accumulate=accumulate, skip=skip, shardings=lies(state))
    evaluate = make_evaluate(lora, heldout_loss or loss, keyed=key is not None)
    count = functools.partial(count_flops, lora, loss, params, accumulate=accumulate)
    pace = Pace(steps, eval_every or None, save_every or None, patience)
    said = _STOPPING if show and is_first() else ""
    with checkpoint.open_checkpoints(folder, resume=resume, keep=keep) as saved, stop_requests(said) as asked:
        display = Display(steps, show and is_first())
        judge = functools.partial(_mean_heldout_loss, evaluate, params, heldout, batch_sharding, display.scoring)
        saver = Saver(saved, about, display.line, override)
        state = saver.restore(state, feed) if resume else state
        if resume:
            display.line(f"resuming from step {int(state.step)} of {steps}")
        if start and not resume:
            save_start(folder, start)
        info = _begin(folder, int(state.step), steps, lora, settings or {}, display)
        ours = (metrics_file, *([event_files] if tensorboard else []), loss_picture, *writers, display.running)
        with open_writers(info, ours if is_first() else ()) as write:
            parts = (info, pace, params, state, step, feed, count, judge, saver, write, asked, skip)
            run = _Run(*parts, rates_of(schedule, steps), steps_an_epoch)
            came = run.go()
    return run.result(came)


def _begin(folder: Path, start: int, steps: int, lora: Lora, settings: Mapping[str, Any], display: Display) -> RunInfo:
    """Return what writers are told of a run, with the records that its folder has.

    Raises:
      ValueError: no step is left to do.
    """
    if start >= steps:
        raise ValueError(f"{folder} is already at step {start}: ask for more than {steps} steps to go on")
    records = tuple(read_metrics(folder / "metrics.jsonl", until=start))
    return RunInfo(folder, start, steps, records, lora.config, settings, display.line)


@dataclasses.dataclass
class _Run:
    """A run under way: its parts, and how far it is.

    Attributes:
      info, pace, params, feed, saver: its parts.
      state: after the last step that was begun.
      step: the compiled step.
      count: `count(state, batch)` counts the FLOPs of a step.
      judge: `judge(state, stopped)` gives the held-out loss; None where there is none, or `stopped()` is true.
      write: hands a record to the writers.
      asked: `asked(step)` gives the signal to stop, if one came.
      skip: whether batches that are not finite are passed over.
      rates, steps_an_epoch: the learning rate of each step, and how many take each row once, where they are known.
      records: all until now.
      passed: how many of them are of batches that were passed over.
      at: how many steps are begun.
      ahead: those that are not recorded: the device may still be at work on them.
      flops: of a step, once there was one.
      given_up: whether the held-out loss has not fallen for too long.
    """

    info: RunInfo
    pace: Pace
    params: Params
    state: TrainState
    step: Step
    feed: Feed
    count: Callable[[TrainState, Any], int]
    judge: Callable[[TrainState, Callable[[], Any]], float | None]
    saver: Saver
    write: Callable[[Record], None]
    asked: Callable[[int], int | None]
    skip: bool
    rates: np.ndarray | None
    steps_an_epoch: float | None

    def __post_init__(self) -> None:
        self.records = list(self.info.records)
        self.passed = sum(bool(record.get("skipped")) for record in self.records)
        self.at = self.info.start
        # What is to be passed over as it comes may not be begun far ahead either: the tenth in a row ends the run.
        self.ahead = Ahead(alone=self.skip or jax.process_count() > 1)
        self.flops: int | None = None
        self.given_up = self.pace.gives_up(self.records)

    def go(self) -> int | None:
        """Take the steps and save the end, whatever comes; return the signal that stopped them, if one did."""
        try:
            if changed := self.saver.changed:
                renewed = {"new_heldout": True} if "heldout" in changed else {}
                self.record({"step": self.at, "changed": dict(changed), **renewed})
            if (self.pace.looks(self.at) or "heldout" in changed) and not any(
                record["step"] == self.at and "heldout_loss" in record for record in of_one_set(self.records)
            ):
                self.look()
            give_back()
            self.ahead.watch.restart()
            came = None
            while self.at < self.pace.steps and not (came := self.asked(self.at)) and not self.given_up:
                self.advance()
            self.finish()
            return came
        finally:
            # After an error the state is that of the last good step (see TrainState.finite), unless a second
            # Ctrl-C struck while the step had the state's memory.
            if not any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state)):
                self.saver.save_last(self.state, self.feed)
            self.ahead.watch.close()

    def advance(self) -> None:
        """Begin a step, record some that are done, and evaluate and save where that is due."""
        try:
            batch = next(self.feed)
        except Exception:
            self.finish()  # what was learnt will be saved
            raise
        if self.flops is None:
            self.flops = self.count(self.state, batch)
        self.state, metrics = self.step(self.state, self.params, batch)
        self.at += 1
        self.ahead.begin(self.at, np.size(getattr(batch, "tokens_BxT", ())), metrics)
        for ended in self.ahead.ended():
            self.recorded(ended)
        looks, saves = self.pace.looks(self.at), self.pace.saves(self.at)
        if self.at == self.info.start + 1:  # it was compiled
            give_back()
        if looks or saves:
            self.finish()
            value = self.look() if looks else None
            if saves or (value is not None and since_least(self.records) == 0):
                self.saver.save(self.state, self.feed, value)
            give_back()
            self.ahead.watch.restart()

    def finish(self) -> None:
        """Wait for all steps that are not recorded, and record them.

        Raises:
          NonFiniteLoss: one was not finite, and is not to be skipped.
        """
        for ended in self.ahead.ended(everything=True):
            self.recorded(ended)

    def recorded(self, ended: Ended) -> None:
        """Record a step.

        Raises:
          NonFiniteLoss: it was not finite, and is not to be skipped.
        """
        record = ended.record(self.flops) | self.rate(ended.number)
        skipped = int(ended.metrics["skipped"])
        self.record(record | ({"skipped": True} if skipped and self.skip else {}))
        if skipped:
            self.pass_over(record, skipped)

    def rate(self, number: int) -> Record:
        """Return the learning rate of a step and the epochs that are done after it, where they are known."""
        # The optimiser counts the steps in which it moved.
        found = {} if self.rates is None else {"learning_rate": float(self.rates[number - 1 - self.passed])}
        return found | ({"epoch": round(number / self.steps_an_epoch, 4)} if self.steps_an_epoch else {})

    def pass_over(self, record: Record, skipped: int) -> None:
        """Say that a step was not finite, the last of so many in a row."""
        number, value = record["step"], record["loss"]
        what = "gradient" if math.isfinite(value) else "loss"
        told = f"the {what} of step {number} is not finite (loss {value}, gradient norm {record['grad_norm']})"
        if self.skip and skipped < _MOST_SKIPPED:
            self.info.say(f"{told}: the batch is skipped")
            return
        raise NonFiniteLoss(
            f"{told}; the adapters of step {number - skipped} are saved "
            f"in {self.info.folder}: try a lower learning rate, or look at batch {number - 1}"
        )

    def look(self) -> float | None:
        """Take the held-out loss and record it; None where there is none, or a signal came."""
        value = self.judge(self.state, lambda: self.asked(self.at))
        if value is not None:
            self.record({"step": self.at, "heldout_loss": value})
        return value

    def record(self, record: Record) -> None:
        """Keep a record and hand it to the writers."""
        self.records.append(record)
        self.passed += bool(record.get("skipped"))
        if "loss" not in record:
            self.given_up = self.pace.gives_up(self.records)
        self.write(record)

    def result(self, came: int | None) -> Result:
        """Return what the run came to, by the signal that stopped it."""
        on_disk, state = checkpoint.steps_in(self.info.folder), self.state
        early, last_saved = self.at < self.pace.steps and came is None, on_disk[-1] if on_disk else None
        records = tuple(self.records)
        return Result(state.to_use, int(state.step), records, came, early, last_saved, state.model_state)


def _mean_heldout_loss(
    evaluate: Callable[..., Any],
    params: Params,
    batches: Iterable[PyTree] | None,
    sharding: jax.sharding.Sharding | None,
    scoring: Callable[..., Iterable[PyTree]],
    state: TrainState,
    stopped: Callable[[], Any],
) -> float | None:
    """Return the mean loss on held-out batches; None where there are none, or it is stopped.

    Raises:
      ValueError: they have no token with loss.
    """
    if batches is None:
        return None
    sums, adapters = list[Any](), state.to_use
    for batch in scoring(batches, lambda: jax.block_until_ready(sums[:-1])):
        sums.append(evaluate(params, adapters, lay_out(batch, sharding), state.model_state))
        if stopped():
            return None
    total, count = (sum(float(s[n]) for s in sums) for n in (0, 1))
    if not count:
        raise ValueError("the held-out batches hold no token with loss: give at least one example")
    return total / count
