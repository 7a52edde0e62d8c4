"""Adapters held in few bits, trained in float32: an optimiser that keeps what their rounding loses."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Masters(NamedTuple):
    """Hold the state of `float32_masters`: the float32 parameters, and the state of what moves them."""

    parameters: Any
    inner: Any


def float32_masters(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Make an optimiser train float32 copies of the parameters it is given, which follow them rounded.

    A bfloat16 number has 8 bits: a step of less than a 512th of it is rounded away, so with a small learning rate
    nothing moves. Mixed precision keeps a master copy for that (arXiv 1710.03740, section 3.1). Put it around the
    whole optimiser, clipping and weight decay included. Parameters that hold more bits already gain nothing.

    Args:
      optimizer: any optax optimiser; it sees float32 gradients and parameters.

    Returns:
      An optimiser for parameters of any floating dtype; its state holds 4 bytes a parameter more.

    >>> parameters, steps = jnp.ones(3, jnp.bfloat16), float32_masters(optax.sgd(1e-3))
    >>> state = steps.init(parameters)
    >>> for _ in range(8):
    ...     updates, state = steps.update(jnp.ones(3, jnp.bfloat16), state, parameters)
    ...     parameters = optax.apply_updates(parameters, updates)
    >>> float(parameters[0]), round(float(state.parameters[0]), 4)
    (0.9921875, 0.992)
    """
    inner = optax.with_extra_args_support(optimizer)

    # Copies, also of what is float32 already: a step gives the memory of its state and of the parameters away.
    def in_float32(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), tree)

    def init(params: Any) -> Masters:
        masters = in_float32(params)
        return Masters(masters, inner.init(masters))

    def update(updates: Any, state: Masters, params: Any = None, **extra: Any) -> tuple[Any, Masters]:
        if params is None:
            raise ValueError("float32_masters needs the parameters: call update(updates, state, params)")
        moves, inner_state = inner.update(in_float32(updates), state.inner, state.parameters, **extra)
        masters = optax.apply_updates(state.parameters, moves)
        # What makes of the parameters their masters, rounded; in float32, or `apply_updates` would round twice.
        return jax.tree.map(lambda m, p: m - p.astype(jnp.float32), masters, params), Masters(masters, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
