"""Many devices and many processes: how weights, adapters and batches lie on a mesh."""

from rslora_jax.parallel import processes, sharding
from rslora_jax.parallel.sharding import (
    adapter_shardings,
    batch_sharding,
    make_mesh,
    param_shardings,
    pin_packed,
    pin_rows,
    process_rows,
    stored_shardings,
)

__all__ = [
    "adapter_shardings",
    "batch_sharding",
    "make_mesh",
    "param_shardings",
    "pin_packed",
    "pin_rows",
    "process_rows",
    "processes",
    "sharding",
    "stored_shardings",
]
