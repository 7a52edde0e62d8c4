"""`quantize`: put the weights of a base into fewer bits, and say what that costs."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from rslora_jax.config import matches, near_misses
from rslora_jax.pytrees import Params
from rslora_jax.sites import Site, from_paths, named_leaves
from rslora_jax.stored.form import Stored, is_stored
from rslora_jax.stored.kept import kept_dense
from rslora_jax.stored.rounding import Rounding, rounding
from rslora_jax.table import shared_name

if TYPE_CHECKING:
    from rslora_jax.wrap import Lora

_HEADER = ("weight", "shape", "format", "bits", "error", "MB before", "after")


@dataclasses.dataclass(frozen=True)
class Rounded:
    """What became of one weight.

    Attributes:
      shape: its shape.
      format: the name of its format.
      error: the Frobenius norm of what it lost beside its own; None where it was no array yet.
      before, after: its bytes.
    """

    shape: tuple[int, ...]
    format: str
    error: float | None
    before: int
    after: int

    @property
    def bits(self) -> float:
        """How many bits a number has, scales and all."""
        return 8 * self.after / max(math.prod(self.shape), 1)


@dataclasses.dataclass(frozen=True)
class Quantised:
    """What `quantize` did; printed, a table.

    Attributes:
      weights: what became of each weight that has fewer bits now, by path.
      kept: why the others stayed as they were, by path.
      kept_bytes: the bytes of these.
    """

    weights: Mapping[str, Rounded]
    kept: Mapping[str, str]
    kept_bytes: int

    def __str__(self) -> str:
        rows: dict[Any, dict[str, Rounded]] = {}
        for path, one in self.weights.items():
            rows.setdefault((re.sub(r"\d+", "*", path), one.shape, one.format), {})[path] = one
        lines = [_HEADER, *(_line(list(row), list(row.values())) for row in rows.values())]
        widths = [max(len(line[n]) for line in lines) for n in range(len(_HEADER))]
        text = "\n".join(
            "  ".join(c.rjust(w) if n else c.ljust(w) for n, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in lines
        )
        before, after = (sum(getattr(one, of) for one in self.weights.values()) for of in ("before", "after"))
        return (
            f"{text}\n{len(self.weights)} weights of {before / 1e6:,.1f} MB are {after / 1e6:,.1f} MB now; "
            f"{len(self.kept)} stay as they are, {self.kept_bytes / 1e6:,.1f} MB"
        )


def _line(paths: Sequence[str], alike: Sequence[Rounded]) -> tuple[str, ...]:
    first = alike[0]
    errors = sorted({f"{one.error:.3%}" for one in alike if one.error is not None}, key=lambda text: float(text[:-1]))
    error = "-" if not errors else errors[0] if len(errors) == 1 else f"{errors[0]}..{errors[-1]}"
    shape = " x ".join(map(str, first.shape))
    before, after = (f"{sum(getattr(one, of) for one in alike) / 1e6:,.1f}" for of in ("before", "after"))
    return shared_name(paths), shape, first.format, f"{first.bits:.2f}", error, before, after


def quantize(
    params: Params,
    format: str = "nf4",
    *,
    targets: str | Sequence[str] = "all-linear",
    exclude: str | Sequence[str] = (),
    lora: Lora | None = None,
    block: int | None = None,
    double: bool = True,
    donate: bool = False,
) -> tuple[Params, Quantised]:
    """Put the weights of a base into 4 or 8 bits.

    By default these are the floating arrays of two axes or more; tables, position tables, heads and routers stay, by
    their names (`stored.kept.kept_dense`), and so do norms and biases. The last two axes are taken to be (in, out), and
    those in front a stack; of a table, its rows are in. What a weight is used for is known exactly with `lora`.

    Weights go one after the other, and a stack element by element: beside the result there is one dense weight. On
    a mesh they stay where they lie. Under jit, or of shapes alone, no error is measured.

    Args:
      params: any pytree of arrays or of `jax.ShapeDtypeStruct`.
      format: "nf4" (arXiv 2305.14314), "int8" or "float8", by `rslora_jax.stored`.
      targets: "all-linear", or globs over paths, also with it, as `LoraConfig` has them; a table is named so.
      exclude: globs over paths of what is to stay.
      lora: from `wrap`, of these parameters or their shapes: its sites tell what is in, out and stacked, and its kinds
        what is a table.
      block: of NF4, how many numbers have one scale, an even number; by default 64.
      double: of NF4, whether the scales are stored in 8 bits themselves.
      donate: free each dense weight as soon as it is not needed; `params` is then not to be used any more.

    Returns:
      (params, what was done): the same pytree with `Stored` leaves; and by weight the error, bits and bytes.

    Raises:
      ValueError: a format, pattern or block size that does not exist, or a weight, named, that is not finite, is stored
        in fewer bits already, or holds no floating numbers.

    >>> params = {"up": jax.random.normal(jax.random.key(0), (128, 64)), "bias": jnp.ones(64)}
    >>> small, made = quantize(params)
    >>> type(small["up"]).__name__, small["up"].nbytes, round(made.weights["up"].error, 2), dict(made.kept)
    ('NF4', 4232, 0.09, {'bias': 'norm or bias'})
    """
    how, leaves = rounding(format, block=block, double=double), named_leaves(params)
    kept = kept_leaves(leaves, lora, targets, exclude)
    sites = {} if lora is None else {site.weight: site for site in lora.sites.values() if site.scaled}
    shared = collections.Counter(map(id, leaves.values()))
    made: dict[str, Rounded] = {}
    for path, leaf in leaves.items():
        if path in kept:
            continue
        if is_stored(leaf):
            raise ValueError(f"{path} is stored as {leaf.format} already: exclude it, or give the weight as an array")
        stored, error = rounded(path, leaf, how, sites.get(path))
        made[path] = Rounded(tuple(leaf.shape), stored.format, error, _bytes(leaf), stored.nbytes)
        if donate and isinstance(leaf, jax.Array) and shared[id(leaf)] == 1:
            leaf.delete()
        leaves[path] = stored
    rest = sum(_bytes(leaves[path]) for path in kept)
    return from_paths(params, leaves), Quantised(made, kept, rest)


def rounded(path: str, leaf: Any, how: Rounding, site: Site | None = None) -> tuple[Stored, float | None]:
    """Return a weight in fewer bits, and its error; None where it has no values yet.

    Raises:
      ValueError: it is not finite.
    """
    axes, depth = _axes(path, len(leaf.shape), site)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        stored = jax.eval_shape(lambda w: how(w, axes, depth), leaf)
        where = _shardings(stored, leaf.sharding, depth)
        if where is not None:
            stored = jax.tree.map(
                lambda part, at: jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=at), stored, where
            )
        return stored, None
    if isinstance(leaf, jax.core.Tracer):
        return how(leaf, axes, depth), None
    sharding = getattr(leaf, "sharding", None)
    split = _split(sharding, depth)
    where = _shardings(jax.eval_shape(lambda w: how(w, axes, depth), leaf), sharding, depth)
    stored, lost, whole, finite = _compiled(how, axes, depth, split, where)(jnp.asarray(leaf))
    if not bool(np.all(finite)):
        raise ValueError(f"{path} is not finite everywhere, and no scale holds what is not: mend it, or exclude it")
    size = float(np.sum(np.asarray(whole, np.float64)))
    return stored, math.sqrt(float(np.sum(np.asarray(lost, np.float64))) / size) if size else 0.0


def _bytes(leaf: Any) -> int:
    if is_stored(leaf):
        return leaf.nbytes
    return math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize if hasattr(leaf, "dtype") else 0


class Measured(NamedTuple):
    """A weight in fewer bits, and of each element of its stack.

    Attributes:
      stored: the weight.
      lost, whole: the sums of squares of what it lost and of what it was, in one unit.
      finite: whether all of it was.
    """

    stored: Any
    lost: Any
    whole: Any
    finite: Any


def measured(weight: Array, how: Rounding, axes: tuple[int, ...], depth: int, split: tuple[bool, ...]) -> Measured:
    """Return a weight in fewer bits with what it lost.

    Args:
      weight, how, axes, depth: as of `Rounding`.
      split: for each axis of the stack, whether devices have its elements apart.
    """
    most = jnp.max(jnp.abs(weight.astype(_wide(weight.dtype))), initial=0)
    unit = jnp.where((most > 0) & jnp.isfinite(most), most, 1)

    def one(w: Array) -> Measured:
        stored, wide = how(w, axes), w.astype(unit.dtype)
        gone = (wide - stored.dense().astype(unit.dtype)) / unit
        return Measured(stored, jnp.sum(gone**2), jnp.sum((wide / unit) ** 2), jnp.isfinite(wide).all())

    each: Callable[[Array], Measured] = one
    for n in reversed(range(depth)):  # one after the other, unless devices have them apart
        each = jax.vmap(each) if split[n] else functools.partial(lax.map, each)
    return each(weight)


@functools.lru_cache(256)
def _compiled(how: Rounding, axes: tuple[int, ...], depth: int, split: tuple[bool, ...], where: Any) -> Any:
    """Return `measured`, compiled once for weights that are alike."""
    made = functools.partial(measured, how=how, axes=axes, depth=depth, split=split)
    return jax.jit(made, out_shardings=None if where is None else Measured(where, None, None, None))


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _axes(path: str, ndim: int, site: Site | None) -> tuple[tuple[int, ...], int]:
    """Return the axes behind the stack that have one scale between them, and how many axes the stack has."""
    if site is None:
        is_table = kept_dense(path, (2,) * ndim).endswith("table")
        return (1 if is_table else 0,), max(ndim - 2, 0)
    depth = next((n for n in range(ndim) if n not in site.stack_axes), 0)  # only those in front are a stack
    of = site.out_axes if site.kind == "embedding" else site.in_axes
    return tuple(n - depth for n in of), depth


def kept_leaves(
    leaves: Mapping[str, Any],
    lora: Lora | None,
    targets: str | Sequence[str] = "all-linear",
    exclude: str | Sequence[str] = (),
) -> dict[str, str]:
    """Return why each leaf that is not asked for stays as it is; arguments as of `quantize`."""
    whys = {path: _why(path, leaf, lora) for path, leaf in leaves.items()}
    chosen: set[str] = set()
    for pattern in [targets] if isinstance(targets, str) else targets:
        chosen |= {path for path, why in whys.items() if not why} if pattern == "all-linear" else _named(pattern, whys)
    for pattern in [exclude] if isinstance(exclude, str) else exclude:
        gone = {path for path in leaves if matches(path, pattern)}
        if not gone:
            raise ValueError(
                f"exclude {pattern!r} matches no parameter: did you mean {near_misses(pattern, list(leaves))}?"
            )
        chosen -= gone
        whys |= {path: f"excluded by {pattern!r}" for path in gone}
    if not chosen:
        raise ValueError("nothing is left to quantise: no array is a weight of two axes that is neither named nor kept")
    return {path: why or "no target names it" for path, why in whys.items() if path not in chosen}


def _why(path: str, leaf: Any, lora: Lora | None) -> str:
    """Return why a leaf stays as it is unless it is named; "" where nothing is to be said."""
    if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return "no floating numbers"
    if jnp.finfo(leaf.dtype).bits < 16:
        return "in fewer bits already"
    by_name = kept_dense(path, leaf.shape)
    if lora is None or by_name:
        return by_name
    kind = lora.kinds.get(path)
    if kind == "embedding" or path in lora.tied:
        return "table"
    if lora.left_out.get(path, "").startswith("output head"):
        return "head"
    return {"linear": "", "expert": "", "convolution": "convolution"}.get(kind or "", "no weight of a product")


def _named(pattern: str, whys: Mapping[str, str]) -> set[str]:
    """Return the leaves that a pattern names: norms and biases, which are among the others, are not."""
    hit = {path for path in whys if matches(path, pattern)}
    found = {path for path in hit if whys[path] not in ("norm or bias", "no floating numbers", "in fewer bits already")}
    if found:
        return found
    if hit:
        path = min(hit)
        raise ValueError(f"target {pattern!r} matches {path}, which stays as it is: {whys[path]}")
    near = near_misses(pattern, [path for path, why in whys.items() if why != "norm or bias"] or list(whys))
    raise ValueError(f"target {pattern!r} matches no weight: did you mean {near}?")


def _split(sharding: Any, depth: int) -> tuple[bool, ...]:
    """Return for each axis of the stack whether devices have its elements apart."""
    spec = tuple(sharding.spec) if isinstance(sharding, NamedSharding) else ()
    return tuple(n < len(spec) and spec[n] is not None for n in range(depth))


def _shardings(stored: Stored, sharding: Any, depth: int) -> Any:
    """Return where the arrays of a stored weight lie that lay as said: as it, without a block being cut."""
    if not isinstance(sharding, NamedSharding):
        return None
    spec = (*sharding.spec, *(None,) * (stored.ndim - len(sharding.spec)))

    def fits(size: int, names: Any) -> bool:
        names = [names] if isinstance(names, str) else list(names or ())
        return size % math.prod(sharding.mesh.shape[name] for name in names) == 0

    def one(name: str, part: Any) -> NamedSharding:
        own = [
            of if fits(part.shape[depth + n] // size, of) else None
            for n, (of, size) in enumerate(zip(spec[depth:], stored.blocks.get(name, ()), strict=False))
        ]
        return NamedSharding(sharding.mesh, PartitionSpec(*spec[:depth], *own))

    parts = {f.name: getattr(stored, f.name) for f in dataclasses.fields(stored) if not f.metadata.get("static")}  # type: ignore[arg-type]
    return dataclasses.replace(stored, **{n: one(n, part) for n, part in parts.items() if part is not None})  # type: ignore[type-var]
