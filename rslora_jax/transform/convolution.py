"""A convolution that an adapted kernel takes part in: one factor keeps the window, the other is pointwise."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from rslora_jax.transform.cost import Sizes
from rslora_jax.transform.product import Product
from rslora_jax.transform.views import LETTERS, RANK, View, alike, spans

# The window factor has the kernel's axes but the one that the pointwise factor spans, and the rank last; the
# pointwise factor is (that axis, rank). With groups, every group's features meet the same window factor.


@dataclasses.dataclass(frozen=True)
class _Convolution:
    """A convolution of data and a kernel.

    Attributes:
      params: the equation's own parameters.
      pointwise_last: whether the data meets the window factor first, as it does unless a tied kernel is used
        with its two feature axes exchanged.
      dtype, gamma: what the program casts the kernel to, and the adapter's scale.
      platform: what the program is compiled for.
    """

    params: tuple[tuple[str, Any], ...]
    pointwise_last: bool
    dtype: Any
    gamma: float
    platform: str

    @property
    def groups(self) -> int:
        return dict(self.params)["feature_group_count"]

    @property
    def missing(self) -> int:
        """The kernel's axis that the window factor lacks: the output features, or the input features."""
        spec = dict(self.params)["dimension_numbers"].rhs_spec
        return spec[0] if self.pointwise_last else spec[1]

    rank_axis = -1

    def base(self, x: Array, w: Array) -> Array:
        return lax.conv_general_dilated_p.bind(x, w, **dict(self.params))

    by_weight = base

    def meet(self, x: Array, first: Array) -> Array:
        return self.window(x, first) if self.pointwise_last else self.pointwise(x, first, 0)

    def leave(self, xa: Array, second: Array) -> Array:
        return self.pointwise(xa, second, 2) if self.pointwise_last else self.window(xa, second)

    def window(self, x: Array, factor: Array) -> Array:
        kernel = jnp.moveaxis(factor, -1, self.missing)
        if self.groups > 1:
            kernel = jnp.concatenate([kernel] * self.groups, self.missing)
        return lax.conv_general_dilated_p.bind(
            *alike(x, kernel), **{**dict(self.params), "preferred_element_type": None}
        )

    def pointwise(self, x: Array, factor: Array, spec: int) -> Array:
        """Multiply the features of x, which lie where the data's (0) or the result's (2) do."""
        at = dict(self.params)["dimension_numbers"][spec][1]
        x, factor = alike(x, factor)
        x, precision = jnp.moveaxis(x, at, -1), dict(self.params)["precision"]
        precision = precision[0] if isinstance(precision, tuple) else precision
        if self.pointwise_last:
            x = x.reshape(*x.shape[:-1], self.groups, -1)
            factor = factor.reshape(self.groups, -1, factor.shape[-1])
            y = jnp.einsum("...gr,gor->...go", x, factor, precision=precision)
            y = y.reshape(*y.shape[:-2], -1)
        else:
            y = jnp.einsum("...i,ir->...r", x, factor, precision=precision)
        return jnp.moveaxis(y, -1, at)

    def full(self, first: Array, second: Array) -> Array:
        window, pointwise = (first, second) if self.pointwise_last else (second, first)
        letters = LETTERS[: window.ndim]
        missing = letters[self.missing]
        return jnp.einsum(f"{letters.replace(missing, '')}{RANK},{missing}{RANK}->{letters}", *alike(window, pointwise))

    def sizes(self, x: tuple[int, ...], w: tuple[int, ...], rank: int) -> Sizes:
        p = dict(self.params)
        lhs, rhs, _ = p["dimension_numbers"]
        places = x[lhs[0]] * math.prod(self.out_window(x, w))
        places_in = math.prod(n for axis, n in enumerate(x) if axis != lhs[1])
        kernel, o, i = math.prod(w), w[rhs[0]], w[rhs[1]]
        if self.pointwise_last:
            meet, leave = places * self.groups * rank * (kernel // o), places * rank * o
            kept = places * self.groups * rank
        else:
            meet, leave, kept = places_in * i * rank, places * rank * (kernel // i), places_in * rank
        return Sizes(2 * places * kernel, 2 * meet, 2 * leave, 2 * rank * kernel, kernel, kept)

    def out_window(self, x: tuple[int, ...], w: tuple[int, ...]) -> list[int]:
        """Return the result's sizes along the window."""
        p = dict(self.params)
        lhs, rhs, _ = p["dimension_numbers"]
        sizes = []
        for n, (low, high) in enumerate(p["padding"]):
            size = (x[lhs[2 + n]] - 1) * p["lhs_dilation"][n] + 1 + low + high
            reach = (w[rhs[2 + n]] - 1) * p["rhs_dilation"][n] + 1
            places = (size - reach) // p["window_strides"][n] + 1
            sizes.append(max(0, places) if isinstance(places, int) else places)
        return sizes


def convolution(view: View, params: dict[str, Any], platform: str) -> Product | None:
    """Return how data meets a view as the kernel of a convolution."""
    if params["batch_group_count"] != 1:
        return None
    out_axis, in_axis, *_ = params["dimension_numbers"].rhs_spec
    grouped = params["feature_group_count"] != 1
    gains = _gains(view, params, out_axis, in_axis)
    own = tuple(params.items())
    if gains is None:
        return None
    if not view.factors:
        return Product(_Convolution(own, True, view.dtype, view.gamma, platform), (), *gains)
    for last, axis in ((True, out_axis), (False, in_axis)):
        if not last and grouped:
            continue
        others = [n for n in range(len(view.shape)) if n != axis]
        for window, pointwise in (view.factors, view.factors[::-1]):
            if _lacks(view, window, [axis]) and _lacks(view, pointwise, others):
                factors = (jnp.squeeze(window, axis), jnp.squeeze(pointwise, others))
                op = _Convolution(own, last, view.dtype, view.gamma, platform)
                return Product(op, factors if last else factors[::-1], *gains)
    return None


def _lacks(view: View, part: Array, axes: list[int]) -> bool:
    return all(view.shape[n] == 1 or not spans(view, part)[n] for n in axes)


def _gains(view: View, params: dict[str, Any], out_axis: int, in_axis: int) -> tuple[Array | None, Array | None] | None:
    """Return a gain as what the features of the data and of the result are multiplied by."""
    if view.gain is None:
        return None, None
    lhs, _, out = params["dimension_numbers"]
    for axis, spec in ((out_axis, out), (in_axis, lhs)):
        if _lacks(view, view.gain, [n for n in range(len(view.shape)) if n != axis]):
            if axis == in_axis and params["feature_group_count"] != 1:
                return None
            shaped = jnp.reshape(view.gain, [-1 if n == spec[1] else 1 for n in range(len(spec))])
            return (None, shaped) if axis == out_axis else (shaped, None)
    return None
