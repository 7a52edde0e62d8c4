"""One update by any optimiser of optax: what it asks for beside the gradient, and which adapters are to be used."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import SAMState, ScheduleFreeState

from rslora_jax.train.gradient import Measured
from rslora_jax.wrap import Adapters, RsloraWarning


class WithSlow(NamedTuple):
    """Hold the state of an optimiser in which there is a lookahead: its slow adapters, and its own state."""

    slow: Adapters
    inner: Any


_AVERAGING = (ScheduleFreeState, SAMState, WithSlow)  # the states that hold other adapters to use than those trained


def begin(optimizer: optax.GradientTransformation, adapters: Adapters) -> Any:
    """Return an optimiser's first state, in memory of its own: a step gives the state's and the adapters' away.

    Raises:
      ValueError: the optimiser cannot train adapters; it is named.
    """
    try:
        state = optimizer.init(adapters)
        if any(isinstance(x, optax.LookaheadState) for x in _nodes(state, optax.LookaheadState)):
            state = WithSlow(adapters, optimizer.init(optax.LookaheadParams.init_synced(adapters)))
        state = own(state)
    except Exception as error:
        raise _refusal(optimizer, str(error)) from error
    for muon in _nodes(state, optax.contrib.MuonState):
        if isinstance(muon, optax.contrib.MuonState) and not jax.tree.leaves(muon.mu):
            warnings.warn(
                "muon takes arrays of two axes alone, and leaves all these adapters, which are stacks, to its Adam: "
                "give it muon_weight_dimension_numbers=train.muon_axes(lora)",
                RsloraWarning,
                stacklevel=3,
            )
    return state


def rehearse(optimizer: optax.GradientTransformation, adapters: Adapters) -> None:
    """Raise the ValueError of `update` where an optimiser cannot train adapters of these shapes; compute nothing."""

    def once(adapters: Adapters) -> Any:
        def value_fn(adapters: Adapters) -> Any:
            return optax.tree.norm(adapters, squared=True)

        measured = Measured(value_fn(adapters), jnp.ones(()), adapters, value_fn)
        return update(optimizer, begin(optimizer, adapters), adapters, measured)

    jax.eval_shape(once, adapters)


def own(tree: Any) -> Any:
    """Copy the arrays of a tree one by one, and make numbers arrays; only one is there twice at any time.

    Many a state holds the parameters, or a key that the optimiser keeps. Strong types, for a step's are: it would
    compile twice.
    """
    leaves, structure = jax.tree.flatten(tree)
    del tree
    for n, leaf in enumerate(leaves):
        leaves[n] = jnp.copy(leaf)
        if getattr(leaves[n], "weak_type", False):
            leaves[n] = jax.lax.convert_element_type(leaves[n], leaves[n].dtype)
    return jax.tree.unflatten(structure, leaves)


def update(
    optimizer: optax.GradientTransformation, state: Any, adapters: Adapters, measured: Measured
) -> tuple[Adapters, Any]:
    """Return the adapters and the optimiser's state after one update.

    By optax's protocol of extra arguments the optimiser is given, where it takes them, `value`, `grad`, `value_fn`,
    `grad_fn` (of sam) and `obj_fn` (of sophia). Functions that it does not call cost nothing.

    Raises:
      ValueError: the optimiser cannot train adapters; it is named.
    """
    slow = isinstance(state, WithSlow)
    inner, params = (state.inner, optax.LookaheadParams(adapters, state.slow)) if slow else (state, adapters)
    try:
        updates, inner = _call(optimizer, inner, params, measured)
    except Exception as error:
        raise _refusal(optimizer, str(error)) from error
    for got, want in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=False):
        if jnp.shape(got) != jnp.shape(want):
            raise _refusal(optimizer, f"it gave an update of shape {jnp.shape(got)} for one of {jnp.shape(want)}")
    structure: Any = jax.tree.structure(updates)
    if structure != jax.tree.structure(params):
        raise _refusal(optimizer, "its updates are of another structure than the adapters")
    moved = optax.apply_updates(params, updates)
    return (moved.fast, WithSlow(moved.slow, inner)) if slow else (moved, inner)


def _call(optimizer: optax.GradientTransformation, state: Any, params: Any, measured: Measured) -> Any:
    """Call an optimiser's update with those extra arguments that it takes."""

    def value_fn(adapters: Adapters, *, grad_fn: Any = None, obj_fn: Any = None) -> Any:
        # A line search refuses arguments that its objective has no place for.
        return measured.value_fn(adapters)

    extra = {
        "value": measured.value,
        "grad": measured.grads,
        "value_fn": value_fn,
        "grad_fn": lambda adapters, _=None: jax.grad(value_fn)(adapters),
        "obj_fn": measured.value_fn,
    }
    try:
        return optimizer.update(measured.grads, state, params, **taken_by(optimizer, extra))
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        # Not all of optax keeps to its protocol: sam, in a chain, takes this one and no other.
        return optimizer.update(measured.grads, state, params, grad_fn=extra["grad_fn"])


def taken_by(optimizer: optax.GradientTransformation, extra: dict[str, Any]) -> dict[str, Any]:
    """Return those extra arguments that an optimiser's update takes."""
    takes = inspect.signature(optimizer.update).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
        return extra
    return {name: what for name, what in extra.items() if name in takes}


def averages(opt_state: Any) -> bool:
    """Say whether an optimiser means other adapters to be used than those it trains."""
    return any(isinstance(x, _AVERAGING) for x in _nodes(opt_state, _AVERAGING))


def to_use(opt_state: Any, adapters: Adapters) -> Adapters:
    """Return the adapters that an optimiser means to be used where `adapters` are trained: mostly the same.

    With schedule-free ones it is the average, with lookahead the slow adapters, with sam those that were not shifted.
    """
    for state in _nodes(opt_state, _AVERAGING):
        if isinstance(state, WithSlow):
            adapters = state.slow
        elif isinstance(state, ScheduleFreeState):
            average = functools.partial(_average_unless_masked, jnp.asarray(state.b1))
            adapters = jax.tree.map(average, state.z, adapters, is_leaf=_is_masked)
        elif isinstance(state, SAMState) and state.cache is not None:
            at_rest = state.steps_since_sync == 0
            adapters = jax.tree.map(functools.partial(jnp.where, at_rest), adapters, state.cache)
    return adapters


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def _average_unless_masked(b1: Any, z: Any, y: Any) -> Any:
    return y if _is_masked(z) else _average(b1, z, y)


@jax.jit
def _average(b1: Any, z: Any, y: Any) -> Any:
    """Return x of y = (1 - b1) z + b1 x (arXiv 2405.15682), as `optax.contrib.schedule_free_eval_params` does."""
    return ((y - (1 - b1) * z) / b1).astype(y.dtype)


def _nodes(tree: Any, kinds: Any) -> list[Any]:
    """Return a tree's outermost nodes of some types, and its other leaves."""
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kinds))


def _refusal(optimizer: optax.GradientTransformation, why: str) -> ValueError:
    """Return the error that names an optimiser and says why it cannot train adapters."""
    name = _name_of(getattr(optimizer, "update", optimizer))
    why = " ".join(why.split("\n---")[0].split())  # JAX adds a note on its traceback
    return ValueError(f"the optimiser {name} cannot train adapters: {why}")


def _name_of(update: Any) -> str:
    """Name an optimiser as optax does, by the function that made it, and what it is put together from.

    >>> _name_of(optax.chain(optax.clip(1.0), optax.adam(1e-3)).update)
    'chain(clip, chain(scale_by_adam, scale))'
    """
    name = getattr(update, "__qualname__", type(update).__name__).split(".")[0]
    inner = [_name_of(function) for function in _updates_in(getattr(update, "__closure__", None) or ())]
    if name == "with_extra_args_support" and len(inner) == 1:
        return inner[0]
    return f"{name}({', '.join(inner)})" if inner else name


def _updates_in(cells: Any) -> Iterator[Any]:
    """Give the update functions of the optimisers that a closure holds."""
    for cell in cells:
        held = cell.cell_contents
        for one in held if type(held) in (tuple, list) else [held]:
            if isinstance(one, optax.GradientTransformation):
                yield one.update
            elif inspect.isfunction(one) and one.__qualname__.split(".")[-1] in ("update", "update_fn"):
                yield one
