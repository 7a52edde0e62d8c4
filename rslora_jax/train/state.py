"""One training step: the adapters and the optimiser's state move, the base stays."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from rslora_jax.kept import kept_with_lora
from rslora_jax.pytrees import Params, PyTree
from rslora_jax.store.keys import is_key, typed
from rslora_jax.train.carry import call_loss
from rslora_jax.train.gradient import Bind, Measured, mean_gradient
from rslora_jax.train.loss import Loss
from rslora_jax.train.update import begin, own, to_use, update
from rslora_jax.wrap import Adapters, Lora

Step = Callable[["TrainState", Any, Any], tuple["TrainState", dict[str, Array]]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Hold all that a step changes, and the key it draws from.

    Attributes:
      step: int32, how many batches are done.
      adapters: the adapters.
      opt_state: the optimiser's state, for the adapters alone.
      finite: bool. Once a loss or gradient was not, nothing moves any more, so the state stays the last good one
        however late that is noticed. With `skip` only that batch moves nothing, and this stays true.
      skipped: int32, how many batches were passed over in a row, up to the last.
      key: a typed PRNG key, or None; step n draws from `fold_in(key, n)`.
      model_state: what the model carries from call to call, any pytree of arrays, or None. It moves as the adapters do.
      dropout_key: a typed key, or None; the adapters' masks of step n, part m are drawn from it and the two numbers.
    """

    step: Array
    adapters: Adapters
    opt_state: PyTree
    finite: Array
    skipped: Array
    key: Array | None = None
    model_state: PyTree = None
    dropout_key: Array | None = None

    @classmethod
    def create(
        cls,
        adapters: Adapters,
        optimizer: optax.GradientTransformation,
        key: Array | None = None,
        model_state: PyTree = None,
        dropout_key: Array | None = None,
    ) -> TrainState:
        """Start at step 0 with copies of what is given: steps give their state's memory away.

        The optimiser's moments lie as the adapters do, and the rest is whole on every device of their mesh.

        Args:
          adapters: where to start, from `lora.init`.
          optimizer: any optax optimiser.
          key: for a loss that draws: typed or raw, of any implementation.
          model_state: what a model with state starts with, any pytree of arrays.
          dropout_key: for adapters with dropout (`LoraConfig.dropout`), a key as well.

        Raises:
          ValueError: the optimiser cannot train adapters, or a key is none.
        """
        adapters = own(adapters)
        key, dropout_key = (None if one is None else own(typed(one)) for one in (key, dropout_key))
        step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)  # two, since a step gives both away
        opt_state, finite = begin(optimizer, adapters), jnp.ones((), bool)
        state = cls(step, adapters, opt_state, finite, skipped, key, own(model_state), dropout_key)
        lies = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(adapters)]  # traced, an array does not say
        meshes = [sharding.mesh for sharding in lies if isinstance(sharding, NamedSharding)]
        if not meshes:
            return state
        everywhere = NamedSharding(meshes[0], PartitionSpec())

        def put(leaf: Array) -> Array:
            return leaf if isinstance(leaf.sharding, NamedSharding) else jax.device_put(leaf, everywhere)

        return jax.tree.map(put, state)

    @property
    def to_use(self) -> Adapters:
        """The adapters to evaluate and to keep: those trained, unless the optimiser means others to be used.

        These are the average of a schedule-free optimiser, the slow ones of lookahead, and with sam those that were
        not shifted. Where the state has a first axis of devices or trials, `jax.vmap(lambda state: state.to_use)`.
        """
        return to_use(self.opt_state, self.adapters)


def make_step(
    lora: Lora,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    skip: bool = False,
    shardings: TrainState | None = None,
) -> Step:
    """Make the compiled step `(state, params, batch) -> (state, metrics)`.

    The state's memory is donated. The base parameters are an argument, not a constant of the program.
    Metrics, all scalars: "loss" (mean, nats), "tokens" with loss, "grad_norm" (before the optimiser), "skipped".

    Args:
      lora: from `wrap`.
      loss: `loss(run, batch) -> (sum, count)`, or `loss(run, batch, key)` where the state has a key. Where it has a
        model state, `loss(run, batch, model_state[, key]) -> (sum, count, model_state)`.
      optimizer: any optax optimiser.
      accumulate: in how many parts to take a batch, one after the other, for less memory; the result is that of
        the whole batch, to rounding. Every array of the batch has its rows first, in a multiple of this number; a
        scalar is given whole to each part.
      skip: pass over a batch whose loss or gradient is not finite, in place of staying at the state before it.
      shardings: where each array of the state lies, and so is to lie after the step; by default XLA decides.

    >>> import numpy as np, rslora_jax as rslora
    >>> lora = rslora.wrap(lambda p, x: x @ p["w"], {"w": jnp.ones((4, 4))}, jnp.ones((2, 4)),
    ...                    config=rslora.LoraConfig(rank=2, alpha=3))
    >>> squares = lambda run, batch: (jnp.sum((run(batch) - 1) ** 2), jnp.float32(batch.size))
    >>> step = make_step(lora, squares, optax.adam(1e-2), accumulate=2)
    >>> state = TrainState.create(lora.init(jax.random.key(0)), optax.adam(1e-2))
    >>> for _ in range(5):
    ...     state, metrics = step(state, {"w": jnp.ones((4, 4))}, np.ones((2, 4), np.float32))
    >>> int(state.step), float(metrics["loss"]) < 9
    (5, True)
    """

    leaves, tree = jax.tree.flatten(shardings)
    return _make_step(lora, loss, optimizer, accumulate, skip, tuple(leaves), tree)


@kept_with_lora  # so that a second call in a notebook compiles nothing again
def _make_step(
    lora: Lora,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    accumulate: int,
    skip: bool,
    leaves: tuple[Sharding, ...],
    tree: PyTree,
) -> Step:
    kept = (jax.tree.unflatten(tree, leaves), None) if leaves else None

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=kept)
    def step(state: TrainState, params: Params, batch: PyTree) -> tuple[TrainState, dict[str, Array]]:
        measured = mean_gradient(
            loss, bound(lora, params, state), state.adapters, batch, parts=accumulate, **drawn(state)
        )
        return advance(optimizer, state, measured, skip)

    return step


def bound(lora: Lora, params: Params, state: TrainState | None = None) -> Bind:
    """Return what binds adapters to a model over one base; with dropout, for a step of this state.

    Raises:
      ValueError: the config asks for dropout, and the state has no key to draw from.
    """
    if not lora.config.dropout or state is None:
        return lambda adapters, number: functools.partial(lora.apply, params, adapters)
    if state.dropout_key is None:
        raise ValueError(
            f"the config asks for dropout={lora.config.dropout:g}, and the state has no key to draw from: "
            "TrainState.create(..., dropout_key=jax.random.key(0))"
        )
    key = jax.random.fold_in(state.dropout_key, state.step)

    def bind(adapters: Adapters, number: Any) -> Callable[..., Any]:
        return functools.partial(lora.apply, params, adapters, dropout_key=jax.random.fold_in(key, number))

    return bind


def drawn(state: TrainState) -> dict[str, Any]:
    """Return the key that the next step draws from, and the model's state, where there are such."""
    key = None if state.key is None else jax.random.fold_in(state.key, state.step)
    return {"key": key, "model_state": state.model_state}


def advance(
    optimizer: optax.GradientTransformation, state: TrainState, measured: Measured, skip: bool
) -> tuple[TrainState, dict[str, Array]]:
    """Return the state after a step, and its metrics, from what a batch says."""
    norm = optax.tree.norm(measured.grads)
    moves = jnp.isfinite(measured.value) & jnp.isfinite(norm) & state.finite
    updated = update(optimizer, state.opt_state, state.adapters, measured)
    new, old = (*updated, measured.model_state), (state.adapters, state.opt_state, state.model_state)
    adapters, opt_state, model_state = _keep(moves, new, old)
    skipped = jnp.where(moves, 0, state.skipped + 1)
    done = state.step + (1 if skip else moves.astype(jnp.int32))
    finite = state.finite if skip else moves
    metrics = {"loss": measured.value, "grad_norm": norm, "tokens": measured.tokens, "skipped": skipped}
    moved = dataclasses.replace(state, step=done, adapters=adapters, opt_state=opt_state, finite=finite)
    return dataclasses.replace(moved, skipped=skipped, model_state=model_state), metrics


def _keep(moves: Array, new: Any, old: Any) -> Any:
    """Return `new` where `moves`, else `old`, in the old one's dtypes: a step's result is the next one's argument."""

    def one(new: Any, old: Any) -> Array:
        chosen = jnp.where(moves, new, old)
        return chosen if is_key(old) else lax.convert_element_type(chosen, old.dtype)

    return jax.tree.map(one, new, old)


def first_state(
    lora: Lora,
    adapters: Adapters,
    optimizer: optax.GradientTransformation,
    *,
    key: Array | None = None,
    model_state: PyTree = None,
    dropout_key: Array | None = None,
) -> TrainState:
    """Start a run at step 0, as `TrainState.create`, with the key for dropout where the config asks for it.

    Without one that is `jax.random.key(0)`.
    """
    if lora.config.dropout and dropout_key is None:
        dropout_key = jax.random.key(0)
    return TrainState.create(adapters, optimizer, key, model_state, dropout_key if lora.config.dropout else None)


def lies(state: TrainState) -> TrainState | None:
    """Return where each array of a state lies, if it lies on a mesh."""
    on_mesh = all(isinstance(leaf.sharding, NamedSharding) for leaf in jax.tree.leaves(state))
    return jax.tree.map(lambda leaf: leaf.sharding, state) if on_mesh else None


def make_pmap_step(
    lora: Lora, loss: Loss, optimizer: optax.GradientTransformation, *, accumulate: int = 1, skip: bool = False
) -> Step:
    """Make the step of `make_step` for `jax.pmap`: everything is replicated, and each device takes its own batch.

    State, base and batch have a leading axis of devices (`replicate`). The gradients are means over the tokens of
    all devices. A model's state is each device's own, but that its floating numbers, such as batch statistics, are
    averaged after each step. `jit` on a mesh does this and more, with the statistics of the whole batch; this is for
    programs built on pmap.
    """

    @functools.partial(jax.pmap, axis_name="devices", donate_argnums=0)
    def step(state: TrainState, params: Params, batch: PyTree) -> tuple[TrainState, dict[str, Array]]:
        bind, given = bound(lora, params, state), drawn(state)
        measured = mean_gradient(loss, bind, state.adapters, batch, parts=accumulate, axis="devices", **given)
        return advance(optimizer, state, measured, skip)

    return step


def replicate(tree: PyTree) -> PyTree:
    """Give every array a leading axis of devices, with a copy of it on each, for `make_pmap_step`.

    >>> replicate({"w": jnp.ones((2, 3))})["w"].shape == (jax.local_device_count(), 2, 3)
    True
    """
    return jax.pmap(lambda _: tree)(jnp.arange(jax.local_device_count()))


@kept_with_lora
def make_evaluate(lora: Lora, loss: Loss, *, keyed: bool = False) -> Callable[..., tuple[Array, Array]]:
    """Make the compiled `evaluate(params, adapters, batch, model_state=None) -> (sum of the losses, their number)`.

    A loss that takes a key (`keyed`) is given None for it: nothing is to be drawn. A model's state is read, and what
    the loss returns of it is dropped.
    """

    @jax.jit
    def evaluate(params: Params, adapters: Adapters, batch: PyTree, model_state: PyTree = None) -> tuple[Array, Array]:
        run = functools.partial(lora.apply, params, adapters)
        return call_loss(loss, run, batch, model_state, *((None,) if keyed else ()))[:2]

    return evaluate
