"""A convolution that an adapted kernel takes part in: one factor keeps the window, the other is pointwise."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from rslora_jax.transform.cost import Sizes
from rslora_jax.transform.views import LETTERS, RANK, View, alike, spans

# The window factor has the kernel's axes but the one that the pointwise factor spans, and the rank last; the
# pointwise factor is (that axis, rank). With groups, every group's features meet the same window factor.


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A convolution of data and a kernel.

    Attributes:
      params: the equation's own parameters.
      pointwise_last: whether the data meets the window factor first, as it does unless a tied kernel is used
        with its two feature axes exchanged.
      dtype, gamma: what the program casts the kernel to, and the adapter's scale.
    """

    params: tuple[tuple[str, Any], ...]
    pointwise_last: bool
    dtype: Any
    gamma: float

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


def convolution(view: View, params: dict[str, Any]) -> tuple[Convolution, Array, Array] | None:
    """Return a convolution with a view as its kernel as (operation, first factor, second factor)."""
    if params["batch_group_count"] != 1:
        return None
    out_axis, in_axis, *_ = params["dimension_numbers"].rhs_spec
    axes = range(len(view.shape))
    lacks = lambda factor, gone: all(view.shape[n] == 1 or not spans(view, factor)[n] for n in gone)
    for last, axis in ((True, out_axis), (False, in_axis)):
        if not last and params["feature_group_count"] != 1:
            continue
        others = [n for n in axes if n != axis]
        for window, pointwise in ((view.a, view.b), (view.b, view.a)):
            if lacks(window, [axis]) and lacks(pointwise, others):
                window, pointwise = jnp.squeeze(window, axis), jnp.squeeze(pointwise, others)
                op = Convolution(tuple(params.items()), last, view.dtype, view.gamma)
                return (op, window, pointwise) if last else (op, pointwise, window)
    return None
