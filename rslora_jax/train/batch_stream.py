"""Batches in their order, where they belong on the devices, and the place in the data to go on from."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Iterable
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from rslora_jax.pytrees import PyTree
from rslora_jax.store.checksum import checksums


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

    >>> feed = Feed([10, 11, 12])
    >>> next(feed), feed.place()
    (10, {'batch': 1})
    >>> again = Feed([10, 11, 12])
    >>> again.go_to({"batch": 1}); next(again)
    11
    """

    def __init__(self, batches: Batches, sharding: jax.sharding.Sharding | None = None):
        self._batches: Any = batches
        self._sharding, self._number = sharding, 0
        # Of grain's kind: one that says where it is.
        self._iterator: Any = None if hasattr(batches, "__getitem__") else cast(Any, iter(batches))
        if self._iterator is not None and not hasattr(self._iterator, "get_state"):
            raise ValueError(
                f"{type(batches).__name__} cannot say where it is, so a run could not be resumed: give batches by "
                "number (batches[n]), or an iterator with get_state and set_state, as grain's"
            )
        # The iterator's state before each of the last batches: what was given last may yet have to be given again.
        self._states: dict[int, Any] = {}
        self._first: dict[str, str] | None = None
        if self._iterator is not None:
            _check_can_be_written(self._iterator.get_state(), batches)
            self._remember()

    def __next__(self) -> Any:
        batch = self._batches[self._number] if self._iterator is None else next(self._iterator)
        batch = lay_out(batch, self._sharding)
        if self._number == 0:
            self._first = words(batch)
        self._number += 1
        self._remember()
        return batch

    def _remember(self) -> None:
        if self._iterator is not None:
            self._states[self._number] = _as_json(self._iterator.get_state())
            self._states.pop(self._number - REMEMBERED, None)

    def place(self, number: int | None = None) -> dict[str, Any]:
        """Say how many batches were given, and the iterator's own state where there is one; or of so many, as it was.

        >>> feed = Feed([10, 11, 12])
        >>> next(feed), next(feed), feed.place(1)
        (10, 11, {'batch': 1})
        """
        number = self._number if number is None else number
        return {"batch": number, **({} if self._iterator is None else {"iterator": self._states[number]})}

    def first(self) -> dict[str, str] | None:
        """Say what the first of all batches is, in `words`; None where an iterator is beyond it and it was not seen.

        Of an iterator that has given none it is taken: `go_to` is to follow.
        """
        if self._first is None and self._iterator is None:
            self._first = words(lay_out(self._batches[0], self._sharding))
        elif self._first is None and self._number == 0:
            self._first = words(lay_out(next(self._iterator), self._sharding))  # type: ignore[arg-type]
        return self._first

    def go_to(self, place: dict[str, Any]) -> None:
        """Go on from a place that `place` gave.

        Raises:
          ValueError: it is that of batches of the other kind, or the iterator cannot go there.
        """
        if (self._iterator is None) == ("iterator" in place):
            raise ValueError("the run began with batches by number or with an iterator, and now has the other")
        self._number = place["batch"]
        if self._iterator is not None:
            try:
                self._iterator.set_state(_from_json(place["iterator"]))
            except Exception as error:  # each kind of iterator refuses in its own way
                raise ValueError(f"the batches cannot go on from where the run was: {error}") from error
            self._states.clear()
            self._remember()


# A step that is not finite is noticed when some after it have begun, and its batch is to be given again.
REMEMBERED = 20


def _as_json(state: Any) -> Any:
    """Return a copy of an iterator's state as JSON can hold it: the bytes of grain.DataLoader become text."""
    if isinstance(state, bytes):
        return {"base64": base64.b64encode(state).decode()}
    return copy.deepcopy(state)


def _from_json(state: Any) -> Any:
    """Return the state of which `_as_json` made this.

    >>> _from_json(_as_json(b"at 3")), _from_json(_as_json({"next": 3}))
    (b'at 3', {'next': 3})
    """
    return base64.b64decode(state["base64"]) if isinstance(state, dict) and [*state] == ["base64"] else state


def _check_can_be_written(state: Any, batches: Any) -> None:
    """Raise a ValueError where a checkpoint would not give an iterator's state back."""
    plain = _as_json(state)
    try:
        # A tuple comes back as a list, which iterators take; a number as a key comes back as a text, which they do not.
        same = jax.tree.map(str, json.loads(json.dumps(plain))) == jax.tree.map(str, _in_lists(plain))
    except (TypeError, ValueError):
        same = False
    if not same:
        raise ValueError(
            f"where {type(batches).__name__} is, it says in a state that no checkpoint can hold "
            f"({type(state).__name__}): give batches by number (batches[n]), or an iterator whose state is plain JSON "
            "values or bytes"
        )


def _in_lists(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _in_lists(value) for key, value in state.items()}
    return [_in_lists(value) for value in state] if isinstance(state, tuple | list) else state


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


def words(batch: Any) -> dict[str, str]:
    """Return the dtype, the shape and a checksum of each array of a batch, as a step takes it, by path.

    >>> words({"x": np.zeros((2, 3), np.float64)})
    {'x': 'float32[2,3] 87a72efd'}
    """
    return checksums(jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf), batch))
