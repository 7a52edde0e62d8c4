"""The pieces of random programs: what is done to a weight, how it is used, and what stands around that use.

Every piece fits every shape: it draws its choices from what the shape allows, and the data are cut or repeated to
the size that the weight asks for. So any list of pieces is a program, and a failing one can be shrunk freely.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

STACK = 2  # how many weights are in a stack that a scan or a vmap takes apart
WIDEST = 8  # data are cut to this width, and a weight to four times that
PLACES = (0, 0, 1, 2)  # where its axis may be; the first choice of each piece that does
FIRED: list[float] = []  # what the effects inside programs have seen


@dataclasses.dataclass
class Scope:
    """What a piece can draw on: choices, the data, and more parameters.

    Attributes:
      number: the number from which choices are taken, digit by digit.
      x: the data, of shape (T, D).
      more: gives a further parameter of the layer, of the shape asked for.
      said: the choices made, to be printed.
    """

    number: int
    x: Any
    more: Callable[[Sequence[int]], Any]
    said: list[Any] = dataclasses.field(default_factory=list)

    def pick(self, choices: Sequence[Any] | int) -> Any:
        choices = range(choices) if isinstance(choices, int) else choices
        self.number, at = divmod(self.number, len(choices))
        self.said.append(choices[at])
        return choices[at]

    def traced(self, below: int) -> Any:
        """An index below a bound that is known only when the program runs."""
        return jnp.where(self.x[0, 0] > 0.1, min(1, below - 1), 0).astype(jnp.int32)


def widths(x: Any, size: int) -> Any:
    """Cut or repeat the columns of the data."""
    return jnp.concatenate([x] * -(-size // x.shape[1]), 1)[:, :size]


def rows(x: Any, size: int) -> Any:
    """Cut or repeat the rows of the data."""
    return jnp.concatenate([x] * -(-size // x.shape[0]), 0)[:size]


def flat(y: Any) -> Any:
    """Return (T, ...) as (T, D), D within bounds."""
    return y.reshape(y.shape[0], -1)[:, :WIDEST]


# What happens to a weight before its use: (weight, scope) -> weight.


def transpose(w, s):
    return jnp.transpose(w, s.pick(list(itertools.permutations(range(w.ndim)))[::-1]))


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
    return jnp.pad(w, [(s.pick(2), 1) if m == n else (0, 0) for m in range(w.ndim)])


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


def copy(w, s):
    return jnp.array(w, copy=True)


# How a weight is used: (weight, scope) -> rows of data.


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
    y = jnp.take(w, at, axis=n, mode=mode, fill_value=0 if mode == "fill" else None)
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
    window = [size[c] + s.pick(2) for c in names[2:]]
    channels = size["I"] * groups
    batch = batch_groups * s.pick([1, 2])
    data = widths(s.x.reshape(1, -1), batch * channels * math.prod(window)).reshape(batch, channels, *window)
    y = lax.conv_general_dilated(
        data,
        w,
        window_strides=[s.pick([1, 2])] * spatial,
        padding=[s.pick([(1, 1), (1, 0), (2, 0)])] * spatial,
        lhs_dilation=[s.pick([1, 1, 2])] * spatial,
        rhs_dilation=[s.pick([1, 1, 2])] * spatial,
        dimension_numbers=("NC" + names[2:], kernel, "NC" + names[2:]),
        feature_group_count=groups,
        batch_group_count=batch_groups,
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


# What stands around a use: (function of parameters and data, number) -> such a function.


def axis(w: Any, at: int) -> int:
    """Where the stack axis of a parameter is, if `at` says which of the places that it has."""
    return at % w.ndim


def leading(p: Any, at: int) -> Any:
    return jax.tree.map(lambda w: jnp.moveaxis(w, axis(w, at), 0), p)


def as_is(y: Any, x: Any) -> Any:
    return widths(rows(y, x.shape[0]), x.shape[1])


def jit(f, s):
    return s.pick([lambda p, x: jax.jit(f)(p, x), lambda p, x: jax.jit(lambda x: f(p, x))(x)])


def jit_twice(f, s):
    def twice(p, x):
        g = jax.jit(f)
        return g(p, x) + g(p, 0.5 * x)

    return twice


def checkpoint(f, s):
    policies = jax.checkpoint_policies
    policy = s.pick([None, policies.dots_saveable, policies.everything_saveable, policies.nothing_saveable])
    policy = s.pick([policy, policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names("n")])
    return jax.checkpoint(f, policy=policy, prevent_cse=s.pick([True, False]))


def scan_consts(f, s):
    options = {"reverse": s.pick([False, True]), "unroll": s.pick([1, 2])}

    def around(p, x):
        body = lambda c, _: (as_is(f(p, c), c), c.sum())
        y, sums = lax.scan(body, x, None, length=2, **options)
        return y + sums.sum()

    return around


def scan_stack(f, s):
    at = s.pick(PLACES)
    options = {"reverse": s.pick([False, True]), "unroll": s.pick([1, 2])}
    passed = s.pick([False, False, True])  # hand the weight on, as a scanned nnx module does

    def around(p, x):
        body = lambda c, p: (as_is(f(p, c), c), p if passed else None)
        return lax.scan(jax.checkpoint(body) if passed else body, x, leading(p, at), **options)[0]

    return around


def scan_index(f, s):
    at = s.pick(PLACES)

    def around(p, x):
        body = lambda c, i: (as_is(f(jax.tree.map(lambda w: jnp.moveaxis(w, axis(w, at), 0)[i], p), c), c), None)
        return lax.scan(body, x, jnp.arange(STACK))[0]

    return around


def scan_carry(f, s):
    return lambda p, x: lax.scan(lambda c, _: ((as_is(f(c[1], c[0]), x), c[1]), None), (x, p), None, length=2)[0][0]


def fori(f, s):
    if s.pick(2):
        return lambda p, x: lax.fori_loop(0, 2, lambda i, c: as_is(f(p, c), c), x)
    return lambda p, x: lax.fori_loop(0, 2, lambda i, c: (as_is(f(c[1], c[0]), x), c[1]), (x, p))[0]


def while_loop(f, s):
    if s.pick(2):
        return lambda p, x: lax.while_loop(
            lambda c: c[1] < 2, lambda c: (as_is(f(c[2], c[0]), x), c[1] + 1, c[2]), (x, 0, p)
        )[0]
    going = lambda p, c: (c[1] < 2) & (f(p, c[0]).sum() < 1e9)
    return lambda p, x: lax.while_loop(lambda c: going(p, c), lambda c: (as_is(f(p, c[0]), x), c[1] + 1), (x, 0))[0]


def cond(f, s):
    if s.pick(2):
        return lambda p, x: lax.cond(x.sum() > 0, f, lambda p, x: 0.5 * f(p, jnp.sin(x)), p, x)
    return lambda p, x: lax.cond(x.sum() > 0, lambda x: f(p, x), lambda x: 0.5 * f(p, -x), x)


def switch(f, s):
    branches = [lambda p, x: -f(p, x), f, lambda p, x: jnp.zeros_like(f(p, x))]
    return lambda p, x: lax.switch((x[0, 0] > 0).astype(int), branches, p, x)


def wrong(p, x, dp, dx):
    """A linear function of tangents that is no derivative of anything."""
    pairs = zip(jax.tree.leaves((p, x)), jax.tree.leaves((dp, dx)), strict=True)
    return sum((jnp.sin(v) * dv).sum() for v, dv in pairs)


def custom_jvp(f, s):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: (y := f(*primals), jnp.ones_like(y) * wrong(*primals, *tangents)))
    return g


def custom_vjp(f, s):
    g = jax.custom_vjp(f)
    g.defvjp(lambda p, x: (f(p, x), (p, x)), lambda kept, dy: jax.tree.map(lambda v: jnp.cos(v) * dy.sum(), kept))
    return g


def vmap_data(f, s):
    return lambda p, x: jax.vmap(lambda x: f(p, x))(jnp.stack([x, 0.5 * x - 0.1])).sum(0)


def vmap_stack(f, s):
    at, both = s.pick(PLACES), s.pick([False, True])

    def around(p, x):
        axes = jax.tree.map(lambda w: axis(w, at), p)
        x = jnp.stack([x, jnp.cos(x)], 1) if both else x
        return jax.vmap(f, in_axes=(axes, 1 if both else None))(p, x).sum(0)

    return around


def map_rows(f, s):
    size = s.pick([None, 2])
    return lambda p, x: lax.map(lambda row: f(p, row[None])[0], x, batch_size=size)


def effect(f, s):
    def around(p, x):
        y = f(p, x)
        jax.debug.callback(FIRED.append, y.sum())
        return y

    return around


def shard_map(f, s):
    mesh = Mesh(np.array(jax.devices()[:1]), ("d",))
    rowwise = PartitionSpec("d") if s.pick(2) else PartitionSpec()
    return jax.shard_map(f, mesh=mesh, in_specs=(PartitionSpec(), rowwise), out_specs=rowwise)


def scope(f, s):
    if s.pick(2):
        return lambda p, x: jax.named_call(f, name="inner")(p, x)
    return jax.named_scope("inner")(f)


def tangent(f, s):
    def around(p, x):
        y, dy = jax.jvp(lambda x: f(p, x), (x,), (jnp.cos(x),))
        return y + dy

    return around


def force(f, s):
    """A gradient by the data inside the program, as in a force field."""
    return lambda p, x: f(p, x) + as_is(jax.grad(lambda x: jnp.sin(f(p, x)).sum())(x), f(p, x))


def inner_step(f, s):
    """A gradient step on the weights inside the program."""

    def around(p, x):
        dp = jax.grad(lambda p: jnp.sin(f(p, x)).sum())(p)
        return f(jax.tree.map(lambda w, dw: w - 0.1 * dw, p, dp), x)

    return around


def table(*pieces: Callable) -> dict[str, Callable]:
    return {piece.__name__: piece for piece in pieces}


CHANGES = table(
    *(transpose, split_axis, merge_axes, reshape_any, expand, squeeze, broadcast, broadcast_inside, slice_part),
    *(slice_strided, slice_traced, reverse, index, index_static, index_traced, index_vector, cast_narrow),
    *(cast_bfloat16, barrier, concatenate, stack, pad, scale, scale_axis, add_weight, normalise, mask, scatter),
    *(product_of_weights, running, stop_gradient, pointwise, choose, fuse, repeat, roll, reduce, copy),
)
USES = table(
    *(einsum, dense, dense_left, dense_and_back, both_sides, lookup, lookup_tied, convolution, ragged_dot),
    *(pointwise_use, bilinear),
)
AROUND = table(
    *(jit, jit_twice, checkpoint, scan_consts, scan_stack, scan_index, scan_carry, fori, while_loop, cond, switch),
    *(custom_jvp, custom_vjp, vmap_data, vmap_stack, map_rows, effect, shard_map, scope, tangent, force, inner_step),
)
STACKS = {"scan_stack", "scan_index", "vmap_stack"}  # the pieces that take a stack of weights apart
