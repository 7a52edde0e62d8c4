"""When two calls are one trace: what a trace depends on by value is compared by type and value."""

import dataclasses
import struct
from collections.abc import Hashable
from typing import Any

import numpy as np


def exact(value: Any) -> Hashable:
    """Return a key that is equal for values of one type that no program can tell apart, and for no others.

    In Python 1, True and 1.0 are equal, 0.0 and -0.0 are, and NaN is not equal to itself. Tuples, frozen sets and
    dataclasses are looked into; any other value is compared by its type and its own `==`.

    >>> [exact(a) == exact(b) for a, b in [(1, True), ((0.0,), (-0.0,)), (float("nan"), float("nan"))]]
    [False, False, True]
    """
    kind = type(value)
    if kind is float:
        return kind, struct.pack("d", value)
    if kind is complex:
        return kind, struct.pack("2d", value.real, value.imag)
    if isinstance(value, np.generic):
        return kind, value.dtype, value.tobytes()
    if isinstance(value, frozenset):
        return kind, frozenset(map(exact, value))
    if isinstance(value, tuple | list):  # a list only in the structure of a pytree
        return kind, tuple(map(exact, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value) if f.compare]
        parts = tuple(exact(getattr(value, name, None)) for name in fields)
        # Its own `==` comes last: it may not be able to compare what the fields' exact keys tell apart.
        return kind, parts if hashable(parts) else None, value
    return kind, value


def exact_structure(tree: Any) -> Hashable:
    """Return such a key for the structure of a pytree, keys of dicts and static fields of dataclasses included."""
    node = tree.node_data()
    return node and (node[0], exact(node[1]), tuple(map(exact_structure, tree.children())))


def hashable(value: Any) -> bool:
    """Say whether a value can be hashed."""
    try:
        hash(value)
    except TypeError:
        return False
    return True
