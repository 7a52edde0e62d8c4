"""How fast a run is: the seconds of its steps, and the model's FLOPs in them."""

from __future__ import annotations

import time
from typing import Any

import jax

from rslora_jax.pytrees import Params, PyTree
from rslora_jax.train.carry import call_loss
from rslora_jax.train.flops import step_flops
from rslora_jax.train.gradient import deal
from rslora_jax.train.loss import Loss
from rslora_jax.train.state import TrainState
from rslora_jax.wrap import Lora


class Stopwatch:
    """Take the seconds between one lap and the next."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def lap(self) -> float:
        """Return the seconds since the last lap, or since the start."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        return seconds


def count_flops(lora: Lora, loss: Loss, params: Params, state: TrainState, batch: PyTree, accumulate: int) -> int:
    """Count a step's model FLOPs; 0 where the program cannot be counted, which is no reason not to train it."""
    keys = () if state.key is None else (state.key,)

    def of(run: Any, batch: PyTree) -> Any:
        return call_loss(loss, run, batch, state.model_state, *keys)[:2]

    try:
        part = batch
        if accumulate > 1:
            part = jax.eval_shape(lambda batch: jax.tree.map(lambda x: x[0], deal(batch, accumulate)), batch)
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
