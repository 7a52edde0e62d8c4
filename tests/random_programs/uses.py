"""How a weight is used: (weight, scope) -> rows of data."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.random_programs.scope import WIDEST, flat, rows, table, widths
from tests.random_programs.unknown import UNKNOWN_USES


def einsum(w, s):
    """A product with any axes contracted, any shared with the data, on either side, in any order."""
    letters = "abcdefghij"[: w.ndim]
    contracted = s.pick([c for k in range(1, w.ndim + 1) for c in itertools.combinations(letters, k)][:20])
    rest = [c for c in letters if c not in contracted]
    shared = s.pick([None, None, *rest])
    rowwise = shared is not None and s.pick(2) == 1  # the rows of the data are the shared axis
    sizes = dict(zip(letters, w.shape, strict=True))
    data = [c for c in (shared, *contracted) if c is not None and not (rowwise and c == shared)]
    data = list(s.pick(list(itertools.permutations(data))[:6]))
    x = rows(s.x, sizes[shared]) if rowwise else s.x
    x = widths(x, math.prod(sizes[c] for c in data)).reshape(x.shape[0], *(sizes[c] for c in data))
    row = shared if rowwise else "t"
    x_letters = row + "".join(data)
    out = [row, *(c for c in rest if c != row)]
    out = s.pick(list(itertools.permutations(out))[:6])
    left = s.pick(2)
    operands = (f"{letters},{x_letters}", w, x) if left else (f"{x_letters},{letters}", x, w)
    s.said.append(text := f"{operands[0]}->{''.join(out)}")
    return flat(jnp.moveaxis(jnp.einsum(text, *operands[1:]), out.index(row), 0))


def dense(w, s):
    if w.ndim < 2:
        return widths(s.x, w.size) * w
    y = widths(s.x, w.shape[-2]) @ w
    return flat(jnp.moveaxis(y, -2, 0))


def dense_left(w, s):
    """The weight on the left of its data, as in `w @ x.T`."""
    y = jnp.matmul(w, widths(s.x, w.shape[-1]).T)
    return flat(jnp.moveaxis(y, -1, 0))


def dense_and_back(w, s):
    w = w.reshape(-1, w.shape[-1])
    return flat(widths(s.x, w.shape[0]) @ w @ w.T)


def both_sides(w, s):
    w = w.reshape(-1, w.shape[-1])
    y = (widths(s.x, w.shape[0]) @ w) @ widths(s.x, w.shape[1]).T
    return flat(y @ widths(s.x, w.shape[1]) @ w.T)


def lookup(w, s):
    n = s.pick(w.ndim)
    mode = s.pick([None, "clip", "wrap", "fill"])
    size = w.shape[n]
    at = np.arange(s.x.shape[0]) * 2 % (size if mode is None else size + 1)
    at = at + s.traced(1) - (s.pick(2) if mode is None else 0) * size
    if s.pick(2):
        at = jnp.stack([at, at[::-1]], -1)
    y = jnp.take(w, at, axis=n, mode=mode, fill_value=s.pick([0, 0.5]) if mode == "fill" else None)
    y = flat(jnp.moveaxis(y, n, 0))
    return y * widths(s.x, y.shape[1]) if s.pick(2) else y + widths(s.x, y.shape[1])


def lookup_tied(w, s):
    w = w.reshape(-1, w.shape[-1])
    at = (jnp.arange(s.x.shape[0]) + s.traced(2)) % w.shape[0]
    return flat(jnp.tanh(w[at] + widths(s.x, w.shape[1])) @ w.T)


def convolution(w, s):
    """Convolve with 1 to 3 spatial axes, the kernel's axes in any order."""
    while w.ndim < 3:
        w = w[..., None]
    w = w.reshape(*w.shape[:4], -1) if w.ndim > 5 else w
    spatial = w.ndim - 2
    names = "OI" + "DHW"[:spatial]
    kernel = "".join(s.pick(list(itertools.permutations(names))[::-1]))
    size = {c: w.shape[kernel.index(c)] for c in names}
    groups = s.pick([1, *(k for k in (2, 3) if size["O"] % k == 0)])
    batch_groups = s.pick([1, *(k for k in (2,) if size["O"] % k == 0 and groups == 1)])
    more = [s.pick(2) for _ in names[2:]]
    channels = size["I"] * groups
    batch = batch_groups * s.pick([1, 2])
    options = {
        "window_strides": [s.pick([1, 2])] * spatial,
        "padding": [s.pick([(1, 1), (1, 0), (2, 0)])] * spatial,
        "lhs_dilation": [s.pick([1, 1, 2])] * spatial,
        "rhs_dilation": [dilation := s.pick([1, 1, 2])] * spatial,
    }
    # A window at least as large as the kernel, so that something comes out.
    window = [dilation * (size[c] - 1) + 1 + extra for c, extra in zip(names[2:], more, strict=True)]
    data = widths(s.x.reshape(1, -1), batch * channels * math.prod(window)).reshape(batch, channels, *window)
    y = lax.conv_general_dilated(
        data,
        w,
        dimension_numbers=("NC" + names[2:], kernel, "NC" + names[2:]),
        feature_group_count=groups,
        batch_group_count=batch_groups,
        **options,
    )
    return s.x + flat(y.reshape(1, -1)).sum() + widths(flat(y), s.x.shape[1])[:1]


def ragged_dot(w, s):
    w = w[None] if w.ndim < 3 else w
    w = w.reshape(-1, *w.shape[-2:])
    groups, count = w.shape[0], s.x.shape[0]
    sizes = np.full(groups, count // groups)
    sizes[-1] += s.pick([count - sizes.sum(), 0])
    sizes = jnp.asarray(sizes, jnp.int32) - (s.traced(2) if count // groups else 0)
    return flat(lax.ragged_dot(widths(s.x, w.shape[1]), w, sizes))


def pointwise_use(w, s):
    y = w.reshape(1, -1)[:, :WIDEST]
    return widths(s.x, y.shape[1]) * y


def bilinear(w, s):
    """A product in which both operands are made of weights, and only the result meets data."""
    w = w.reshape(-1, w.shape[-1])
    return flat(widths(s.x, 3) @ (s.more((3, w.shape[0])) @ w))


USES = table(
    *(einsum, dense, dense_left, dense_and_back, both_sides, lookup, lookup_tied, convolution, ragged_dot),
    *(pointwise_use, bilinear, *UNKNOWN_USES.values()),
)
