"""The loop around the step: data in, metrics and checkpoints out."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax

from rslora_jax.parallel.processes import is_first, stop_requests
from rslora_jax.sites import from_paths, named_leaves
from rslora_jax.store import checkpoint
from rslora_jax.train.carry import call_loss
from rslora_jax.train.events import event_file
from rslora_jax.train.feed import Feed, put
from rslora_jax.train.flops import peak_flops, step_flops
from rslora_jax.train.gradient import split
from rslora_jax.train.loss import Loss
from rslora_jax.train.report import Display, Record, metrics_file, perplexity, plot, read_metrics
from rslora_jax.train.state import TrainState, make_evaluate, make_step
from rslora_jax.train.update import averages, rehearse
from rslora_jax.wrap import Adapters, Lora

MOST_SKIPPED = 10  # batches in a row that are not finite: then it is the state, not a batch


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient was not a number; what was learnt before is saved."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What `fit` returns.

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
    model_state: Any = None

    @property
    def heldout(self) -> dict[int, float]:
        """The held-out perplexity by step."""
        return {r["step"]: perplexity(r["heldout_loss"]) for r in self.records if "heldout_loss" in r}


def fit(
    lora: Lora,
    params: Any,
    adapters: Adapters,
    *,
    batches: Any,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    steps: int,
    folder: str | Path,
    heldout: Any = None,
    heldout_loss: Loss | None = None,
    model_state: Any = None,
    batch_sharding: jax.sharding.Sharding | None = None,
    accumulate: int = 1,
    key: jax.Array | None = None,
    on_nonfinite: Literal["stop", "skip"] = "stop",
    eval_every: int | None = None,
    patience: int | None = None,
    save_every: int | None = None,
    keep: int = 2,
    tensorboard: bool = False,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
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
      on_nonfinite: what a loss or gradient that is not finite does: "stop" the run, or "skip" the batch (ten in a
        row stop it). Either way the state before it is kept.
      patience: stop after so many evaluations in a row without a new least held-out loss.
      save_every: steps between checkpoints; by default a quarter of the run, at most 500. The end is saved too, and
        each new least held-out loss.
      keep: how many of the last checkpoints to keep, beside the best.
      tensorboard: write event files too (extra `tensorboard`), in the same folder.
      settings: plain JSON values to keep with the checkpoints (`checkpoint.load_about` reads them).
      resume: go on from the folder's last checkpoint.
      show: print progress.

    Raises:
      NonFiniteLoss: the loss or its gradient was not finite; says at which step. The state before it is saved.
      ValueError: the folder cannot be used, its checkpoint is of another config, base or optimiser, or the optimiser
        cannot train adapters.

    On Ctrl-C (or SIGTERM) the step in progress is finished and saved, and `fit` returns; a second Ctrl-C ends
    it at once. Where a checkpoint cannot be written, training goes on, and the ones before stay.
    """
    folder = Path(folder)
    rehearse(optimizer, adapters)
    about = checkpoint.describe(lora.config, params, settings)
    state = TrainState.create(adapters, optimizer, key, model_state)
    on_mesh = {isinstance(leaf.sharding, jax.sharding.NamedSharding) for leaf in jax.tree.leaves(state)} == {True}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state) if on_mesh else None
    step = make_step(lora, loss, optimizer, accumulate=accumulate, skip=on_nonfinite == "skip", shardings=shardings)
    evaluate = make_evaluate(lora, heldout_loss or loss, keyed=key is not None)
    feed = Feed(batches, batch_sharding)
    eval_every = eval_every or max(1, math.ceil(steps / 3))
    save_every = save_every or max(1, min(math.ceil(steps / 4), 500))

    with contextlib.ExitStack() as stack:
        saved = stack.enter_context(checkpoint.open_checkpoints(folder, resume=resume, keep=keep))
        asked = stack.enter_context(stop_requests())
        display = Display(steps, show and is_first())
        if resume:
            restored = checkpoint.restore(saved, state.adapters, training(state), about, display.line)
            state = from_checkpoint(state, restored)
            feed.go_to(restored[2]["data"])
        start = int(state.step)
        if start >= steps:
            raise ValueError(f"{folder} is already at step {start}: ask for more than {steps} steps to go on")
        records = read_metrics(folder / "metrics.jsonl", until=start)
        writers = []
        if is_first():
            writers.append(stack.enter_context(metrics_file(folder / "metrics.jsonl", records, display.line)))
            if tensorboard:
                writers.append(stack.enter_context(event_file(folder, start)))
        stack.enter_context(display.running(start))

        def record(**entry: Any) -> None:
            records.append(entry)
            for write in writers:
                write(entry)

        def look(at: int) -> float | None:
            """Evaluate on the held-out batches; None where there are none, or a signal came."""
            if heldout is None:
                return None
            sums, adapters = [], state.to_use
            for batch in heldout:
                sums.append(evaluate(params, adapters, put(batch, batch_sharding), state.model_state))
                if signal_at(at):
                    return None
            total, count = (sum(float(s[n]) for s in sums) for n in (0, 1))
            if not count:
                raise ValueError("the held-out batches hold no token with loss: give at least one example")
            value = total / count
            record(step=at, heldout_loss=value)
            display.line(f"step {at}: held-out perplexity {perplexity(value):.2f} (loss {value:.4f})")
            return value

        def save(at: int, value: float | None = None) -> None:
            place = {"data": feed.place() | {"batch": at}}
            try:
                checkpoint.save(saved, at, state.to_use, training(state), about | place, value)
            except Exception as error:  # what orbax, tensorstore or the system raise
                failed(at, error)

        def failed(at: int, error: Exception) -> None:
            saved.manager.reload()
            last = checkpoint.steps_in(folder)
            there = f"the last checkpoint is that of step {last[-1]}" if last else "there is no checkpoint yet"
            reason = " ".join(str(error).split())[:300]
            display.line(f"step {at}: a checkpoint could not be written, and {there}; training goes on ({reason})")

        last, flops = time.monotonic(), None
        peak = peak_flops(jax.devices()[0])

        def finish(number: int, metrics: dict, size: int) -> None:
            """Wait for a step and record it; the device may be at work on the next."""
            nonlocal last
            value, norm, tokens, skipped = (float(metrics[k]) for k in ("loss", "grad_norm", "tokens", "skipped"))
            now = time.monotonic()
            seconds, last = now - last, now
            record(
                step=number,
                loss=value,
                perplexity=perplexity(value),
                grad_norm=norm,
                tokens=int(tokens),
                seconds=round(seconds, 4),
                tokens_per_second=round((size or tokens) / max(seconds, 1e-9), 1),
                **speed(flops, seconds, peak),
                **({"skipped": True} if skipped and on_nonfinite == "skip" else {}),
            )
            if skipped:
                what = "loss" if not math.isfinite(value) else "gradient"
                told = f"the {what} of step {number} is not finite (loss {value}, gradient norm {norm})"
                if on_nonfinite == "stop" or skipped >= MOST_SKIPPED:
                    raise NonFiniteLoss(
                        f"{told}; the adapters of step {number - int(skipped)} are saved "
                        f"in {folder}: try a lower learning rate, or look at batch {number - 1}"
                    )
                display.line(f"{told}: the batch is skipped")
            display.update(records[-1])

        signal_at = asked
        at, pending, came = start, None, None
        try:
            if not any(r["step"] == start and "heldout_loss" in r for r in records) and start % eval_every == 0:
                look(start)
            last = time.monotonic()
            while at < steps and not (came := asked(at)) and not too_long(records, patience):
                batch = next(feed)
                if flops is None:
                    flops = count_flops(lora, loss, params, state, batch, accumulate)
                state, metrics = step(state, params, batch)
                if pending:
                    finish(*pending)
                at += 1
                pending = (at, metrics, np.size(getattr(batch, "tokens_BxT", ())))
                looks, saves = at % eval_every == 0 or at == steps, at % save_every == 0
                if looks or saves:
                    finish(*pending)
                    pending = None
                    value = look(at) if looks else None
                    if saves or (value is not None and is_least(records)):
                        save(at, value)
                    last = time.monotonic()
            if pending:
                finish(*pending)
        finally:
            # After an error the state is that of the last good step (see TrainState.finite), unless a second
            # Ctrl-C struck while the step had the state's memory.
            if not any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
                save(int(state.step))
                try:
                    saved.manager.wait_until_finished()
                except Exception as error:
                    failed(int(state.step), error)
            if is_first():
                title = f"{folder.name}: rank {lora.config.rank}, {lora.config.scaling}"
                try:
                    plot(records, folder / "loss.png", title)
                except OSError:  # of a full disk, told above
                    pass
                except ImportError as error:
                    display.line(f"there is no loss.png: {error}")
    on_disk = checkpoint.steps_in(folder)
    early = at < steps and came is None
    last_saved = on_disk[-1] if on_disk else None
    return Result(state.to_use, int(state.step), tuple(records), came, early, last_saved, state.model_state)


def count_flops(lora: Lora, loss: Loss, params: Any, state: TrainState, batch: Any, accumulate: int) -> int:
    """Count a step's model FLOPs; 0 where the program cannot be counted, which is no reason not to train it."""
    keys = () if state.key is None else (state.key,)
    of = lambda run, batch: call_loss(loss, run, batch, state.model_state, *keys)[:2]
    try:
        part = batch
        if accumulate > 1:
            part = jax.eval_shape(lambda batch: jax.tree.map(lambda x: x[0], split(batch, accumulate)), batch)
        return accumulate * step_flops(lora, of, params, state.adapters, part)
    except (TypeError, ValueError, NotImplementedError, AttributeError, IndexError):
        return 0


def speed(flops: int | None, seconds: float, peak: float | None) -> dict[str, float]:
    """Return the model's TFLOPs a second, and its part of the devices' peak where that is known.

    >>> speed(10**12, 0.5, None)
    {'tflops': 2.0}
    """
    if not flops:
        return {}
    rate = flops / max(seconds, 1e-9)
    return {"tflops": round(rate / 1e12, 4), **({"mfu": round(rate / peak / jax.device_count(), 4)} if peak else {})}


def is_least(records: Sequence[Record]) -> bool:
    """Say whether the last held-out loss is the least so far.

    >>> is_least([{"heldout_loss": 2.0}, {"loss": 1.0}, {"heldout_loss": 1.5}])
    True
    """
    return since_least(records) == 0


def too_long(records: Sequence[Record], patience: int | None) -> bool:
    """Say whether so many evaluations in a row brought no new least held-out loss.

    >>> too_long([{"heldout_loss": loss} for loss in (2.0, 1.0, 1.5, 1.2)], patience=2)
    True
    """
    return patience is not None and since_least(records) >= patience


def since_least(records: Sequence[Record]) -> int:
    """Count the evaluations after the one with the least held-out loss."""
    losses = [r["heldout_loss"] for r in records if "heldout_loss" in r]
    losses = [loss if isinstance(loss, float) and not math.isnan(loss) else math.inf for loss in losses]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


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
