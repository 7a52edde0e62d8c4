"""What happens to a weight before its use: (weight, scope) -> weight."""

import itertools

import jax.numpy as jnp
from jax import lax

from tests.random_programs.scope import table
from tests.random_programs.unknown import UNKNOWN_CHANGES


def transpose(w, s):
    order = s.pick(list(itertools.permutations(range(w.ndim)))[::-1])
    turned = [w.shape[n] for n in order]
    return lax.reshape(w, turned, order) if s.pick(2) else jnp.transpose(w, order)


def split_axis(w, s):
    options = [(n, k) for n in range(w.ndim) for k in range(2, w.shape[n]) if w.shape[n] % k == 0]
    n, k = s.pick(options or [(0, 1)])
    return w.reshape(*w.shape[:n], k, w.shape[n] // k, *w.shape[n + 1 :])


def merge_axes(w, s):
    if w.ndim < 2:
        return w
    n = s.pick(w.ndim - 1)
    return w.reshape(*w.shape[:n], w.shape[n] * w.shape[n + 1], *w.shape[n + 2 :])


def reshape_any(w, s):
    shapes = [(w.size // k, k) for k in range(1, w.size + 1) if w.size % k == 0]
    shapes += [(a // k, k, b) for a, b in shapes for k in range(2, a) if a % k == 0]
    return w.reshape(s.pick(shapes))


def expand(w, s):
    return jnp.expand_dims(w, s.pick(w.ndim + 1))


def squeeze(w, s):
    return jnp.squeeze(w.reshape(*w.shape[:1], 1, *w.shape[1:]), 1)


def broadcast(w, s):
    return jnp.broadcast_to(w, (s.pick([2, 3]), *w.shape))


def broadcast_inside(w, s):
    return jnp.broadcast_to(w[..., None, :], (*w.shape[:-1], s.pick([2, 3]), w.shape[-1]))


def slice_part(w, s):
    n = s.pick(w.ndim)
    start = s.pick(w.shape[n])
    return lax.slice_in_dim(w, start, s.pick(range(start + 1, w.shape[n] + 1)[::-1]), axis=n)


def slice_strided(w, s):
    return lax.slice_in_dim(w, 0, None, s.pick([2, 3]), axis=s.pick(w.ndim))


def slice_traced(w, s):
    n = s.pick(w.ndim)
    return lax.dynamic_slice_in_dim(w, s.traced(w.shape[n]), max(1, w.shape[n] - 1), axis=n)


def reverse(w, s):
    return jnp.flip(w, s.pick(w.ndim))


def index(w, s):
    return jnp.take(w, s.pick(w.shape[n := s.pick(w.ndim)]), axis=n) if w.ndim > 1 else w


def index_static(w, s):
    return w[s.pick(w.shape[0])] if w.ndim > 1 else w


def index_traced(w, s):
    if w.ndim < 2:
        return w
    n = s.pick(w.ndim)
    at = s.traced(w.shape[n])
    return jnp.moveaxis(w, n, 0)[at] if s.pick(2) else lax.dynamic_index_in_dim(w, at, n, keepdims=False)


def index_vector(w, s):
    n = s.pick(w.ndim)
    at = jnp.arange(s.pick([2, 3])) * s.pick([1, 3]) % w.shape[n]
    return jnp.take(w, at + s.traced(1), axis=n, mode=s.pick(["clip", "wrap", None]))


def cast_narrow(w, s):
    return w.astype(jnp.float32).astype(w.dtype)


def cast_bfloat16(w, s):
    return w.astype(jnp.bfloat16).astype(w.dtype)


def barrier(w, s):
    return lax.optimization_barrier((s.x, w))[1] if s.pick(2) else lax.optimization_barrier(w)


def concatenate(w, s):
    return jnp.concatenate([w, s.more(w.shape) if s.pick(2) else w], s.pick(w.ndim))


def stack(w, s):
    return jnp.stack([w, s.more(w.shape)], s.pick(w.ndim + 1))


def pad(w, s):
    n = s.pick(w.ndim)
    widths = [(s.pick(2), 1) if m == n else (0, 0) for m in range(w.ndim)]
    return jnp.pad(w, widths, constant_values=s.pick([0, 0.5]))


def scale(w, s):
    return s.pick([lambda: 0.5 * w, lambda: w / 3, lambda: -w, lambda: w * s.more(()), lambda: w * s.x.mean()])()


def scale_axis(w, s):
    n = s.pick(w.ndim)
    v = s.more((w.shape[n],)).reshape([w.shape[n] if m == n else 1 for m in range(w.ndim)])
    return w * v if s.pick(2) else v * w


def add_weight(w, s):
    other = s.more(w.shape)
    return s.pick([lambda: w + other, lambda: other - w, lambda: w + w.mean()])()


def normalise(w, s):
    n = s.pick(w.ndim)
    return w / (0.1 + jnp.sqrt((w * w).sum(n, keepdims=True) + 1e-3)) if s.pick(2) else w - w.mean(n, keepdims=True)


def mask(w, s):
    keep = jnp.arange(w.shape[-1]) % 3 != s.pick(3)
    return s.pick([lambda: jnp.where(keep, w, 0), lambda: w * keep, lambda: jnp.where(keep, w, s.more(w.shape))])()


def scatter(w, s):
    return w.at[s.pick(w.shape[0])].set(0.3) if s.pick(2) else w.at[0].add(s.more(w.shape[1:]))


def product_of_weights(w, s):
    if w.ndim < 2:
        return w
    return w @ s.more((w.shape[-1], 3)) if s.pick(2) else w @ jnp.swapaxes(w, -1, -2)


def running(w, s):
    if s.pick(2):
        return lax.associative_scan(jnp.add, w, axis=s.pick(w.ndim))
    return jnp.cumsum(w, s.pick(w.ndim))


def stop_gradient(w, s):
    return lax.stop_gradient(w) if s.pick(2) else w - 0.5 * lax.stop_gradient(w)


def pointwise(w, s):
    return s.pick([jnp.tanh, jnp.sin, lambda w: w * w, lambda w: jnp.round(4 * w) / 4 + w, lambda w: jnp.sort(w, -1)])(
        w
    )


def choose(w, s):
    return lax.switch(s.traced(2), [lambda w: w, lambda w: -w] if s.pick(2) else [lambda w: w, lambda w: 0.5 * w], w)


def fuse(w, s):
    """A weight beside two more in one array, of which it is then sliced out."""
    n, at = s.pick(w.ndim), s.pick(3)
    others = [s.more(w.shape) for _ in range(2)]
    whole = jnp.concatenate([*others[:at], w, *others[at:]], n)
    return lax.slice_in_dim(whole, at * w.shape[n], (at + 1) * w.shape[n], axis=n)


def repeat(w, s):
    return jnp.repeat(w, 2, s.pick(w.ndim)) if s.pick(2) else jnp.tile(w, (2,) * w.ndim)


def roll(w, s):
    return jnp.roll(w, 1, s.pick(w.ndim))


def reduce(w, s):
    return s.pick([jnp.sum, jnp.max])(w, axis=s.pick(w.ndim)) if w.ndim > 1 else w


def dead(w, s):
    """A use of a further parameter on which nothing depends."""
    jnp.tanh(w @ s.more((w.shape[-1], 2)))
    return w


def copy(w, s):
    return jnp.array(w, copy=True)


CHANGES = table(
    *(transpose, split_axis, merge_axes, reshape_any, expand, squeeze, broadcast, broadcast_inside, slice_part),
    *(slice_strided, slice_traced, reverse, index, index_static, index_traced, index_vector, cast_narrow),
    *(cast_bfloat16, barrier, concatenate, stack, pad, scale, scale_axis, add_weight, normalise, mask, scatter),
    *(product_of_weights, running, stop_gradient, pointwise, choose, fuse, repeat, roll, reduce, dead, copy),
    *UNKNOWN_CHANGES.values(),
)
