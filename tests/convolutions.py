"""Convolutions on which the laws are tested."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.program_models import Case, normal


def convolution(name: str) -> Case:
    """Convolutions of one to three axes, with groups, dilation, strides and tied kernels."""

    def conv(x, w, strides=1, padding="SAME", **options):
        n = x.ndim - 2
        letters = "DHW"[3 - n :]
        spec = ("N" + letters + "C", letters + "IO", "N" + letters + "C")
        return lax.conv_general_dilated(x, w, (strides,) * n, padding, dimension_numbers=spec, **options)

    def one_axis(p, x):
        return conv(x, p["w"], padding=[(4, 0)], rhs_dilation=(2,))  # causal

    def two_axes(p, x):
        return jnp.tanh(conv(x, p["w"], 2)) + conv(x, 2 * p["w"], 2, rhs_dilation=(2, 2))

    def three_axes(p, x):
        return conv(x, p["w"], padding="VALID")

    def grouped(p, x):
        return conv(x, p["w"], feature_group_count=2)

    def depthwise(p, x):
        return conv(x, p["w"], feature_group_count=8)

    def tied(p, x):  # as an autoencoder decodes with its encoder's kernel
        h = jnp.tanh(conv(x, p["w"]))
        return conv(h, jnp.swapaxes(p["w"][::-1, ::-1], 2, 3), lhs_dilation=(2, 2), padding=[(2, 1)] * 2)

    def scanned(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(conv(x, w)), None), x, p["w"])[0]

    def channels_first(p, x):
        y = lax.conv(jnp.moveaxis(x, -1, 1), jnp.transpose(p["w"], (3, 2, 0, 1)), (1, 1), "SAME")
        return jnp.moveaxis(y, 1, -1)

    def mapped(p, x):  # each of two kernels on its half of the rows
        return jax.vmap(conv)(x[:, None], p["w"])[:, 0]

    kernels = {
        one_axis: (3, 8, 10),
        two_axes: (3, 2, 8, 10),
        three_axes: (2, 1, 2, 8, 10),
        grouped: (3, 3, 4, 10),
        depthwise: (3, 3, 1, 16),
        tied: (3, 3, 8, 10),
        scanned: (2, 3, 3, 8, 8),
        channels_first: (3, 3, 8, 10),
        mapped: (2, 3, 3, 8, 10),
    }
    fn, shape = next((f, shape) for f, shape in kernels.items() if f.__name__ == name)
    x = normal(1, 2, *(5, 6, 4)[: 1 if name == "one_axis" else 3 if name == "three_axes" else 2], 8)
    params = {"w": normal(0, *shape) / np.sqrt(np.prod(shape[:-2]))}
    return Case(fn, params, (x,), targets=["*"], sites=1, tolerance=3e-5)
