"""A device whose steps take a given time and leave the host alone, as an accelerator's do, for measuring a host."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from rslora_jax.train import loop


class Later:
    """A number of a step that is there when the step is done."""

    def __init__(self, value: Any, at: float):
        self.value, self.at = value, at

    def block_until_ready(self) -> Later:
        """Wait for the step."""
        time.sleep(max(0.0, self.at - time.monotonic()))
        return self

    def __float__(self) -> float:
        return float(self.block_until_ready().value)


class FakeDevice:
    """Let the steps of `fit` end when so many seconds have gone since they began, or since the one before them ended.

    What `fit` calls is the compiled step with all that goes to it; what it computes is there early, and only the
    metrics are handed out as late as this device would.

    Attributes:
      seconds: of a step.
      idle: the seconds for which the device had nothing to do before each step.
    """

    def __init__(self, seconds: float):
        self.seconds, self.end = seconds, 0.0
        self.idle: list[float] = []

    def step(self, compiled: Any, *arguments: Any) -> tuple[Any, dict[str, Later]]:
        """Take a compiled step, and give its metrics later."""
        state, metrics = compiled(*arguments)
        asked = time.monotonic()
        if self.end:  # the first step has waited for its compilation
            self.idle.append(max(0.0, asked - self.end))
        self.end = max(asked, self.end) + self.seconds
        return state, {name: Later(value, self.end) for name, value in metrics.items()}

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let `fit` use this device."""
        make_step = loop.make_step

        def make(*args: Any, **kwargs: Any) -> Any:
            compiled = make_step(*args, **kwargs)
            return lambda *arguments: self.step(compiled, *arguments)

        loop.make_step = make
        try:
            yield
        finally:
            loop.make_step = make_step
