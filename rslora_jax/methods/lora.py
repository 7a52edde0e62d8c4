"""LoRA: a weight and the product of two factors of low rank (arXiv 2106.09685), rank-stabilised (arXiv 2312.03732)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax.numpy as jnp
from jax import Array

from rslora_jax.methods.method import RANK, Axis, aligned
from rslora_jax.methods.random import drawer
from rslora_jax.scaling import gamma
from rslora_jax.transform.renames import lay
from rslora_jax.transform.views import View, materialise, wide

if TYPE_CHECKING:
    from rslora_jax.config import LoraConfig
    from rslora_jax.sites import Site


@dataclasses.dataclass(frozen=True)
class LoRA:
    """`W + gamma A B`, with A of shape (*stack, *in, r) and B of shape (*stack, r, *out)."""

    needs_base = False
    labels: ClassVar[Mapping[str, str]] = {"a": "in", "b": "out"}

    # Of a table that is the head too, PEFT has the adapter twice: x W^T with W + gamma A B, so there A is B turned.
    peft_head: ClassVar[Mapping[str, str]] = {"lora_A.weight": "lora_embedding_B", "lora_B.weight": "lora_embedding_A"}

    def factors(self, site: Site) -> Mapping[str, tuple[Axis, ...]]:
        """Name A and B, and the axes of each."""
        return {
            "a": (*site.stack_axes, *site.in_axes, RANK),
            "b": (*site.stack_axes, RANK, *site.out_axes),
        }

    def init(self, site: Site, key: Array, w: Any, config: LoraConfig) -> dict[str, Array]:
        """Draw A as the config says; B is zero."""
        # A look-up meets one row of A, not a sum over all of them.
        fan_in = 1 if site.kind == "embedding" else site.in_size
        shapes, dtype = site.factor_shapes, jnp.dtype(config.dtype)
        return {"a": drawer(config.init)(key, shapes["a"], dtype, fan_in), "b": jnp.zeros(shapes["b"], dtype)}

    def view(self, site: Site, w: Any, factors: Mapping[str, Array]) -> View:
        """Return the weight with A, B and gamma."""
        own = aligned(site, factors)
        view = View(w, site.labels, w.dtype, (site.path,), (own["a"], own["b"]), site.gamma)
        return lay(view, w)

    def scaled(self, factors: Mapping[str, Array], by: Any) -> dict[str, Array]:
        """Return A, and B times a number, or times one for each element of the stack."""
        # Once, in float32 at least, and rounded to the dtype of B.
        b = factors["b"]
        dtype = wide(b.dtype)
        if getattr(by, "ndim", 0):
            by = by.reshape(by.shape + (1,) * (b.ndim - by.ndim)).astype(dtype)
        return {**factors, "b": (b.astype(dtype) * by).astype(b.dtype)}

    def low_rank(self, site: Site, factors: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return A and B as matrices, or stacks of them."""
        stack = site.sizes(site.stack_axes)
        return factors["a"].reshape(*stack, -1, site.rank), factors["b"].reshape(*stack, site.rank, -1)

    def of_low_rank(self, site: Site, first: Any, second: Any) -> dict[str, Any]:
        """Return A and B from two factors as `low_rank` gives them."""
        shapes = site.factor_shapes
        return {"a": first.reshape(shapes["a"]), "b": second.reshape(shapes["b"])}

    def less(self, site: Site, w: Array, factors: Mapping[str, Array]) -> Array:
        """Return W - gamma A B, which with A and B acts as W; summed in float32 at least, and rounded once."""
        return materialise(LoRA.view(self, site, w, self.scaled(factors, -1)))

    def peft_names(self, site: Site) -> dict[str, str]:
        """Return what PEFT calls A and B."""
        if site.kind == "embedding":
            return {"a": "lora_embedding_A", "b": "lora_embedding_B"}
        return {"a": "lora_A.weight", "b": "lora_B.weight"}

    def site_of(
        self, path: str, factors: Mapping[str, Any], shape: Sequence[int] | None, *, alpha: float, scaling: Any
    ) -> Site:
        """Return the site by its factors; without a shape, axes that both have in front are taken for a stack."""
        from rslora_jax.sites import Site

        a, b = factors["a"].shape, factors["b"].shape
        if shape is not None:
            stack = len(a) + len(b) - 2 - len(shape)  # both have the stack, and the rank
        else:
            stack = max(n for n in range(min(len(a), len(b))) if a[:n] == b[:n] and b[n] == a[-1])
        ins, outs = a[stack:-1], b[stack + 1 :]
        axes = iter(range(stack + len(ins) + len(outs)))
        stacked, summed, free = (tuple(next(axes) for _ in of) for of in (a[:stack], ins, outs))
        sizes, rank = (*a[:stack], *ins, *outs), a[-1]
        scale = gamma(rank, alpha, scaling)
        return Site(path, sizes, summed, free, stacked, "linear", rank, alpha, scale, self)


METHOD = LoRA()
