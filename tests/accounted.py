"""What a program does with a weight, and what becomes of it: the list that the tests and the documentation share.

Each program is one expression over the parameters' names and `x` (5, 12), the data; it is run as it stands.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import linear_call
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from tests.program_models import normal


@jax.custom_vjp
def straight_through(w):
    return jnp.round(4 * w) / 4


straight_through.defvjp(lambda w: (straight_through(w), None), lambda _, dw: (dw,))


def kernel(x, w):
    """A product in a Pallas kernel."""

    def body(x, w, out):
        out[...] = jnp.dot(x[...], w[...])

    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
    return pl.pallas_call(body, out_shape=shape, interpret=True)(x, w)


def over_devices(body, w, x, spec):
    mesh = jax.make_mesh((1,), ("n",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(body, mesh=mesh, in_specs=(spec, P()), out_specs=P(), check_vma=False)(w, x)


def exported(x, w):
    return jax.export.export(jax.jit(jnp.matmul))(x, w).call(x, w)


NAMES = {
    "jax": jax,
    "jnp": jnp,
    "lax": lax,
    "P": P,
    "kernel": kernel,
    "over_devices": over_devices,
    "straight_through": straight_through,
    "linear_call": linear_call,
    "exported": exported,
    "idx": jnp.array([3, 1, 4, 1, 5]),
    "ids": jnp.array([7, 0, 3, 3, 9]),
    "groups": jnp.array([2, 0, 3]),
}
PARAMS = {
    "w": (12, 16),
    "v": (12, 16),
    "up": (12, 4),
    "down": (4, 16),
    "square": (12, 12),
    "stack": (3, 12, 12),
    "experts": (3, 12, 16),
    "table": (10, 12),
    "head": (12, 10),
    "one": (12, 1),
    "position": (5, 12),
    "kernel3": (3, 12, 8),
    "mask": (12, 16),
    "scale": (12,),
    "latents": (4, 12),
    "patches": (4, 6),
    "row": (1, 16),
    "norms": (3, 12),
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A program and what becomes of its parameters.

    Attributes:
      group: the heading under which it is listed.
      code: the program.
      adapted: what is adapted by default: per parameter "in, out" axes as letters i, o, s of each axis.
      fallback: the operation in which the first is materialised, or "".
      left_out: the reason per parameter.
      warning: a part of what is said, or "".
      data: names that are arguments and not parameters.
    """

    group: str
    code: str
    adapted: dict[str, str] = dataclasses.field(default_factory=dict)
    fallback: str = ""
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    warning: str = ""
    data: tuple[str, ...] = ()

    @functools.cached_property
    def params(self) -> dict[str, Any]:
        names = [n for n in (*self.adapted, *self.left_out) if n in PARAMS]
        params = {name: normal(7 + n, *PARAMS[name]) for n, name in enumerate(dict.fromkeys(names))}
        if "q" in self.left_out:
            params["q"] = jnp.asarray(np.random.default_rng(0).integers(-9, 9, (12, 16)), jnp.int8)
        return params

    @property
    def args(self) -> tuple:
        return (normal(9, 5, 12), *(normal(50, *PARAMS[name]) for name in self.data))

    @property
    def fn(self) -> Callable[..., Any]:
        code = compile(self.code, self.code, "eval")
        return lambda p, x, *args: eval(code, {**NAMES, **p, "x": x, **dict(zip(self.data, args, strict=True))})


E = Entry
MEETS = "meets data in {}, which has no rule"
ENTRIES = [
    E("Products", "x @ w", {"w": "io"}),
    E("Products", "w.T @ x.T", {"w": "io"}),
    E("Products", "x @ one", {"one": "io"}, warning="full rank"),
    E("Products", "jax.vmap(jnp.dot, (0, None))(x, w)", {"w": "io"}),
    E("Products", "lax.scan(lambda x, w: (x @ w, None), x, stack)[0]", {"stack": "sio"}),
    E("Products", "(x @ stack[0]) @ jnp.take(stack, 2, axis=0)", {"stack": "sio"}),
    E("Products", "lax.ragged_dot(x, experts, groups)", {"experts": "sio"}),
    E("Products", "x @ w + x @ (up @ down)", {"w": "io", "up": "io", "down": "io"}, "dot_general of two weights"),
    E("Changed on its way", "x @ (0.5 * w * scale[:, None])", {"w": "io"}, left_out={"scale": "norm or bias"}),
    E("Changed on its way", "x @ w[:, idx]", {"w": "io"}),
    E("Changed on its way", "x @ jnp.take(w, idx, axis=1)", {"w": "io"}),
    E("Changed on its way", "x[:, :5] @ w[idx]", {"w": "io"}),
    E("Changed on its way", "x @ jnp.concatenate([w, v], 1)", {"w": "io", "v": "io"}),
    E("Changed on its way", "x @ (w + v)", {"w": "io", "v": "io"}),
    E("Changed on its way", "x @ (w + up @ down)", {"w": "io", "up": "io", "down": "io"}, "dot_general of two weights"),
    E("Changed on its way", "x @ (square - square.T)", {"square": "io"}),
    E("Changed on its way", "x @ w.ravel()[:96].reshape(12, 8)", {"w": "io"}, "reshape"),
    E("Changed on its way", "jax.vmap(lambda x: x @ (w * jnp.tanh(x)[:, None]))(x)", {"w": "io"}, "mul"),
    E("Changed on its way", "x @ jax.image.resize(w, (12, 20), 'linear')", {"w": "io"}),
    E("Changed on its way", "x @ jnp.tanh(w)", {"w": "io"}, "tanh"),
    E("Changed on its way", "x @ straight_through(w)", {"w": "io"}, "custom_vjp_call"),
    E("Changed on its way", "x @ (w * mask)", {"w": "io"}, "mul", data=("mask",)),
    E("Changed on its way", "x @ jnp.where(mask > 0, w, 0)", {"w": "io"}, "select_n", data=("mask",)),
    E("Changed on its way", "x @ lax.cond(x.sum() > 0, lambda: w, lambda: v)", {"w": "io", "v": "io"}, "cond"),
    E(
        "Changed on its way",
        "jax.vmap(lambda x, i: x @ lax.switch(i, [lambda: w, lambda: v]))(x, idx % 2)",
        {"w": "io", "v": "io"},
        "select_n",
    ),
    E("On devices", "over_devices(lambda w, x: x @ lax.all_gather(w, 'n', tiled=True), w, x, P('n'))", {"w": "io"}),
    E(
        "On devices",
        "over_devices(lambda w, x: x @ w + x @ lax.ppermute(w, 'n', [(0, 0)]), w, x, P('n'))",
        {"w": "io"},
    ),
    E("Operations without a rule", "kernel(x, w)", {"w": "io"}, "pallas_call"),
    E("Operations without a rule", "jax.vmap(kernel, (None, 0))(x, experts).sum(0)", {"experts": "sio"}, "pallas_call"),
    E("Operations without a rule", "kernel(x, square)", {"square": "io"}, "pallas_call", warning="sizes do not tell"),
    E(
        "Operations without a rule",
        "jnp.linalg.solve(square + 3 * jnp.eye(12), x.T)",
        {"square": "io"},
        "custom_linear_solve",
        warning="sizes do not tell",
    ),
    E(
        "Operations without a rule",
        "linear_call(lambda w, x: x @ w, lambda w, y: y @ w.T, w, x)",
        {"w": "io"},
        "linear_call",
    ),
    E(
        "Operations without a rule",
        "x @ v + (x[..., None] * w).sum(1)",
        {"v": "io"},
        left_out={"w": MEETS.format("mul and reduce_sum")},
        warning="LoraConfig(axes={'w': ('in', 'out')})",
    ),
    E(
        "Operations without a rule",
        "x @ v + x @ (w + mask)",
        {"v": "io"},
        left_out={"w": MEETS.format("add and dot_general")},
        warning="LoraConfig(axes={'w': ('in', 'out')})",
        data=("mask",),
    ),
    E(
        "Operations without a rule",
        "x @ w + lax.fori_loop(0, 2, lambda n, c: (c[0] @ c[1], 0.9 * c[1]), (x, square))[0].sum()",
        {"w": "io"},
        left_out={"square": MEETS.format("scan carry")},
        warning="LoraConfig(axes={'square': ('in', 'out')})",
    ),
    E(
        "Stored otherwise",
        "x @ w + x @ (q.astype(x.dtype) * 0.01)",
        {"w": "io"},
        left_out={"q": "stored in int8: an adapter is added to floating numbers alone"},
        warning="stored in int8",
    ),
    E(
        "By name only",
        "jnp.tanh(table[ids] @ square) @ head",
        {"square": "io"},
        left_out={"table": "embedding: by name only", "head": "output head: by name only"},
    ),
    E(
        "By name only",
        "jax.vmap(lambda i: table[i])(ids) @ square @ table.T",
        {"square": "io"},
        left_out={"table": "embedding: by name only"},
    ),
    E(
        "By name only",
        "lax.scan(lambda h, i: (jnp.tanh(h @ square + table[i]), h @ head), x[0], ids + (x[:, 0] > 9))[1]",
        {"square": "io"},
        left_out={"table": "embedding: by name only", "head": "output head: by name only"},
    ),
    E(
        "By name only",
        "lax.conv(x.T[None], kernel3.T, (1,), 'SAME').sum(0).T[:, :4] @ down",
        {"down": "io"},
        left_out={"kernel3": "convolution: by name only"},
    ),
    E(
        "No matrices",
        "(x + position) @ w",
        {"w": "io"},
        left_out={"position": "no matrix: meets data entry by entry, in add"},
    ),
    E(
        "No matrices",
        "x @ (row * w / jnp.linalg.norm(w, axis=0))",
        {"w": "io"},
        "mul",
        left_out={"row": "norm or bias: used as a vector"},
    ),
    E(
        "No matrices",
        "jnp.einsum('bnd,bdt->bnt', jnp.broadcast_to(latents, (2, 4, 12)) @ square, jnp.stack([x.T, 2 * x.T]))",
        {"square": "io"},
        left_out={"latents": "no matrix: stands where data do, in dot_general"},
    ),
    E(
        "No matrices",
        "(x + jax.image.resize(patches, (5, 12), 'linear')) @ w",
        {"w": "io"},
        left_out={"patches": "no matrix: meets data entry by entry, in add"},
    ),
    E("No matrices", "(x * scale) @ w", {"w": "io"}, left_out={"scale": "norm or bias: fewer than two axes"}),
    E(
        "No matrices",
        "lax.scan(lambda x, n: (x * n, None), x, norms)[0] @ w",
        {"w": "io"},
        left_out={"norms": "norm or bias: used as a vector"},
    ),
]
