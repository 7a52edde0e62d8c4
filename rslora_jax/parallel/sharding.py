"""Where arrays lie on a mesh of devices: the base by rules, and each adapter as its weight lies.

`jit` does the rest: from where its arguments lie, XLA's partitioner finds where everything else does.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from rslora_jax.config import matches, near_misses
from rslora_jax.methods.method import RANK
from rslora_jax.pytrees import Params, PyTree
from rslora_jax.sites import Site, from_paths, named_leaves
from rslora_jax.stored.form import is_stored
from rslora_jax.stored.laid import dividing, sharding_of, stored_shardings

# A glob over paths, and the mesh axes along the last axes of the arrays that match: a stack of layers in front of
# them is whole on every device.
Rules = Sequence[tuple[str, tuple[Any, ...]]]

BATCH_AXES = ("data", "fsdp")  # the mesh axes along which the rows of a batch are split


def make_mesh(text: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh from its axes by name, such as "data=2,fsdp=4,tensor=1".

    Args:
      text: names and sizes; one size may be -1, for all devices that the others leave.
      devices: by default all of `jax.devices()`.

    Raises:
      ValueError: the text is no such list, or the sizes do not make up the number of devices.

    >>> dict(make_mesh("data=-1,tensor=1").shape)["tensor"]
    1
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if not name.isidentifier() or not size.lstrip("-").isdigit() or int(size) == 0 or name in sizes:
            raise ValueError(f"mesh {text!r}: {part!r} is not a new name=size, as in data=2,fsdp=4,tensor=1")
        sizes[name] = int(size)
    free = [name for name, size in sizes.items() if size < 0]
    if len(free) > 1 or any(sizes[name] != -1 for name in free):
        raise ValueError(f"mesh {text!r}: a size is above 0, and -1 for one axis at most")
    known = math.prod(size for size in sizes.values() if size > 0)
    if free:
        sizes[free[0]] = max(1, len(devices) // known)
    if math.prod(sizes.values()) != len(devices):
        asked, there = (
            math.prod(sizes.values()),
            f"{len(devices)} {devices[0].platform} device{'s'[: len(devices) > 1]}",
        )
        more = f"; to try it on a CPU, set XLA_FLAGS=--xla_force_host_platform_device_count={asked}"
        is_few = asked > len(devices) and devices[0].platform == "cpu"
        raise ValueError(f"mesh {text!r} is of {asked} devices, and JAX sees {there}{more if is_few else ''}")
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def param_shardings(params: Params, mesh: Mesh, rules: Rules) -> PyTree:
    """Return where each parameter lies, by the first rule that matches its path; the others are whole everywhere.

    Mesh axes that the mesh lacks, or that do not divide the array's axis, are left out of a rule.

    Args:
      params: a pytree of arrays or of `jax.ShapeDtypeStruct`.
      mesh: from `make_mesh`.
      rules: pairs of a glob over paths and the mesh axes along the array's last axes.

    Returns:
      A pytree of `NamedSharding`, for `jax.device_put` or a jit's `in_shardings`; of a stored weight, one for each of
      its arrays (`stored_shardings`).

    Raises:
      ValueError: a rule matches no parameter; it says what comes close.

    >>> params = {"up": {"kernel": jax.ShapeDtypeStruct((12, 8, 16), "float32")}}
    >>> where = param_shardings(params, make_mesh("fsdp=-1"), [("*/kernel", ("fsdp", "tensor"))])
    >>> tuple(where["up"]["kernel"].spec)
    (None, 'fsdp', None)
    """
    leaves = named_leaves(params)
    for pattern, _ in rules:
        if not any(matches(path, pattern) for path in leaves):
            close = near_misses(pattern, list(leaves))
            raise ValueError(f"sharding rule {pattern!r} matches no parameter: did you mean {close}?")

    def one(path: str, leaf: Any) -> Any:
        last = next((axes for pattern, axes in rules if matches(path, pattern)), ())
        if len(last) > len(leaf.shape):
            raise ValueError(f"the sharding rule {last} has more axes than {path} of shape {tuple(leaf.shape)}")
        spec = (None,) * (len(leaf.shape) - len(last)) + tuple(last)
        split = PartitionSpec(*(dividing(mesh, n, a) for n, a in zip(leaf.shape, spec, strict=True)))
        return stored_shardings(leaf, NamedSharding(mesh, split))

    return from_paths(params, {path: one(path, leaf) for path, leaf in leaves.items()})


def adapter_shardings(
    sites: Mapping[str, Site], params: Params, *, split_rank: bool = False
) -> dict[str, dict[str, Sharding]]:
    """Return where adapters lie: each array as its weight along the axes that it has of it, the rank whole.

    Args:
      sites: `Lora.sites`.
      params: the base, its arrays (or `jax.ShapeDtypeStruct`s) with their shardings.
      split_rank: split each factor along its rank too, over the mesh axes that only the other one uses: less memory,
        for more that moves. At high rank, where adapters are as large as the base, it can be what makes them fit.

    Returns:
      `{path: {name: ...}}`, for `jax.device_put(adapters, ...)`. Where a weight lies on one device, so do
      its factors.

    >>> from rslora_jax import LoraConfig, wrap
    >>> mesh = make_mesh("fsdp=-1")
    >>> w = jax.ShapeDtypeStruct((8, 16), "float32", sharding=NamedSharding(mesh, PartitionSpec("fsdp", None)))
    >>> x = jax.ShapeDtypeStruct((2, 8), "float32")
    >>> lora = wrap(lambda p, x: x @ p["w"], {"w": w}, x, config=LoraConfig(rank=3, alpha=4))
    >>> {factor: tuple(where.spec) for factor, where in adapter_shardings(lora.sites, {"w": w})["w"].items()}
    {'a': ('fsdp', None), 'b': (None, None)}
    """
    leaves = named_leaves(params)

    def one(site: Site) -> dict[str, Sharding]:
        sharding = sharding_of(leaves[site.weight])
        if not isinstance(sharding, NamedSharding):
            return dict.fromkeys(site.factors, sharding)
        spec = (*sharding.spec, *(None,) * (len(site.shape) - len(sharding.spec)))

        def flat(axes: Iterable[int | str]) -> list[str]:
            own = (spec[axis] for axis in axes if axis != RANK)  # type: ignore[index]
            return [name for of in own for name in ([of] if isinstance(of, str) else of or ())]

        def factor(axes: Sequence[int | str]) -> NamedSharding:
            used = set(flat(axes))
            free = tuple(name for name in flat(n for n in range(len(site.shape)) if n not in axes) if name not in used)
            rank = dividing(sharding.mesh, site.rank, free) if split_rank else None
            of = [rank if axis == RANK else spec[axis] for axis in axes]  # type: ignore[index]
            return NamedSharding(sharding.mesh, PartitionSpec(*of))

        return {name: factor(axes) for name, axes in site.factors.items()}

    return {path: one(site) for path, site in sites.items()}


def batch_sharding(mesh: Mesh, rows: int | None = None) -> NamedSharding:
    """Return where a batch lies: its rows split along the mesh axes "data" and "fsdp", those that there are.

    Args:
      mesh: from `make_mesh`.
      rows: how many rows a batch has, where that is to be checked.

    Raises:
      ValueError: the rows cannot be split evenly.
    """
    names = tuple(name for name in BATCH_AXES if name in mesh.shape)
    parts = math.prod(mesh.shape[name] for name in names)
    if rows is not None and rows % parts:
        raise ValueError(f"a batch of {rows} rows cannot be split in {parts} ({' x '.join(names)}): give a multiple")
    return NamedSharding(mesh, PartitionSpec(names or None))


def pin_rows(apply: Callable[..., Any], where: Sharding, modules: tuple[type, ...]) -> Callable[..., Any]:
    """Keep the outputs of some Flax Linen modules where the batch lies, in a model's `apply`.

    Where weights and rows are both split along an axis ("fsdp"), XLA may as well leave the weights where they are and
    move the activations of all rows: correct, and several times dearer. Told where a few activations lie, such as those
    between layers, it moves the weights. Of a module that returns a tuple, the first is meant. The mesh is in context
    while `apply` is traced, as attention by a kernel asks for it (`models.kernels`).

    Args:
      apply: `model.apply`; give `wrap` what this returns.
      where: from `batch_sharding`.
      modules: classes, such as `(Embed, Layer)` of `models.decoder`.
    """
    from flax import linen as nn

    def pin(x: Any) -> Any:
        return jax.lax.with_sharding_constraint(x, where)

    def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        if context.method_name != "__call__" or not isinstance(context.module, modules):
            return out
        return (pin(out[0]), *out[1:]) if isinstance(out, tuple) else pin(out)

    def pinned(*args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(interceptor), _in_context(where):
            return apply(*args, **kwargs)

    return pinned


def _in_context(where: Sharding) -> contextlib.AbstractContextManager[None]:
    """Return the context of a sharding's mesh, for what is traced; of one that has no mesh, no context."""
    if not isinstance(where, NamedSharding):
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(where.mesh.abstract_mesh)


def pin_packed(apply: Callable[..., Any], params: Params, where: Sharding) -> Callable[..., Any]:
    """Let stored weights travel packed to where rows need them, in a function of parameters.

    A weight that is split along an axis along which rows are too ("fsdp") is gathered for its use. XLA would make each
    part dense first, and gather eight times the bytes; told where the weight is to lie, each use gathers codes and
    scales. Give `wrap` what this returns. A look-up takes its rows from where they lie.

    Args:
      apply: a function `(params, *args)`, such as what `pin_rows` returns.
      params: the base on its mesh, of arrays or of `jax.ShapeDtypeStruct` with shardings.
      where: from `batch_sharding`.

    >>> from rslora_jax.stored import int8
    >>> mesh = make_mesh("fsdp=-1")
    >>> w = int8(jax.numpy.ones((8, 16)))
    >>> w = jax.device_put(w, stored_shardings(w, NamedSharding(mesh, PartitionSpec("fsdp", None))))
    >>> apply = pin_packed(lambda p, x: x @ p["w"], {"w": w}, batch_sharding(mesh))
    >>> apply({"w": w.dense()}, jax.numpy.ones((4, 8))).shape
    (4, 16)
    """
    rows = {name for axes in getattr(where, "spec", ()) for name in ([axes] if isinstance(axes, str) else axes or ())}
    lying = {path: sharding_of(leaf) for path, leaf in named_leaves(params).items() if is_stored(leaf)}
    at_use = {path: _without(of, rows) for path, of in lying.items() if isinstance(of, NamedSharding)}
    moved = {path: of for path, of in at_use.items() if of.spec != lying[path].spec}  # type: ignore[attr-defined]

    def pinned(params: Params, *args: Any, **kwargs: Any) -> Any:
        leaves = named_leaves(params)
        leaves |= {path: jax.lax.with_sharding_constraint(leaves[path], of) for path, of in moved.items()}
        return apply(from_paths(params, leaves), *args, **kwargs)

    return pinned if moved else apply


def _without(sharding: NamedSharding, names: Collection[str]) -> NamedSharding:
    """Return a sharding that leaves an array whole along some mesh axes."""

    def left(axes: Any) -> Any:
        kept = tuple(name for name in ([axes] if isinstance(axes, str) else axes or ()) if name not in names)
        return kept[0] if len(kept) == 1 else kept or None

    return NamedSharding(sharding.mesh, PartitionSpec(*map(left, sharding.spec)))


def process_rows(sharding: Sharding, rows: int) -> slice:
    """Return the rows of a batch that this process's devices hold, which is all that it has to read.

    Raises:
      ValueError: they are not next to each other: the mesh has its devices in another order than the processes.

    >>> process_rows(batch_sharding(make_mesh("data=-1")), 4 * len(jax.devices())) == slice(0, 4 * len(jax.devices()))
    True
    """
    slices = [index[0] for index in sharding.addressable_devices_indices_map((rows,)).values() if index]
    held = sorted({piece.indices(rows)[:2] for piece in slices})
    if any(stop != start for (_, stop), (start, _) in itertools.pairwise(held)):
        raise ValueError(
            f"process {jax.process_index()} holds rows {held} of a batch, with others between: put the axes that split "
            "rows (data, fsdp) first in the mesh"
        )
    return slice(held[0][0], held[-1][1])
