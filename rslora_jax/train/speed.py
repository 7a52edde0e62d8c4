"""How fast a run is: the seconds of its steps, and the model's FLOPs in them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from rslora_jax.pytrees import Params, PyTree
from rslora_jax.train.carry import call_loss
from rslora_jax.train.flops import step_flops
from rslora_jax.train.gradient import deal
from rslora_jax.train.loss import Loss
from rslora_jax.train.state import TrainState
from rslora_jax.wrap import Lora

_End = tuple[float, dict[str, float]]  # when a step ended, and what it gave


class Stopwatch:
    """Take the seconds of each step, from the end of the one before it to its own, whenever that is asked for.

    Ends are noted by a thread that waits for them: a step may be at an end long before the loop comes to look at it, or
    hold up the loop that begins the next one, which on a CPU differs from step to step. It reads the results too, which
    takes a turn to the device for each.
    """

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._waits = ThreadPoolExecutor(1, thread_name_prefix="stopwatch")

    def restart(self) -> None:
        """Let the next step begin now."""
        self._last = time.monotonic()

    def begun(self, results: Mapping[str, jax.Array]) -> Future[_End]:
        """Note when the results of a step are there, and what they are; give it to `seconds`."""
        return self._waits.submit(_end_of, results)

    def seconds(self, end: Future[_End]) -> tuple[float, dict[str, float]]:
        """Return the seconds of a step, which is waited for, and its results."""
        at, numbers = end.result()
        seconds, self._last = at - self._last, at
        return seconds, numbers

    def close(self) -> None:
        """End the thread."""
        self._waits.shutdown()


def _end_of(results: Mapping[str, jax.Array]) -> _End:
    jax.block_until_ready(results)
    at = time.monotonic()
    return at, {name: float(value) for name, value in results.items()}


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
