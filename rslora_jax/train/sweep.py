"""Many runs at once over one copy of the base, in one compiled program."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from rslora_jax.kept import kept_with_lora
from rslora_jax.methods.method import rescaled
from rslora_jax.pytrees import Params, PyTree
from rslora_jax.scaling import gamma
from rslora_jax.sites import Site
from rslora_jax.store.keys import typed
from rslora_jax.train.batch_stream import Numbered
from rslora_jax.train.carry import call_loss
from rslora_jax.train.gradient import mean_gradient
from rslora_jax.train.loss import Loss
from rslora_jax.train.ratio import ratio
from rslora_jax.train.state import TrainState, advance, bound, drawn
from rslora_jax.train.update import to_use
from rslora_jax.wrap import Adapters, Lora

_Factors = dict[str, Array] | None
_Step = Callable[[TrainState, Array, _Factors, Any, Any], tuple[TrainState, dict[str, Array]]]


@dataclasses.dataclass(frozen=True)
class Trial:
    """Say in what one run of a sweep differs from the others.

    Attributes:
      learning_rate: what the sweep's `optimizer` is made with.
      seed: of the adapters and of the order of the data.
      scaling: as in `LoraConfig`; None for that of the `Lora` that is swept.

    Raises:
      ValueError: the learning rate is not a number above 0.
    """

    learning_rate: float
    seed: int = 0
    scaling: str | Callable[[int], float] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"the learning rate {self.learning_rate} of a trial is not a number above 0")


class Heldout(NamedTuple):
    """Hold a mean loss per token on held-out data, in nats, and its standard error over the batches (NaN for one)."""

    loss: float
    error: float


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a trial; `[n]` of the arrays is step n + 1.

    Attributes:
      trial: the trial.
      losses: mean training loss of each batch, in nats, before that step's change.
      grad_norms: norm of the gradient of all factors together.
      factor_norms: mean over all factors A and B, each layer's apart, of the norm of its gradient (arXiv 2312.03732,
        fig. 3).
      heldout: held-out loss by the number of steps done.
      diverged: the first step whose loss or gradient was not finite, or None. From there on nothing moved.
      adapters: the last, for `lora.config` with the trial's scaling.
      model_state: what the model carries on after the last step, where it has state.
    """

    trial: Trial
    losses: np.ndarray
    grad_norms: np.ndarray
    factor_norms: np.ndarray
    heldout: Mapping[int, Heldout]
    diverged: int | None
    adapters: Adapters
    model_state: PyTree = None


def sweep(
    lora: Lora,
    params: Params,
    trials: Sequence[Trial],
    *,
    batches: Callable[[int], Numbered],
    loss: Loss,
    optimizer: Callable[[Any], optax.GradientTransformation],
    steps: int,
    heldout: Iterable[PyTree] = (),
    evaluate_at: Collection[int] | None = None,
    key: Array | None = None,
    heldout_loss: Loss | None = None,
    model_state: PyTree = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
    """Train several runs of one rank together, by `vmap` over all that differs; the base is there once.

    Each trial ends where `make_step` alone would take it, to rounding. One that diverges stays where it was, and
    disturbs no other. As all of one call are in one program, ranks go in calls of their own.

    Args:
      lora: from `wrap`. A trial of another scaling has its B multiplied by the ratio of the two gammas where it is
        applied, so its gradients and optimiser are those of that scaling.
      params: the base.
      trials: the runs; their memory, other than the base's, adds up.
      batches: `batches(seed)[n]` is the batch of step n for the trials of that seed, of one shape for all.
      loss: such as `token_loss(rows.places)`.
      optimizer: makes an optax optimiser of a learning rate, which is an array here:
        `lambda rate: make_optimizer("adamw", schedule=rate)`, or `schedule=lambda step: rate * shape(step)`.
      steps: of each trial.
      heldout: batches to evaluate on.
      evaluate_at: after how many steps, 0 for before the first; by default after the last.
      key: a PRNG key, for a loss that takes one, as in `fit`: a trial's steps draw from `fold_in(key, seed)`, as
        they would alone with a threefry key. Of "rbg" JAX draws others under `vmap`.
      heldout_loss, model_state: as in `fit`; every trial starts with this state and has its own from there on.
      progress: called with (steps done, steps), when a step is done.

    Returns:
      An outcome for each trial, in order.

    Raises:
      ValueError: there are no trials or steps, a scaling is unknown, or `evaluate_at` has a step that there is not.

    >>> import numpy as np, rslora_jax as rslora
    >>> lora = rslora.wrap(lambda p, x: x @ p["w"], {"w": jnp.ones((4, 4))}, jnp.ones((2, 4)),
    ...                    config=rslora.LoraConfig(rank=2, alpha=3))
    >>> squares = lambda run, batch: (jnp.sum((run(batch) - 1) ** 2), jnp.float32(batch.size))
    >>> trials = [Trial(1e-2), Trial(1e-1), Trial(1e-1, scaling="lora")]
    >>> batches = lambda seed: [np.random.default_rng(seed).normal(size=(2, 4)).astype("float32")] * 5
    >>> found = sweep(lora, {"w": jnp.ones((4, 4))}, trials, batches=batches, loss=squares,
    ...               optimizer=optax.adam, steps=5)
    >>> [o.diverged for o in found], bool(found[0].losses[-1] > found[1].losses[-1])
    ([None, None, None], True)
    """
    evaluate_at = {steps} if evaluate_at is None else set(evaluate_at)
    if not trials or steps < 1:
        raise ValueError(f"a sweep of {len(trials)} trials and {steps} steps: it needs at least one of each")
    if not evaluate_at <= set(range(steps + 1)):
        raise ValueError(f"evaluate_at has {max(evaluate_at, key=abs)}, which is no step of 0 to {steps}")
    rates = jnp.asarray([trial.learning_rate for trial in trials], jnp.float32)
    factors = scaling_factors(lora, trials)
    step = make_sweep_step(lora, loss, optimizer)
    state = starting_states(lora, trials, optimizer, rates, key, model_state, params)
    evaluate = make_sweep_evaluate(lora, heldout_loss or loss, keyed=key is not None)
    look = functools.partial(_heldout_sums, evaluate, factors, params, list(heldout))
    sources = {trial.seed: batches(trial.seed) for trial in trials}
    sums = {0: look(state)} if 0 in evaluate_at else {}
    records: list[dict[str, Any]] = []

    def finish(metrics: dict[str, Array]) -> None:
        """Wait for a step; the device may be at work on the next."""
        records.append(jax.device_get(metrics))
        if progress is not None:
            progress(len(records), steps)

    pending: dict[str, Array] | None = None
    for n in range(steps):
        by_seed = {seed: source[n] for seed, source in sources.items()}
        batch = stack([by_seed[trial.seed] for trial in trials])
        state, metrics = step(state, rates, factors, params, batch)
        if pending is not None:
            finish(pending)
        pending = metrics
        if n + 1 in evaluate_at:
            sums[n + 1] = look(state)
    finish(metrics)
    return _outcomes(trials, state, records, {at: found for at, found in sums.items() if found})


def _heldout_sums(
    evaluate: Callable[..., Any], factors: _Factors, params: Params, batches: Sequence[Any], state: TrainState
) -> list[Any]:
    """Return (sums of the losses, counts) of all trials for each held-out batch."""
    adapters = jax.vmap(to_use)(state.opt_state, state.adapters)
    score = functools.partial(evaluate, adapters, factors, params)
    return [jax.device_get(score(batch, model_state=state.model_state)) for batch in batches]


def _outcomes(
    trials: Sequence[Trial], state: TrainState, records: Sequence[Mapping[str, Any]], sums: Mapping[int, Sequence[Any]]
) -> list[Outcome]:
    """Take apart what all trials came to, by their last state, their steps' metrics and their held-out sums."""
    adapters = jax.vmap(to_use)(state.opt_state, state.adapters)
    series = {name: np.stack([record[name] for record in records]) for name in records[0]}

    def outcome(k: int) -> Outcome:
        bad = np.flatnonzero(series["skipped"][:, k])
        return Outcome(
            trial=trials[k],
            losses=series["loss"][:, k],
            grad_norms=series["grad_norm"][:, k],
            factor_norms=series["factor_norm"][:, k],
            heldout={at: mean_loss(np.array([[s[k], c[k]] for s, c in found])) for at, found in sums.items()},
            diverged=int(bad[0]) + 1 if len(bad) else None,
            adapters=jax.tree.map(lambda leaf: leaf[k], adapters),
            model_state=jax.tree.map(lambda leaf: leaf[k], state.model_state),
        )

    return [outcome(k) for k in range(len(trials))]


def starting_states(
    lora: Lora,
    trials: Sequence[Trial],
    optimizer: Callable[[Any], Any],
    rates: Array,
    key: Array | None = None,
    model_state: PyTree = None,
    params: Params = None,
) -> TrainState:
    """Return the states of all trials as one, with a first axis of trials."""
    adapters = stack([lora.init(jax.random.key(trial.seed), params) for trial in trials], jnp)
    keys = None if key is None else jnp.stack([jax.random.fold_in(typed(key), trial.seed) for trial in trials])

    drops = jnp.stack([jax.random.key(trial.seed) for trial in trials]) if lora.config.dropout else None

    def create(
        adapters: Adapters, rate: Array, key: Array | None, model_state: PyTree, drop: Array | None
    ) -> TrainState:
        return TrainState.create(adapters, optimizer(rate), key, model_state, drop)

    # The model's state, too, gets an axis of trials, though they all begin with one.
    trials_of = jax.vmap(create, in_axes=(0, 0, 0, None, 0))
    return jax.jit(trials_of, donate_argnums=0)(adapters, rates, keys, model_state, drops)


def scaling_factors(lora: Lora, trials: Sequence[Trial]) -> _Factors:
    """Return, by path, what B is to be multiplied by in each trial; None where all have the `Lora`'s scaling.

    The gammas are each site's own, as ranks and alphas may differ by pattern.
    """
    if all(trial.scaling in (None, lora.config.scaling) for trial in trials):
        return None

    def ratio(site: Site, trial: Trial) -> Any:
        scaling = lora.config.scaling if trial.scaling is None else trial.scaling
        return site.by_layer(lambda layer: gamma(layer.rank, layer.alpha, scaling) / layer.gamma)

    return {
        path: jnp.asarray([ratio(site, trial) for trial in trials], jnp.float32)
        for path, site in lora.sites.items()
        if site.scaled
    }


@kept_with_lora  # so that a second sweep of the same shapes compiles nothing
def make_sweep_step(lora: Lora, loss: Loss, optimizer: Callable[[Any], optax.GradientTransformation]) -> _Step:
    """Make the compiled step `(state, rates, factors, params, batch) -> (state, metrics)` of all trials.

    All but `params` have a first axis of trials. The state's memory is donated.
    """

    def one(state: TrainState, rate: Array, factors: _Factors, params: Params, batch: PyTree) -> Any:
        plain = bound(lora, params, state)

        def bind(adapters: Adapters, number: Any) -> Any:
            return plain(_scaled(lora, adapters, factors), number)

        measured = mean_gradient(loss, bind, state.adapters, batch, **drawn(state))
        state, metrics = advance(optimizer(rate), state, measured, skip=False)
        return state, metrics | {"factor_norm": _factor_norm(lora, measured.grads)}

    return jax.jit(jax.vmap(one, in_axes=(0, 0, 0, None, 0)), donate_argnums=0)


def make_sweep_evaluate(lora: Lora, loss: Loss, *, keyed: bool = False) -> Callable[..., tuple[Array, Array]]:
    """Make the compiled `(adapters, factors, params, batch, model_state=None) -> (sums, counts)` of all trials.

    A loss that takes a key (`keyed`) is given None for it.
    """
    return _make_sweep_evaluate(lora, loss, keyed)


@kept_with_lora
def _make_sweep_evaluate(lora: Lora, loss: Loss, keyed: bool) -> Any:
    def one(
        adapters: Adapters, factors: _Factors, params: Params, batch: PyTree, model_state: PyTree
    ) -> tuple[Array, Array]:
        run = functools.partial(lora.apply, params, _scaled(lora, adapters, factors))
        return call_loss(loss, run, batch, model_state, *((None,) if keyed else ()))[:2]

    # A count that is the same for all trials would have no axis of theirs.
    of_all = jax.vmap(one, in_axes=(0, 0, None, None, 0), out_axes=0)
    return jax.jit(lambda *given, model_state=None: of_all(*given, model_state))  # type: ignore[call-arg]


def _scaled(lora: Lora, adapters: Adapters, factors: _Factors) -> Adapters:
    """Return adapters that do what they would with their path's gamma so many times as large."""
    if factors is None:
        return adapters
    scaled = {path: rescaled(lora.sites[path], adapters[path], factor) for path, factor in factors.items()}
    return {**adapters, **scaled}


def _factor_norm(lora: Lora, grads: Adapters) -> Array:
    """Return the mean norm of a factor, where each slice along a stack axis (a scan's layer) is a factor.

    >>> import rslora_jax as rslora
    >>> lora = rslora.wrap(lambda p, x: x @ p["w"], {"w": jnp.ones((4, 4))}, jnp.ones((2, 4)),
    ...                    config=rslora.LoraConfig(rank=1))
    >>> float(_factor_norm(lora, {"w": {"a": jnp.zeros((4, 1)), "b": jnp.ones((1, 4))}}))
    1.0
    """
    norms = [
        jnp.sqrt(jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=range(len(site.stack_axes), leaf.ndim))).ravel()
        for path, site in lora.sites.items()
        if site.scaled  # a value that is trained whole is no factor
        for leaf in grads[path].values()
    ]
    return jnp.mean(jnp.concatenate(norms)) if norms else jnp.zeros(())


def mean_loss(sums_Kx2: np.ndarray) -> Heldout:
    """Return the mean of K batches' (sum of losses, number), and its standard error, as `ratio` has them.

    >>> mean_loss(np.array([[2.0, 2], [6.0, 2]]))
    Heldout(loss=2.0, error=1.0)
    """
    sums, counts = np.asarray(sums_Kx2, np.float64).T
    if not counts.sum():
        raise ValueError("the held-out batches hold no token with loss: give at least one example")
    return Heldout(*ratio(sums, counts))


def stack(trees: Sequence[Any], of: Any = np) -> Any:
    """Stack pytrees of equal shapes on a new first axis."""
    return jax.tree.map(lambda *leaves: of.stack(leaves), *trees)
