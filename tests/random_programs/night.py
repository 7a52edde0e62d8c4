"""How programs are drawn at night: from a seed that is new each time, and that a failure names."""

import os
import random
from collections.abc import Callable
from typing import Any

import jax
from hypothesis import Phase


def check_at_night(chunk: int, nodeid: str, check: Callable[[int, tuple[Phase, ...]], Any]) -> None:
    """Call `check(seed, phases)`, with a random seed or one that RANDOM_PROGRAMS gives."""
    fixed = os.environ.get("RANDOM_PROGRAMS")
    number = int(fixed) + chunk if fixed else random.SystemRandom().getrandbits(32)
    if chunk % 10 == 0:  # op by op, programs share what is compiled; but nothing is ever freed
        jax.clear_caches()
    try:
        # A program that fails is shrunk when it is run again: that can take minutes.
        check(number, (Phase.generate, Phase.shrink) if fixed else (Phase.generate,))
    except Exception as error:
        again = f"RANDOM_PROGRAMS={number} pytest -m nightly '{nodeid.split('[')[0]}[0]'"
        raise AssertionError(f"seed {number}, to be run again by {again}: {error}") from error
