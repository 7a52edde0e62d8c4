"""Objects of Flax NNX among a call's arguments, such as an `nnx.Rngs`: a call may change them, traced or not."""

from typing import Any

import jax
from flax import nnx


def variables_of(tree: Any) -> list[nnx.Variable]:
    """Return the variables of the NNX objects in a pytree, in its order."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return [leaf for leaf in leaves if isinstance(leaf, nnx.Variable)]


def values_of(variables: list[nnx.Variable]) -> list[Any]:
    """Return what variables hold, with no hooks run."""
    return [variable.get_raw_value() for variable in variables]


def same(old: Any, new: Any) -> bool:
    """Say whether two values have the very same arrays."""
    old, new = jax.tree.leaves(old), jax.tree.leaves(new)
    return len(old) == len(new) and all(x is y for x, y in zip(old, new, strict=True))


def changes(variables: list[nnx.Variable], before: list[Any]) -> dict[int, Any]:
    """Return what the variables that have changed hold now, by their number."""
    now = enumerate(zip(before, values_of(variables), strict=True))
    return {n: new for n, (old, new) in now if not same(old, new)}


def change(variables: list[nnx.Variable], changed: dict[int, Any]) -> None:
    """Do to the caller's variables what a traced call did to its copies of them.

    Flax refuses a variable of another trace, as it does where a module is called.

    Raises:
      ValueError: a variable that changes was given twice: the trace had two copies of it.
    """
    for n, value in changed.items():
        if sum(variable is variables[n] for variable in variables) > 1:
            raise ValueError(f"a call changes a {type(variables[n]).__name__} that it is given twice: give it once")
        variables[n].set_raw_value(value)
