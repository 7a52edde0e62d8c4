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
    ||W + gamma A B||^2 = ||W||^2 + 2 gamma <A'W, B> + gamma^2 <(A'A) B, B>, output by output; of a large rank, of
    which that takes more, from some rows of the sum at a time.
    """

    needs_base = True
    labels: ClassVar[Mapping[str, str]] = {**LoRA.labels, "m": "magnitude"}

    # What holds of a product of two factors does not of this.
    low_rank = None  # type: ignore[assignment]
    of_low_rank = None  # type: ignore[assignment]
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
    if is_stored(w) and w.stack and site.stack_axes[:1] == (0,):
        one = site.element()
        return lax.map(lambda of: _squares(one, *of), (w, dict(factors)))
    w = dense(w)
    if factors and (blocks := _blocks(site)):
        return _by_blocks(site, w, factors, blocks)
    return _expanded(site, w, factors)


def _expanded(site: Site, w: Array, factors: Mapping[str, Array]) -> Array:
    """Return the squared norms by their expansion: 2 r (i o + i r + r o) FLOPs."""
    of, total = terms(site), wide(w.dtype, *(factor.dtype for factor in factors.values()))
    columns = jnp.sum(jnp.square(w.astype(total)), site.in_axes)  # of a fused sum, no wider copy is made
    squares = _in_order(columns, [n for n in range(w.ndim) if n not in site.in_axes], site.factors["m"])
    if not factors:
        return squares
    a, b = (factors[name].astype(total) for name in "ab")
    meets = _meets(w, total)
    other = {name: term.replace(RANK, "Y") for name, term in of.items()}
    met = jnp.einsum(f"{of['a']},{of['w']}->{of['b']}", a.astype(meets), w.astype(meets), preferred_element_type=total)
    grown = jnp.einsum(f"{of['a']},{other['a']},{other['b']}->{of['b']}", a, a, b)
    change = 2 * site.gamma * met + site.gamma**2 * grown
    return squares + jnp.einsum(f"{of['b']},{of['b']}->{of['m']}", change, b)


def _by_blocks(site: Site, w: Array, factors: Mapping[str, Array], blocks: int) -> Array:
    """Return the squared norms from the sum itself, some rows of it at a time: 2 r i o FLOPs."""
    total = wide(w.dtype, *(factor.dtype for factor in factors.values()))
    stack, rows, meets = site.sizes(site.stack_axes), site.in_size // blocks, _meets(w, total)
    w_SNxIxO = jnp.asarray(w).reshape(-1, rows, site.out_size)  # which numpy's arrays cannot be indexed as
    a_SNxIxR = jnp.asarray(factors["a"]).reshape(-1, rows, site.rank)
    b_SxRxO = jnp.asarray(factors["b"]).reshape(-1, site.rank, site.out_size)

    def block(number: Array) -> Array:
        w_IxO, a_IxR, b_RxO = w_SNxIxO[number], a_SNxIxR[number], b_SxRxO[number // blocks]
        update = jnp.matmul(a_IxR.astype(meets), b_RxO.astype(meets), preferred_element_type=total)
        return jnp.sum(jnp.square(w_IxO.astype(total) + site.gamma * update), 0)

    squares_SNxO = lax.map(block, jnp.arange(len(w_SNxIxO)))
    squares = jnp.sum(squares_SNxO.reshape(-1, blocks, site.out_size), 1)
    return squares.reshape(*stack, *site.sizes(site.out_axes))


def _blocks(site: Site) -> int | None:
    """Return in how many blocks of rows the sum is formed; None where its expansion takes less, or is no more.

    A small rank has all of it in a few products, for the whole stack at once.
    """
    in_order = (*site.stack_axes, *site.in_axes, *site.out_axes) == tuple(range(len(site.shape)))
    if not in_order or 4 * site.rank * (site.in_size + site.out_size) < site.in_size * site.out_size:
        return None
    return next((n for n in (8, 16, 6, 10, 12, 7, 9, 11, 13) if site.in_size % n == 0 and site.in_size >= 8 * n), None)


def _meets(w: Array, total: Any) -> Any:
    """Return the dtype of products with the weight.

    Where products of few bits are summed in many, a weight is not made a wider one for this; a CPU does so anyway.
    """
    narrow = jnp.finfo(w.dtype).bits == 16 and jax.default_backend() != "cpu"
    return w.dtype if narrow else total


def _in_order(array: Array, axes: Sequence[Axis], wanted: Sequence[Axis]) -> Array:
    """Transpose an array of some of the weight's axes into another order of them."""
    return jnp.transpose(array, [axes.index(axis) for axis in wanted])


METHOD = DoRA()
