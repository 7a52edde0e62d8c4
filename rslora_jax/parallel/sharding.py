"""Where arrays lie on a mesh of devices: the base by rules, and each adapter as its weight lies.

`jit` does the rest: from where its arguments lie, XLA's partitioner finds where everything else does.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from rslora_jax.config import matches, near_misses
from rslora_jax.methods.method import RANK
from rslora_jax.pytrees import Params, PyTree
from rslora_jax.sites import Site, from_paths, named_leaves
from rslora_jax.stored.form import is_stored

# A glob over paths, and the mesh axes along the last axes of the arrays that match: a stack of layers in front of
# them is whole on every device.
Rules = Sequence[tuple[str, tuple[Any, ...]]]

_BATCH_AXES = ("data", "fsdp")  # the mesh axes along which the rows of a batch are split


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
        raise ValueError(f"mesh {text!r} is of {math.prod(sizes.values())} devices, and there are {len(devices)}")
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def param_shardings(params: Params, mesh: Mesh, rules: Rules) -> PyTree:
    """Return where each parameter lies, by the first rule that matches its path; the others are whole everywhere.

    Mesh axes that the mesh lacks, or that do not divide the array's axis, are left out of a rule.

    Args:
      params: a pytree of arrays or of `jax.ShapeDtypeStruct`.
      mesh: from `make_mesh`.
      rules: pairs of a glob over paths and the mesh axes along the array's last axes.

    Returns:
      A pytree of `NamedSharding`, for `jax.device_put` or a jit's `in_shardings`.

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

    def one(path: str, leaf: Any) -> NamedSharding:
        last = next((axes for pattern, axes in rules if matches(path, pattern)), ())
        if len(last) > len(leaf.shape):
            raise ValueError(f"the sharding rule {last} has more axes than {path} of shape {tuple(leaf.shape)}")
        spec = (None,) * (len(leaf.shape) - len(last)) + tuple(last)
        if is_stored(leaf):  # its arrays have the stack's axes in common, and no others
            spec = spec[: len(leaf.stack)]
        return NamedSharding(
            mesh, PartitionSpec(*(_dividing(mesh, n, a) for n, a in zip(leaf.shape, spec, strict=False)))
        )

    return from_paths(params, {path: one(path, leaf) for path, leaf in leaves.items()})


def stored_shardings(leaf: Any, sharding: Any) -> Any:
    """Return where the arrays of a weight lie, when the weight lies as `sharding` says; no block is cut.

    Along the stack's axes each is split as the weight is, and along the others where it has whole blocks there.

    Args:
      leaf: a stored weight, of arrays or of `jax.ShapeDtypeStruct`; of an array the result is `sharding` itself.
      sharding: of the weight's shape.

    Returns:
      The same node of the pytree with a sharding in place of each array.
    """
    if not is_stored(leaf):
        return sharding
    if not isinstance(sharding, NamedSharding):
        return jax.tree.map(lambda array: sharding, leaf)
    depth, blocks = len(leaf.stack), leaf.blocks
    spec = (*sharding.spec, *(None,) * (leaf.ndim - len(sharding.spec)))

    def one(path: Any, array: Any) -> NamedSharding:
        own = blocks.get(jax.tree_util.keystr(path[:1], simple=True), ())
        counts = [size // block for size, block in zip(array.shape, (1,) * depth + own, strict=False)]
        split = [_dividing(sharding.mesh, count, axes) for count, axes in zip(counts, spec, strict=False)]
        return NamedSharding(sharding.mesh, PartitionSpec(*split), memory_kind=sharding.memory_kind)

    return jax.tree_util.tree_map_with_path(one, leaf)


def _dividing(mesh: Mesh | AbstractMesh, size: int, axes: Any) -> Any:
    """Return the mesh axes of an array's axis that there are and that divide its size."""
    names = [axes] if isinstance(axes, str) else list(axes or ())
    names = [name for name in names if name in mesh.shape]
    if size % math.prod(mesh.shape[name] for name in names):
        return None
    return None if not names else names[0] if len(names) == 1 else tuple(names)


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
        sharding = _sharding_of(leaves[site.weight])
        if not isinstance(sharding, NamedSharding):
            return dict.fromkeys(site.factors, sharding)
        spec = (*sharding.spec, *(None,) * (len(site.shape) - len(sharding.spec)))

        def flat(axes: Iterable[int | str]) -> list[str]:
            own = (spec[axis] for axis in axes if axis != RANK)  # type: ignore[index]
            return [name for of in own for name in ([of] if isinstance(of, str) else of or ())]

        def factor(axes: Sequence[int | str]) -> NamedSharding:
            used = set(flat(axes))
            free = tuple(name for name in flat(n for n in range(len(site.shape)) if n not in axes) if name not in used)
            rank = _dividing(sharding.mesh, site.rank, free) if split_rank else None
            of = [rank if axis == RANK else spec[axis] for axis in axes]  # type: ignore[index]
            return NamedSharding(sharding.mesh, PartitionSpec(*of))

        return {name: factor(axes) for name, axes in site.factors.items()}

    return {path: one(site) for path, site in sites.items()}


def _sharding_of(leaf: Any) -> Sharding:
    """Return where a weight lies: of one in a form of its own, where its stack does."""
    if not is_stored(leaf):
        return leaf.sharding
    sharding = jax.tree.leaves(leaf)[0].sharding
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[: len(leaf.stack)]))


def batch_sharding(mesh: Mesh, rows: int | None = None) -> NamedSharding:
    """Return where a batch lies: its rows split along the mesh axes "data" and "fsdp", those that there are.

    Args:
      mesh: from `make_mesh`.
      rows: how many rows a batch has, where that is to be checked.

    Raises:
      ValueError: the rows cannot be split evenly.
    """
    names = tuple(name for name in _BATCH_AXES if name in mesh.shape)
    parts = math.prod(mesh.shape[name] for name in names)
    if rows is not None and rows % parts:
        raise ValueError(f"a batch of {rows} rows cannot be split in {parts} ({' x '.join(names)}): give a multiple")
    return NamedSharding(mesh, PartitionSpec(names or None))


def pin_rows(apply: Callable[..., Any], where: Sharding, modules: tuple[type, ...]) -> Callable[..., Any]:
    """Keep the outputs of some Flax Linen modules where the batch lies, in a model's `apply`.

    Where weights and rows are both split along an axis ("fsdp"), XLA may as well leave the weights where they are and
    move the activations of all rows: correct, and several times dearer. Told where a few activations lie, such as those
    between layers, it moves the weights. Of a module that returns a tuple, the first is meant.

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
        with nn.intercept_methods(interceptor):
            return apply(*args, **kwargs)

    return pinned


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
