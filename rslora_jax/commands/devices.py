"""The devices of `rslora train`: other processes, the mesh, and where on it what lies."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple


class Placement(NamedTuple):
    """Where a run's arrays lie: its mesh, the sharding of batches, and the rows of each that are this process's.

    All None on one device.
    """

    mesh: Any = None
    batch: Any = None
    share: slice | None = None


def check_attention(how: str) -> None:
    """Raise a ValueError where attention is to be by a kernel that the device does not run."""
    from rslora_jax.models import kernels

    if how in kernels.KERNELS and (reason := kernels.not_here(how)):
        raise ValueError(f"--attention {how} {reason}: leave it out, for the best that there is, or say chunked")


def join_processes(text: str) -> None:
    """Join the other processes of the run; all but the first fall silent.

    Raises:
      ValueError: the text is neither "auto" nor HOST:PORT,PROCESSES,NUMBER, or JAX cannot find the others.
    """
    import jax

    parts = text.split(",")
    if text != "auto" and (len(parts) != 3 or ":" not in parts[0] or not (parts[1] + parts[2]).isdigit()):
        raise ValueError(f"--distributed {text} is not HOST:PORT,PROCESSES,NUMBER, as in 10.0.0.1:1234,4,0")
    try:
        if text == "auto":
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(parts[0], int(parts[1]), int(parts[2]))
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"--distributed: {error}; say HOST:PORT,PROCESSES,NUMBER") from error
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def place(axes: str | None, batch_size: int) -> Placement:
    """Make the mesh that `axes` describes, such as "data=2,fsdp=4", and say where batches lie on it."""
    from rslora_jax.parallel import sharding

    if not axes:
        return Placement()
    mesh = sharding.make_mesh(axes)
    where = sharding.batch_sharding(mesh, batch_size)
    return Placement(mesh, where, sharding.process_rows(where, batch_size))


def base_shardings(placement: Placement, family: Any) -> Callable[[Any], Any]:
    """Return the function that says of the shapes of a family's weights where on the mesh they lie."""
    from rslora_jax.parallel import sharding

    return functools.partial(sharding.param_shardings, mesh=placement.mesh, rules=family.sharding_rules)


def placed_apply(base: Any, placement: Placement) -> Callable[..., Any]:
    """Return a model's `apply`, which keeps the rows of a batch where they lie; packed weights come to it packed."""
    import jax

    from rslora_jax.parallel import sharding

    if placement.batch is None:

        def on_one(*args: Any, **kwargs: Any) -> Any:
            with jax.default_device(jax.local_devices()[0]):  # one of those that there are, which lets kernels run
                return base.apply(*args, **kwargs)

        return on_one
    pinned = sharding.pin_rows(base.apply, placement.batch, base.family.blocks)
    return sharding.pin_packed(pinned, base.variables, placement.batch)
