"""The door for Flax NNX: a module as a pure function, its parameters, and what else it holds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, overload

import jax
from flax import nnx

from rslora_jax.transform.objects import same
from rslora_jax.wrap import RsloraWarning

_Method = Callable[..., Any] | None
_Path = tuple[Any, ...]

# What users call the variables of NNX that a call may change; others go by the name of their class.
_KINDS = (
    (nnx.RngState, "random keys and counts"),
    (nnx.BatchStat, "batch statistics"),
    (nnx.Cache, "caches"),
    (nnx.Intermediate, "intermediates"),
)


@overload
def from_nnx(
    model: nnx.Module, method: _Method = None, *, state: Literal[False] | None = None
) -> tuple[Callable[..., Any], dict]: ...


@overload
def from_nnx(
    model: nnx.Module, method: _Method = None, *, state: Literal[True]
) -> tuple[Callable[..., Any], dict, dict]: ...


def from_nnx(model: nnx.Module, method: _Method = None, *, state: bool | None = None) -> tuple[Any, ...]:
    """Return an NNX module as (fn, params), or as (fn, params, state), ready for `wrap`.

    Args:
      model: the module; it is left as it is.
      method: what to call, such as `Model.encode`; by default the module itself.
      state: True for a function of what is no parameter too: `fn(params, state, *args, **kwargs) -> (out, state)`.
        Otherwise `fn(params, *args, **kwargs) -> out`, and each call finds that as it is in `model` now; False says
        that this is meant.

    Returns:
      `fn`, pure: its outputs, and the state after it, are those of the module itself, bit for bit. Only an `nnx.Rngs`
      that is given to a call (`rngs=`) advances, there as with the module.
      `params`: a plain dict of arrays, the values of all `nnx.Param`s and of its subclasses. A call that writes some,
      as weight norm does, leaves them as they are.
      `state`: the same of all else: random keys and counts, batch statistics, caches, arrays. A call leaves its
      structure as it is; variables that a call adds are dropped, with a warning.

    Raises:
      ValueError: without `state=True`, where such variables have no values (`nnx.eval_shape`).

    Warns:
      RsloraWarning: by default, where the module holds variables that are no parameters, by kind and path, or where a
        call changes an array that is no variable.

    >>> import jax.numpy as jnp
    >>> fn, params = from_nnx(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> sorted(params), fn(params, jnp.ones((2, 4))).shape
    (['bias', 'kernel'], (2, 3))
    >>> fn, params, state = from_nnx(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), state=True)
    >>> out, state = fn(params, state, jnp.ones((2, 4)))
    >>> params, int(state["rngs"]["count"])
    ({}, 1)
    """
    graph, *parts = nnx.split(model, nnx.Param, ...)
    weights, others = parts
    held, known = _values(others), _variables(others)
    if not state and (shapes := [path for path, value in held.items() if isinstance(value, jax.ShapeDtypeStruct)]):
        raise ValueError(
            f"the module has no values for {_named(shapes)}, which are no parameters: give them to each call, with "
            "`fn, params, state = from_nnx(model, state=True)`"
        )
    if state is None and (kinds := _by_kind(others)):
        warnings.warn(
            f"the module holds variables that are no parameters, and each call will find them as they are: {kinds}; "
            "to carry them on, take `fn, params, state = from_nnx(model, state=True)`, or else say state=False",
            RsloraWarning,
            stacklevel=2,
        )

    def call(params: Mapping, rest: Mapping, args: tuple, kwargs: dict) -> tuple[Any, dict[_Path, Any]]:
        given = _filled(others, rest)
        before = _values(given)
        module = nnx.merge(graph, _filled(weights, params), given)
        out = (module if method is None else method.__get__(module))(*args, **kwargs)
        new: Any = nnx.split(module, nnx.Param, ...)[-1]
        after = before | _values(new)  # what a call takes away stays
        if state:
            dropped = [path for path in after if path not in held]
        else:
            dropped = [path for path in held if path not in known and not same(before[path], after[path])]
        if dropped and state is not False:
            warnings.warn(
                f"a call of the module changes {_named(dropped)}, which the function that is made of it does not "
                "return",
                RsloraWarning,
                stacklevel=3,
            )
        return out, after

    def pure(params: Mapping, /, *args: Any, **kwargs: Any) -> Any:
        return call(params, _nested(held), args, kwargs)[0]

    def stateful(params: Mapping, state: Mapping, /, *args: Any, **kwargs: Any) -> tuple[Any, dict]:
        out, after = call(params, state, args, kwargs)
        return out, _nested({path: after[path] for path in held})

    return (stateful, _nested(_values(weights)), _nested(held)) if state else (pure, _nested(_values(weights)))


def _values(state: nnx.State) -> dict[_Path, Any]:
    """Return the values of a state by path, with no hooks run."""
    return {path: _raw(leaf) for path, leaf in nnx.to_flat_state(state)}


def _raw(leaf: Any) -> Any:
    return leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf


def _nested(flat: Mapping[_Path, Any]) -> dict:
    """Return a nested dict of values by path.

    >>> _nested({("layers", 0, "kernel"): 1, ("layers", 0, "bias"): 2})
    {'layers': {0: {'kernel': 1, 'bias': 2}}}
    """
    tree: dict = {}
    for path, value in flat.items():
        *steps, last = path
        node = tree
        for step in steps:
            node = node.setdefault(step, {})
        node[last] = value
    return tree


def _filled(state: nnx.State, tree: Mapping) -> nnx.State:
    """Return a state of new variables with the values of a nested dict; its numbers may have become strings."""

    def one(path: _Path, leaf: Any) -> Any:
        value: Any = tree
        for step in path:
            try:
                value = value[step] if step in value else value[str(step)]
            except KeyError:
                raise ValueError(f"there is no {_named([path])}, which the module has") from None
        return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value

    return nnx.from_flat_state((path, one(path, leaf)) for path, leaf in nnx.to_flat_state(state))


def _variables(state: nnx.State) -> set[_Path]:
    return {path for path, leaf in nnx.to_flat_state(state) if isinstance(leaf, nnx.Variable)}


def _by_kind(state: nnx.State) -> str:
    """Name the variables of a state, kind by kind.

    >>> _, state = nnx.split(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    >>> _by_kind(state)
    'random keys and counts (rngs/count, rngs/key)'
    """
    kinds: dict[str, list[_Path]] = {}
    for path, leaf in nnx.to_flat_state(state):
        if isinstance(leaf, nnx.Variable):
            kind = next((name for of, name in _KINDS if isinstance(leaf, of)), f"variables of {type(leaf).__name__}")
            kinds.setdefault(kind, []).append(path)
    return ", ".join(f"{kind} ({_named(paths)})" for kind, paths in kinds.items())


def _named(paths: Iterable[_Path]) -> str:
    """Write the first few paths.

    >>> _named([("layers", n, "mean") for n in range(5)])
    'layers/0/mean, layers/1/mean, layers/2/mean and 2 more'
    """
    names = ["/".join(map(str, path)) for path in paths]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
