"""What a training step takes of each device's memory, by kind, as it is compiled; and what a device has."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rslora_jax.pytrees import Params, PyTree
from rslora_jax.train.state import TrainState

# Of a device's memory, what a step may take: allocators leave holes, and a process holds more than its arrays.
_USABLE = 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Hold the bytes that training takes of each device, by kind.

    Attributes:
      base: the frozen weights, as they are held.
      adapters: those that are trained.
      start: those that training began with, which the caller of `fit` has.
      optimizer: the optimiser's state.
      rest: batch, counters and keys.
      gradients: the adapters' gradients, while a step runs.
      activations: all else that a step makes and drops again, as compiled: activations, chunks of logits, copies.
      evaluation: what scoring a held-out batch makes and drops again, as compiled.

    >>> Memory(base=100, adapters=3, start=3, optimizer=6, rest=1, gradients=3, activations=50, evaluation=20).total
    166
    """

    base: int
    adapters: int
    start: int
    optimizer: int
    rest: int
    gradients: int
    activations: int
    evaluation: int = 0

    @property
    def held(self) -> int:
        """The bytes that stay from step to step."""
        return self.base + self.adapters + self.start + self.optimizer + self.rest

    @property
    def temporary(self) -> int:
        """The bytes that are taken while a step runs."""
        return self.gradients + self.activations

    @property
    def total(self) -> int:
        """The most bytes that are taken at one time."""
        return self.held + max(self.temporary, self.evaluation)


def memory_of(compiled: Any, state: TrainState, params: Params, evaluation: Any = None) -> Memory:
    """Return what a compiled step takes of each device.

    Args:
      compiled: `step.lower(state, params, batch).compile()`.
      state, params: what it was compiled for.
      evaluation: `evaluate.lower(...).compile()`, of a held-out batch.
    """
    found = compiled.memory_analysis()
    base, adapters, optimizer = (on_each(tree) for tree in (params, state.adapters, state.opt_state))
    # An argument that nothing reads is none of the compiled step's, and is held all the same.
    rest = max(0, found.argument_size_in_bytes - base - adapters - optimizer)
    temporary = found.temp_size_in_bytes + max(0, found.output_size_in_bytes - found.alias_size_in_bytes)
    gradients = min(adapters, temporary)
    scoring = evaluation.memory_analysis().temp_size_in_bytes if evaluation is not None else 0
    return Memory(
        base=base,
        adapters=adapters,
        start=adapters,
        optimizer=optimizer,
        rest=rest,
        gradients=gradients,
        activations=temporary - gradients,
        evaluation=scoring,
    )


def on_each(tree: PyTree) -> int:
    """Return the bytes that the arrays of a tree take of each device on which they lie.

    >>> on_each({"w": np.ones((2, 3), np.float32), "key": jax.random.key(0)})
    32
    """

    def one(leaf: Any) -> int:
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        shape = leaf.sharding.shard_shape(leaf.shape) if isinstance(leaf, jax.Array) else np.shape(leaf)
        return int(np.prod(shape)) * np.dtype(leaf.dtype).itemsize

    return sum(map(one, jax.tree.leaves(tree)))


def room() -> int | None:
    """Return the bytes that each device has for arrays; None where it does not tell.

    Devices of a CPU share its memory, or what a container may take of it.
    """
    device = jax.local_devices()[0]
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return int(limit)
    if device.platform != "cpu":
        return None
    found = [_of_the_container()]
    with contextlib.suppress(AttributeError, ValueError, OSError):  # a system that does not tell
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    known = [size for size in found if size]
    return min(known) // jax.local_device_count() if known else None


def _of_the_container() -> int | None:
    """Return what a container may take of a Linux system's memory; None where there is no limit."""
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            return int(Path(file).read_text())
    return None


def usable(limit: int) -> int:
    """Return how many of a device's bytes a step may take."""
    return int(_USABLE * limit)


def fits(total: int, limit: int | None) -> bool | None:
    """Say whether so many bytes fit a device, of which a tenth is left free; None where that is not known.

    >>> fits(89, 100), fits(91, 100), fits(91, None)
    (True, False, None)
    """
    return None if limit is None else total <= usable(limit)
