"""Batches in their order, where they belong on the devices, and the place in the data to go on from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from rslora_jax.pytrees import PyTree


class Numbered(Protocol):
    """Batches by number."""

    def __getitem__(self, number: int, /) -> PyTree:
        """Return a batch, the same whenever it is asked for."""


Batches = Numbered | Iterable[PyTree]


class Feed:
    """Give one batch after another, and say in plain JSON values how far it is.

    Args:
      batches: batches by number, such as `train_batches` gives: batch n is `batches[n]`. Or an iterable whose
        iterator has `get_state()` and `set_state(state)`, as grain's have.
      sharding: where a batch's arrays lie, or None. Of several processes each gives its own rows
        (`sharding.process_rows`).

    >>> feed = Feed(["a", "b", "c"])
    >>> next(feed), feed.place()
    ('a', {'batch': 1})
    >>> again = Feed(["a", "b", "c"])
    >>> again.go_to({"batch": 1}); next(again)
    'b'
    """

    def __init__(self, batches: Batches, sharding: jax.sharding.Sharding | None = None):
        self._batches: Any = batches
        self._sharding, self._number = sharding, 0
        self._iterator: Any = None if hasattr(batches, "__getitem__") else iter(batches)
        if self._iterator is not None and not hasattr(self._iterator, "get_state"):
            raise ValueError(
                f"{type(batches).__name__} cannot say where it is, so a run could not be resumed: give batches by "
                "number (batches[n]), or an iterator with get_state and set_state, as grain's"
            )

    def __next__(self) -> Any:
        batch = self._batches[self._number] if self._iterator is None else next(self._iterator)
        self._number += 1
        return lay_out(batch, self._sharding)

    def place(self) -> dict[str, Any]:
        """Say how many batches were given, and the iterator's own state where there is one."""
        state = {} if self._iterator is None else {"iterator": self._iterator.get_state()}
        return {"batch": self._number, **state}

    def go_to(self, place: dict[str, Any]) -> None:
        """Go on from a place that `place` gave."""
        if (self._iterator is None) == ("iterator" in place):
            raise ValueError("the run began with batches by number or with an iterator, and now has the other")
        self._number = place["batch"]
        if self._iterator is not None:
            self._iterator.set_state(place["iterator"])


def lay_out(batch: PyTree, sharding: jax.sharding.Sharding | None) -> PyTree:
    """Lay a batch out on the devices; of several processes each gives the rows that its devices hold.

    A scalar is whole on every device, and of several processes the same in each.
    """
    if sharding is None:
        return batch
    alone = jax.process_count() == 1

    def one(rows: Any) -> jax.Array:
        if np.ndim(rows) == 0:
            whole = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding
            return jax.device_put(rows, whole)
        return jax.device_put(rows, sharding) if alone else jax.make_array_from_process_local_data(sharding, rows)

    return jax.tree.map(one, batch)
