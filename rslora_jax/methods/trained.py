"""Fully trained: the value itself stands in the adapters, and takes the weight's place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax.numpy as jnp
from jax import Array

from rslora_jax.methods.method import Axis
from rslora_jax.stored.form import dense

if TYPE_CHECKING:
    from rslora_jax.config import LoraConfig
    from rslora_jax.sites import Site


@dataclasses.dataclass(frozen=True)
class Trained:
    """The value of a parameter of any shape, in place of the base's; PEFT has it as `modules_to_save` or `bias`.

    It is named by `LoraConfig(trained=...)` beside the config's own method, hence it has no `METHOD`.
    """

    needs_base = True
    valued = True
    labels: ClassVar[Mapping[str, str]] = {"value": "trained"}

    def factors(self, site: Site) -> Mapping[str, tuple[Axis, ...]]:
        """Name the value, which has all axes of the weight, in their order."""
        return {"value": tuple(range(len(site.shape)))}

    def init(self, site: Site, key: Array, w: Any, config: LoraConfig) -> dict[str, Array]:
        """Start at the base's value: a copy, since a training step takes the memory of its adapters."""
        return {"value": jnp.array(dense(w), config.dtype, copy=True)}

    def view(self, site: Site, w: Any, factors: Mapping[str, Array]) -> Array:
        """Return the value as the program has the weight, an array like any other: no use of it needs a rule."""
        return factors["value"].astype(w.dtype)
