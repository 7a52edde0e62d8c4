"""One training step: the adapters and the optimiser's state move, the base stays."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rslora_jax.train.loss import Loss
from rslora_jax.wrap import Adapters, Lora

Step = Callable[["TrainState", Any, Any], tuple["TrainState", dict[str, Array]]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Hold all that a step changes.

    Attributes:
      step: int32, how many steps are done.
      adapters: the adapters.
      opt_state: the optimiser's state, for the adapters alone.
      finite: bool, whether every loss and gradient so far was. Once it is not, nothing moves any more, so the
        state stays the last good one however late that is noticed.
    """

    step: Array
    adapters: Adapters
    opt_state: Any
    finite: Array

    @classmethod
    def create(cls, adapters: Adapters, optimizer: optax.GradientTransformation) -> TrainState:
        """Start at step 0 with copies of `adapters`: steps give their state's memory away."""
        adapters = jax.tree.map(jnp.copy, adapters)
        return cls(jnp.zeros((), jnp.int32), adapters, optimizer.init(adapters), jnp.ones((), bool))


@functools.lru_cache(maxsize=8)  # so that a second call in a notebook compiles nothing again
def make_step(lora: Lora, loss: Loss, optimizer: optax.GradientTransformation) -> Step:
    """Make the compiled step `(state, params, batch) -> (state, metrics)`.

    The state's memory is donated. The base parameters are an argument, not a constant of the program.
    Metrics, all float32 scalars: "loss" (mean, nats), "tokens" with loss, "grad_norm" (before the optimiser).

    >>> import numpy as np, rslora_jax as rslora
    >>> lora = rslora.wrap(lambda p, x: x @ p["w"], {"w": jnp.ones((4, 4))}, jnp.ones((2, 4)),
    ...                    config=rslora.LoraConfig(rank=2, alpha=3))
    >>> squares = lambda run, batch: (jnp.sum((run(batch) - 1) ** 2), jnp.float32(batch.size))
    >>> step = make_step(lora, squares, optax.adam(1e-2))
    >>> state = TrainState.create(lora.init(jax.random.key(0)), optax.adam(1e-2))
    >>> for _ in range(5):
    ...     state, metrics = step(state, {"w": jnp.ones((4, 4))}, np.ones((2, 4), np.float32))
    >>> int(state.step), float(metrics["loss"]) < 9
    (5, True)
    """

    def mean_loss(adapters: Adapters, params: Any, batch: Any) -> tuple[Array, Array]:
        total, count = loss(functools.partial(lora.apply, params, adapters), batch)
        # A batch may hold no token with loss, such as the filling of a last batch.
        return total / jnp.maximum(count, 1), count

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, params: Any, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        (value, count), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.adapters, params, batch)
        norm = optax.tree.norm(grads)
        finite = state.finite & jnp.isfinite(value) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.adapters)
        moved = (state.step + 1, optax.apply_updates(state.adapters, updates), opt_state)
        stayed = (state.step, state.adapters, state.opt_state)
        number, adapters, opt_state = jax.tree.map(functools.partial(jnp.where, finite), moved, stayed)
        return TrainState(number, adapters, opt_state, finite), {
            "loss": value,
            "grad_norm": norm,
            "tokens": count,
        }

    return step


@functools.lru_cache(maxsize=8)
def make_evaluate(lora: Lora, loss: Loss) -> Callable[[Any, Adapters, Any], float]:
    """Make `evaluate(params, adapters, batches) -> mean loss over all tokens of all batches` (nats)."""

    @jax.jit
    def one(params: Any, adapters: Adapters, batch: Any) -> tuple[Array, Array]:
        return loss(functools.partial(lora.apply, params, adapters), batch)

    def evaluate(params: Any, adapters: Adapters, batches: Any) -> float:
        sums = [one(params, adapters, batch) for batch in batches]
        total, count = (sum(float(s[n]) for s in sums) for n in (0, 1))
        if not count:
            raise ValueError("the held-out batches hold no token with loss: give at least one example")
        return total / count

    return evaluate
