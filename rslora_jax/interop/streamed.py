"""What acts in place of one weight, with its adapter, in float64: a model is merged tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rslora_jax.interop.rounding import Rounding
from rslora_jax.methods.method import of_layer
from rslora_jax.sites import Site
from rslora_jax.transform.views import materialise


def acting(weight: np.ndarray, site: Site, factors: Mapping[str, Any], layer: int | None) -> np.ndarray:
    """Return what acts in place of a weight, in float64, in the weight's layout.

    Args:
      weight: the weight; that of one layer where `layer` is a number.
      site, factors: the adapter of the whole weight.
      layer: the place on the weight's first axis, where layers are stacked there.
    """
    if layer is not None:
        site, factors = _element_of(site, factors, layer)
    return _acting(site, weight, factors)


def rounding_of(name: str, weight: np.ndarray, exact: np.ndarray, merged: np.ndarray) -> Rounding:
    """Say what became of an update when the merged weight was rounded.

    >>> from rslora_jax.methods import method_of
    >>> site = Site("w", (2, 2), (0,), (1,), (), "linear", 1, 1.0, 1.0, method_of("lora"))
    >>> weight, factors = np.ones((2, 2)), {"a": np.ones((2, 1)), "b": np.full((1, 2), 2.0**-9)}
    >>> exact = acting(weight, site, factors, None)
    >>> merged = rounded("w", exact, "bfloat16")
    >>> float(merged[0, 0]), rounding_of("w", weight, exact, merged).relative  # next to 1 there is 1 + 2^-7
    (1.0, 1.0)
    """
    base = weight.astype(np.float64)
    norms = [float(np.linalg.norm(array)) for array in (exact - merged.astype(np.float64), exact - base, base)]
    return Rounding(name, 1, *norms)


def _element_of(site: Site, factors: Mapping[str, Any], n: int) -> tuple[Site, Mapping[str, Any]]:
    """Return an adapter on one element of its weight's first axis, which is stacked; of rank 0 where there is none."""
    if site.layer_axis == 0:
        return site.of_layer(n), of_layer(site, factors, n)
    return site.element(), {name: factor[n] for name, factor in factors.items()}


def _acting(site: Site, weight: np.ndarray, factors: Mapping[str, Any]) -> np.ndarray:
    """Return what acts in place of a weight, in float64, as `Lora.merge` forms it in float32."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = {name: jnp.asarray(np.asarray(factor).astype(np.float64)) for name, factor in factors.items()}
        view = site.view(jnp.asarray(weight.astype(np.float64)), wide)
        return np.asarray(materialise(view))


def rounded(name: str, weight: np.ndarray, dtype: str) -> np.ndarray:
    """Round to a dtype.

    Raises:
      ValueError: a number is not finite, before or after.
    """
    with np.errstate(over="ignore"):
        cast = weight.astype(jnp.dtype(dtype))
    if np.isfinite(cast).all():
        return cast
    wide = weight.astype(np.float64)
    if not np.isfinite(wide).all():
        raise ValueError(f"{name} holds numbers that are not finite: the base or the adapters are broken")
    raise ValueError(
        f"{name} overflows {dtype}: its largest number is {np.abs(wide).max():.3g}; merge in bfloat16 or float32"
    )
