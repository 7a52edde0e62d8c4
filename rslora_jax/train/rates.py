"""One learning rate for all ranks: how far an optimiser of Adam's kind goes with an adapter of each rank."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
import optax

from rslora_jax.layers import Layer
from rslora_jax.scaling import gamma
from rslora_jax.wrap import Lora


def lora_plus(lora: Lora, ratio: float = 16.0) -> optax.GradientTransformation:
    """Give B a learning rate so many times A's: LoRA+ (arXiv 2402.12354; section 5 advises 16 for LoRA's own start).

    Put it behind the optimiser; it has no state. The rate of all else, such as DoRA's magnitudes, stays A's.

    Args:
      lora: whose adapters are trained.
      ratio: B's rate over A's.

    Raises:
      ValueError: the ratio is no positive number, or no array of the adapters is a B.

    >>> import jax.numpy as jnp
    >>> from rslora_jax import LoraConfig, wrap
    >>> lora = wrap(lambda p, x: x @ p["w"], {"w": jnp.ones((8, 8))}, jnp.ones((1, 8)), config=LoraConfig(rank=2))
    >>> optimizer = optax.chain(optax.sgd(0.5), lora_plus(lora, 4.0))
    >>> adapters = lora.init(jax.random.key(0))
    >>> updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, adapters), optimizer.init(adapters))
    >>> float(updates["w"]["a"][0, 0]), float(updates["w"]["b"][0, 0])
    (-0.5, -2.0)
    """
    if not 0 < ratio < math.inf:
        raise ValueError(f"ratio={ratio} is no ratio of rates: give a number above 0, such as 16")
    labels = lora.labels()
    if "out" not in jax.tree.leaves(labels):
        raise ValueError("LoRA+ is for adapters with a factor B, and this method has none: leave it out")

    def update(updates: Any, params: Any = None) -> Any:
        return jax.tree.map(lambda x, label: ratio * x if label == "out" else x, updates, labels)

    return optax.stateless(update)


def frozen(lora: Lora, optimizer: optax.GradientTransformation, *labels: str) -> optax.GradientTransformation:
    """Train some of the adapters' arrays and leave the others as they are: A frozen is LoRA-FA (arXiv 2308.03303).

    No moments are kept of what is frozen.

    Args:
      lora: whose adapters are trained.
      optimizer: of the rest.
      *labels: what is frozen, by the names that `lora.labels()` gives: "in" for A, "out" for B.

    Raises:
      ValueError: no array has such a label, or nothing is left to train.

    >>> import jax.numpy as jnp
    >>> from rslora_jax import LoraConfig, wrap
    >>> lora = wrap(lambda p, x: x @ p["w"], {"w": jnp.ones((8, 8))}, jnp.ones((1, 8)), config=LoraConfig(rank=2))
    >>> optimizer = frozen(lora, optax.sgd(0.5), "in")
    >>> adapters = lora.init(jax.random.key(0))
    >>> updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, adapters), optimizer.init(adapters))
    >>> float(updates["w"]["a"][0, 0]), float(updates["w"]["b"][0, 0])
    (0.0, -0.5)
    """
    names = lora.labels()
    known = {*jax.tree.leaves(names)}
    for label in labels:
        if label not in known:
            raise ValueError(
                f"no array of these adapters is labelled {label!r}: freeze one of {', '.join(sorted(known))}"
            )
    if known <= {*labels}:
        raise ValueError(f"with {', '.join(sorted(known))} frozen nothing is left to train: freeze fewer")
    still = jax.tree.map(lambda name: name in labels, names)
    return optax.multi_transform({True: optax.set_to_zero(), False: optimizer}, still)


def scale_by_rank(lora: Lora, *, reference_rank: int = 8) -> optax.GradientTransformation:
    """Make the learning rate that is right at one rank serve adapters of every rank, for optimisers of Adam's kind.

    Where updates do not depend on the gradient's size, as with Adam, Lion or Adafactor, the best learning rate goes
    like (gamma r)^-1/2 (arXiv 2602.06204): with rsLoRA like r^-1/4, with LoRA it is the same for all ranks. So each
    adapter's update is multiplied by that, over its value at the reference. `docs/paper` has what was measured. Put it
    behind the optimiser; it has no state. It is not for SGD, where with rsLoRA the change of the weight in a step is
    of one size at all ranks (arXiv 2312.03732, theorem 3.2). What is trained whole has no rank, and keeps its rate.

    Args:
      lora: gives each adapter's rank, which patterns may have made several, and the scaling. Alpha has no part in it.
      reference_rank: where the factor is one: the rank at which the learning rate was found.

    Returns:
      A transformation of updates, a pytree as of `lora.init`.

    Raises:
      ValueError: the reference is no rank.

    >>> import jax.numpy as jnp
    >>> from rslora_jax import LoraConfig, wrap
    >>> W = {"kernel": jnp.ones((64, 64))}
    >>> lora = wrap(lambda p, x: x @ p["kernel"], W, jnp.ones((1, 64)), config=LoraConfig(rank=32, alpha=16))
    >>> optimizer = optax.chain(optax.adamw(1e-3), scale_by_rank(lora, reference_rank=2))
    >>> adapters = lora.init(jax.random.key(0))
    >>> updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, adapters), optimizer.init(adapters), adapters)
    >>> round(float(updates["kernel"]["b"].mean()), 7)  # -1e-3 * (32 / 2)^-1/4
    -0.0005
    """
    if reference_rank < 1:
        raise ValueError(f"reference_rank={reference_rank} is no rank: give the one at which the rate was found")

    def strength(rank: int) -> float:
        return rank * gamma(rank, 1.0, lora.config.scaling)

    def factor(layer: Layer) -> float:
        return math.sqrt(strength(reference_rank) / strength(layer.rank))

    factors = {path: site.by_layer(factor) for path, site in lora.sites.items() if site.scaled}

    def one(path: str, own: Any) -> Any:
        return jax.tree.map(lambda x: _times(factors[path], x), own) if path in factors else own

    def update(updates: Any, params: Any = None) -> Any:
        return {path: one(path, own) for path, own in updates.items()}

    return optax.stateless(update)


def _times(by: Any, x: Any) -> Any:
    """Multiply by a number, or by one for each element of the axes that are in front."""
    shape = getattr(by, "shape", ())
    return by * x if not shape else by.reshape(shape + (1,) * (x.ndim - len(shape))).astype(x.dtype) * x


def rates_of(schedule: optax.ScalarOrSchedule | None, steps: int) -> np.ndarray | None:
    """Return the learning rate of each step, from 0, taken at once: on its way a run must not wait for it.

    >>> rates_of(lambda step: 0.5 / (step + 1), 2).tolist()
    [0.5, 0.25]
    """
    if schedule is None or not callable(schedule):
        return None if schedule is None else np.full(steps, schedule)
    return np.asarray(jax.jit(jax.vmap(schedule))(np.arange(steps, dtype=np.int32)))
