"""DoRA: the direction of W + gamma A B, and for each output a magnitude of its own (arXiv 2402.09353)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from rslora_jax.methods.lora import LoRA
from rslora_jax.methods.method import Axis, aligned, terms
from rslora_jax.stored.form import dense, is_stored
from rslora_jax.transform.views import RANK, View, wide

if TYPE_CHECKING:
    from rslora_jax.config import LoraConfig
    from rslora_jax.sites import Site


@dataclasses.dataclass(frozen=True)
class DoRA(LoRA):
    """`m * (W + gamma A B) / ||W + gamma A B||`, with the norm over the in-axes, a number of m for each output (eq. 5).

    The norm is a constant under differentiation, as in section 4.3 of the paper. It is computed without the sum:
    ||W + gamma A B||^2 = ||W||^2 + 2 gamma <A'W, B> + gamma^2 <(A'A) B, B>, output by output.
    """

    needs_base = True
    labels: ClassVar[Mapping[str, str]] = {**LoRA.labels, "m": "magnitude"}

    # What holds of a product of two factors does not of this.
    low_rank = None  # type: ignore[assignment]
    peft_head = None  # type: ignore[assignment]

    def factors(self, site: Site) -> Mapping[str, tuple[Axis, ...]]:
        """Name A, B and the magnitude m, and the axes of each."""
        return {**super().factors(site), "m": (*site.stack_axes, *site.out_axes)}

    def init(self, site: Site, key: Array, w: Any, config: LoraConfig) -> dict[str, Array]:
        """Start A and B as LoRA, and m at the norms of W, so that nothing is changed."""
        start = super().init(site, key, w, config)
        return {**start, "m": jnp.sqrt(_squares(site, w, {})).astype(config.dtype)}

    def view(self, site: Site, w: Any, factors: Mapping[str, Array]) -> View:
        """Return the weight with A, B and gamma, and the gain m / ||W + gamma A B||."""
        fixed = {name: lax.stop_gradient(factors[name]) for name in ("a", "b")}
        squares = lax.stop_gradient(_squares(site, jax.tree.map(lax.stop_gradient, w), fixed))
        m = factors["m"]
        gain = m * lax.rsqrt(jnp.maximum(squares, jnp.finfo(squares.dtype).tiny)).astype(m.dtype)
        if site.layers:  # one without an adapter is as it is
            axes = [-1 if axis == site.layer_axis else 1 for axis in site.factors["m"]]
            gain = jnp.where(np.reshape([layer.rank > 0 for layer in site.layers], axes), gain, 1)
        return dataclasses.replace(super().view(site, w, factors), gain=aligned(site, {"m": gain})["m"])

    def peft_names(self, site: Site) -> dict[str, str]:
        """Return what PEFT calls A, B and m."""
        return {**super().peft_names(site), "m": "lora_magnitude_vector"}


def _squares(site: Site, w: Any, factors: Mapping[str, Array]) -> Array:
    """Return the squared norms, of shape (*stack, *out), of W, or of W + gamma A B; no array of the weight's size.

    A stack that is stored in a form of its own is made dense one element at a time.
    """
    if is_stored(w) and site.stack_axes[:1] == (0,):
        one = site.element()
        return lax.map(lambda of: _squares(one, *of), (w, dict(factors)))
    of, w = terms(site), dense(w)
    total = wide(w.dtype, *(factor.dtype for factor in factors.values()))
    columns = jnp.sum(jnp.square(w.astype(total)), site.in_axes)  # of a fused sum, no wider copy is made
    squares = _in_order(columns, [n for n in range(w.ndim) if n not in site.in_axes], site.factors["m"])
    if not factors:
        return squares
    a, b = (factors[name].astype(total) for name in "ab")
    # Where products of few bits are summed in many, a weight is not made a wider one for this; a CPU does so anyway.
    narrow = jnp.finfo(w.dtype).bits == 16 and jax.default_backend() != "cpu"
    meets = w.dtype if narrow else total
    other = {name: term.replace(RANK, "Y") for name, term in of.items()}
    met = jnp.einsum(f"{of['a']},{of['w']}->{of['b']}", a.astype(meets), w.astype(meets), preferred_element_type=total)
    grown = jnp.einsum(f"{of['a']},{other['a']},{other['b']}->{of['b']}", a, a, b)
    change = 2 * site.gamma * met + site.gamma**2 * grown
    return squares + jnp.einsum(f"{of['b']},{of['b']}->{of['m']}", change, b)


def _in_order(array: Array, axes: Sequence[Axis], wanted: Sequence[Axis]) -> Array:
    """Transpose an array of some of the weight's axes into another order of them."""
    return jnp.transpose(array, [axes.index(axis) for axis in wanted])


METHOD = DoRA()
