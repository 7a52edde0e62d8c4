"""What each model is checked for."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rslora_jax as rslora
from tests.reference import assert_near, gradients_by_hand, merged_by_hand, trained

RANK, ALPHA = 3, 7  # no square, and not each other


def wrapped(fn: Callable[..., Any], params: Any, *args: Any, **config: Any) -> tuple[rslora.Lora, list[str]]:
    """Return the wrapped function, and what was said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        lora = rslora.wrap(fn, params, *args, config=rslora.LoraConfig(rank=RANK, alpha=ALPHA, **config))
    return lora, [str(w.message) for w in said if issubclass(w.category, rslora.RsloraWarning)]


def assert_exact(lora: rslora.Lora, params: Any, *args: Any, tolerance: float = 2e-5, gradients: bool = True) -> None:
    """Compare fresh and trained adapters, and their gradients, with the function itself at weights merged by hand."""
    plain = jax.jit(lora.fn)(params, *args)
    fresh = lora.init(jax.random.key(0))
    assert_near(jax.jit(lora.apply)(params, fresh, *args), plain, 1e-6)

    adapters = trained(lora)
    by_hand = merged_by_hand(lora, params, adapters)
    want = jax.jit(lora.fn)(by_hand, *args)
    assert_near(jax.jit(lora.apply)(params, adapters, *args), want, tolerance)
    assert_near(jax.jit(lora.fn)(lora.merge(params, adapters), *args), want, tolerance)
    assert np.abs(want - plain).max() > 0.01  # the adapters do something
    if gradients:

        def loss(y):
            return jnp.sum(jnp.sin(y))

        grads = jax.jit(jax.grad(lambda a: loss(lora.apply(params, a, *args))))(adapters)
        dw = jax.jit(jax.grad(lambda p: loss(lora.fn(p, *args)), allow_int=True))(by_hand)
        assert_near(grads, gradients_by_hand(lora, adapters, dw), 10 * tolerance, floor=1e-3)


def axes_of(lora: rslora.Lora) -> dict[str, tuple]:
    return {path: (site.stack_axes, site.in_axes, site.out_axes) for path, site in lora.sites.items()}
