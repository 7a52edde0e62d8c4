"""Names for what a type cannot tell of a pytree, as its structure is the user's."""

from typing import Any

# The base: a pytree of arrays, of weights stored in a form of their own (`Stored`), or of their shapes.
Params = Any

# Any other: a batch, a model's state, shardings.
PyTree = Any
