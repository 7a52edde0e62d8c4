"""The loop around the step: data in, metrics and checkpoints out."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from rslora_jax import checkpoint
from rslora_jax.train.loss import Loss
from rslora_jax.train.report import Display, Record, metrics_file, perplexity, plot, read_metrics
from rslora_jax.train.state import TrainState, make_evaluate, make_step
from rslora_jax.wrap import Adapters, Lora


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient was not a number; what was learnt before is saved."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What `fit` returns.

    Attributes:
      adapters: the trained adapters.
      step: how many steps are done in all.
      records: the lines of `metrics.jsonl`.
      interrupted: whether Ctrl-C or a request to end stopped the run before its last step.
    """

    adapters: Adapters
    step: int
    records: Sequence[Record]
    interrupted: bool

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
    batch_sharding: jax.sharding.Sharding | None = None,
    eval_every: int | None = None,
    save_every: int | None = None,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    show: bool = True,
) -> Result:
    """Train adapters, and leave checkpoints, `metrics.jsonl` and `loss.png` in a folder.

    Args:
      lora: from `wrap`.
      params: the base; it stays as it is.
      adapters: where to start, from `lora.init`; they stay as they are too.
      batches: training batches by number: `batches[n]` for step n, the same whenever it is asked for, so
        that a resumed run goes on as if it had not stopped.
      loss: such as `token_loss(rows.places)`.
      optimizer: any optax optimiser.
      steps: how many steps to have done at the end, those before a resume included.
      folder: where to write.
      batch_sharding: where batches lie, such as `sharding.batch_sharding(mesh)`; base and adapters stay where they
        are given (`sharding.param_shardings`, `sharding.adapter_shardings`), and the optimiser's state lies with them.
      heldout: batches to evaluate on: before, every `eval_every` steps (by default three times), and after.
      save_every: steps between checkpoints; by default a quarter of the run, at most 500. The end is saved too.
      settings: plain JSON values to keep with the checkpoints (`checkpoint.load_about` reads them).
      resume: go on from the folder's last checkpoint.
      show: print progress.

    Raises:
      NonFiniteLoss: the loss or its gradient was not finite; says at which step. The state before it is saved.
      ValueError: the folder cannot be used, or its checkpoint is of another config, base or optimiser.

    On Ctrl-C (or SIGTERM) the step in progress is finished and saved, and `fit` returns; a second Ctrl-C ends
    it at once.
    """
    folder = Path(folder)
    about = checkpoint.describe(lora.config, params, settings)
    step = make_step(lora, loss, optimizer)
    evaluate = make_evaluate(lora, loss)
    state = TrainState.create(adapters, optimizer)
    put = lambda batch: batch if batch_sharding is None else jax.device_put(batch, batch_sharding)
    eval_every = eval_every or max(1, math.ceil(steps / 3))
    save_every = save_every or max(1, min(math.ceil(steps / 4), 500))

    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(checkpoint.open_checkpoints(folder, resume=resume))
        if resume:
            state = from_checkpoint(state, checkpoint.restore(manager, state.adapters, training(state), about))
        start = int(state.step)
        if start >= steps:
            raise ValueError(f"{folder} is already at step {start}: ask for more than {steps} steps to go on")
        records = read_metrics(folder / "metrics.jsonl", until=start)
        append = stack.enter_context(metrics_file(folder / "metrics.jsonl", records))
        stopping = stack.enter_context(stop_signals())
        display = stack.enter_context(Display(start, steps, show))

        last = time.monotonic()

        def record(**entry: Any) -> None:
            records.append(entry)
            append(entry)

        def look(at: int, state: TrainState) -> None:
            if heldout is not None:
                value = evaluate(params, state.adapters, map(put, heldout))
                record(step=at, heldout_loss=value)
                display.line(f"step {at}: held-out perplexity {perplexity(value):.2f} (loss {value:.4f})")

        def keep(at: int, state: TrainState) -> None:
            checkpoint.save(manager, at, state.adapters, training(state), about)

        def finish(pending: tuple[int, dict, int]) -> None:
            """Wait for a step and record it; the device is already at work on the next."""
            nonlocal last
            number, metrics, size = pending
            value, norm, tokens = (float(metrics[k]) for k in ("loss", "grad_norm", "tokens"))
            now = time.monotonic()
            seconds, last = now - last, now
            record(
                step=number + 1,
                loss=value,
                perplexity=perplexity(value),
                grad_norm=norm,
                tokens=int(tokens),
                seconds=round(seconds, 4),
                tokens_per_second=round((size or tokens) / max(seconds, 1e-9), 1),
            )
            if not math.isfinite(value) or not math.isfinite(norm):
                what = "loss" if not math.isfinite(value) else "gradient"
                raise NonFiniteLoss(
                    f"the {what} of step {number + 1} is not finite (loss {value}, gradient norm {norm}); the "
                    f"adapters of step {number} are saved in {folder}: try a lower learning rate, or look at batch "
                    f"{number}"
                )
            display.update(records[-1])

        if start == 0:
            look(0, state)
        pending = None
        last = time.monotonic()
        at = start
        try:
            while at < steps and not stopping.is_set():
                batch = batches[at]
                state, metrics = step(state, params, put(batch))
                if pending:
                    finish(pending)
                pending, at = (at, metrics, np.size(getattr(batch, "tokens_BxT", ()))), at + 1
                looks, keeps = at % eval_every == 0 and at < steps, at % save_every == 0
                if looks or keeps:
                    finish(pending)
                    pending = None
                    if keeps:
                        keep(at, state)
                    if looks:
                        look(at, state)
                    last = time.monotonic()
            if pending:
                finish(pending)
            if at == steps:
                look(at, state)
        finally:
            # After an error the state is that of the last good step (see TrainState.finite), unless a second
            # Ctrl-C struck while the step had the state's memory.
            if not any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
                keep(int(state.step), state)
            plot(records, folder / "loss.png", f"{folder.name}: rank {lora.config.rank}, {lora.config.scaling}")
    return Result(state.adapters, int(state.step), tuple(records), interrupted=at < steps)


def training(state: TrainState) -> dict[str, Any]:
    """Return what a checkpoint holds beside the adapters."""
    return {"step": state.step, "opt_state": state.opt_state}


def from_checkpoint(state: TrainState, restored: tuple[Any, Any]) -> TrainState:
    """Return a state with what `checkpoint.restore` gave."""
    adapters, rest = restored
    return dataclasses.replace(state, adapters=adapters, step=rest["step"], opt_state=rest["opt_state"])


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into an event; the second acts as it always does."""
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping  # only the main thread may have handlers
        return
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}

    def ask(kind: int, frame: Any) -> None:
        stopping.set()
        signal.signal(kind, before[signal.Signals(kind)])

    for kind in before:
        signal.signal(kind, ask)
    try:
        yield stopping
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
