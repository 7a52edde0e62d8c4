"""How a weight and its adapter's arrays lie in PyTorch, beside how they lie here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rslora_jax.interop.names import Names, Place
from rslora_jax.interop.peft.tied import Places, modules_of, places_of_uses
from rslora_jax.methods.method import RANK, asked, rescaled
from rslora_jax.sites import Site
from rslora_jax.transform.uses import LOOKUP
from rslora_jax.wrap import Lora


class Modules(NamedTuple):
    """What a model's parameters and adapters are in PEFT.

    Attributes:
      places: where the weights of modules are.
      of: by the path of an adapter, its modules and their layers, without those that have none; of a tied table's, its
        own first and then its head. What is trained whole is not among them.
    """

    places: Places
    of: dict[str, dict[str, int | None]]


def site_modules(lora: Lora, names: Names) -> Modules:
    """Return what a model's parameters and adapters are in PEFT.

    Raises:
      ValueError: an adapted weight has no form in PEFT: no name, or stacked axes other than that of the layers.
    """
    places = places_of_uses(names, lora.shapes)
    of_weight: dict[str, list[Site]] = {}
    adapted = {path: site for path, site in lora.sites.items() if site.scaled}
    for site in adapted.values():
        of_weight.setdefault(site.weight, []).append(site)
    modules: dict[str, dict[str, int | None]] = {path: {} for path in adapted}
    for name, place in places.found.items():
        for site in of_weight.get(place.path, ()):
            if not name.endswith(".weight"):
                raise ValueError(f"{place.path} is {name}, which is no weight of a module: PEFT has no adapter for it")
            module = name.removesuffix(".weight")
            own = modules_of(site, module, places.heads, names) if LOOKUP in site.uses else [module]
            modules[site.path] |= dict.fromkeys(own, place.layer)
    for path, site in adapted.items():
        _check_axes(site, stacked=None not in modules[path].values())
        if site.layers:  # those with an adapter; PEFT has layers on the first axis alone
            modules[path] = {name: n for name, n in modules[path].items() if n is None or site.layers[n].rank}
    return Modules(places, modules)


def _check_axes(site: Site, stacked: bool) -> None:
    """Refuse axes for which PEFT has no form."""
    stack = (0,) if stacked else ()
    if site.stack_axes != stack:
        raise ValueError(
            f"{site.path} of shape {site.shape} has the stacked axes {site.stack_axes}, where the table of names has "
            f"{stack}: PEFT has adapters for one matrix each"
        )
    if site.groups > 1:
        raise ValueError(
            f"{site.path} is the kernel of a convolution in {site.groups} groups, of which PEFT's adapter has another "
            "form: exclude it"
        )
    last = len(site.shape) - 1
    if site.kind == "convolution" and (site.out_axes != (last,) or site.in_axes != tuple(range(last))):
        raise ValueError(f"{site.path} of shape {site.shape} is no kernel with axes (*window, in, out): exclude it")


def peft_names(site: Site) -> dict[str, str]:
    """Return what PEFT calls each of an adapter's arrays, behind the name of the module.

    Raises:
      ValueError: PEFT has none of this method, or of one of its arrays.
    """
    names = asked(site.method, "peft_names", "be written for PEFT, or read from it")(site)
    for name in site.factors:
        if name not in names:
            raise ValueError(f"the {name} of {site.path} has no name in PEFT: {type(site.method).__name__} gives none")
    return names


def shared_with_head(site: Site) -> Mapping[str, str]:
    """Return what PEFT calls the tensors of a table's head that are the table's own turned.

    Raises:
      ValueError: the method has no adapter that both share.
    """
    return asked(site.method, "peft_head", "be shared by a table and its head in PEFT (adapt @lookup or @product)")


def peft_shapes(site: Site, rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an adapter's arrays in PEFT, of one layer.

    Of a factor with the input axes (r, in), with the output axes (out, r); of a convolution (r, in, *window) and
    (out, r, 1...).
    """
    return {name: _shape_in_peft(site, axes, rank) for name, axes in site.factors.items()}


def _shape_in_peft(site: Site, axes: Sequence[int | str], rank: int) -> tuple[int, ...]:
    own = [axis for axis in axes if axis not in site.stack_axes]
    sizes = tuple(site.shape[axis] for axis in own if axis != RANK)  # type: ignore[index]
    if RANK not in own:
        one = (math.prod(sizes),)
        return (1, *one, *(1,) * (len(site.in_axes) - 1)) if site.kind == "convolution" else one
    if site.kind != "convolution":
        return (rank, math.prod(sizes)) if own[-1] == RANK else (math.prod(sizes), rank)
    *window, width = sizes
    return (rank, width, *window) if own[-1] == RANK else (math.prod(sizes), rank, *(1,) * (len(site.in_axes) - 1))


def to_peft(site: Site, factors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Give the arrays of one layer's adapter PEFT's shapes."""

    def one(name: str, array: np.ndarray) -> np.ndarray:
        axes = [axis for axis in site.factors[name] if axis not in site.stack_axes]
        shape = _shape_in_peft(site, axes, array.shape[axes.index(RANK)] if RANK in axes else 0)
        if RANK not in axes:
            return array.reshape(shape)
        if axes[-1] == RANK:
            turned = np.moveaxis(array, (-1, -2), (0, 1)) if site.kind == "convolution" else _flat(array, -1).T
        else:
            turned = _flat(array, 0).T
        return turned.reshape(shape)

    return {name: one(name, array) for name, array in factors.items()}


def from_peft(site: Site, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Give arrays of PEFT's shapes ours, of one layer."""

    def one(name: str, tensor: np.ndarray) -> np.ndarray:
        axes = [axis for axis in site.factors[name] if axis not in site.stack_axes]
        sizes = tuple(site.shape[axis] for axis in axes if axis != RANK)  # type: ignore[index]
        if RANK not in axes:
            return tensor.reshape(sizes)
        if axes[-1] == RANK:
            turned = np.moveaxis(tensor, (0, 1), (-1, -2)) if site.kind == "convolution" else tensor.T
            return turned.reshape(*sizes, tensor.shape[0])
        return tensor.reshape(-1, tensor.shape[1]).T.reshape(tensor.shape[1], *sizes)

    return {name: one(name, tensor) for name, tensor in tensors.items()}


def _flat(array: np.ndarray, rank_axis: int) -> np.ndarray:
    """Make one axis of all but the rank, which is first or last."""
    return array.reshape(-1, array.shape[-1]) if rank_axis == -1 else array.reshape(array.shape[0], -1)


def weight_from_torch(place: Place, shape: tuple[int, ...], tensor: np.ndarray) -> np.ndarray | None:
    """Give one layer's weight as PyTorch has it our shape; None where it does not fit.

    What is transposed is a kernel (*in, *out), which is there (out, in), or (out, in, *window) with a window.
    """
    if tensor.ndim < 2 or place.transposed is False:
        return tensor if tensor.shape == shape else None
    place.is_turned(2)  # the table of names may not say
    if tensor.ndim > 2:
        turned = np.moveaxis(tensor, (1, 0), (-2, -1))
        return turned if turned.shape == shape else None
    ins = itertools.accumulate(shape[:-1], lambda size, n: size * n)
    fits = tensor.shape[1] in ins and tensor.size == math.prod(shape)
    return tensor.T.reshape(shape) if fits else None


def weight_to_torch(place: Place, weight: np.ndarray, kind: str | None) -> np.ndarray:
    """Give one layer's weight as PyTorch has it: the inverse of `weight_from_torch`.

    Raises:
      ValueError: it has more than two axes, and is no convolution's kernel (`kind`).
    """
    if kind == "convolution" and weight.ndim > 2 and place.transposed is not False:
        return np.moveaxis(weight, (-2, -1), (1, 0))
    return place.to_file(weight)


def is_table(path: str) -> bool:
    """Say whether a weight is a token table, by its path."""
    return path.rsplit("/", 1)[-1] == "embedding"


def by_layer(modules: Mapping[str, int | None]) -> list[str]:
    """Return the modules of an adapter in the order of their layers; of a tied table, its own first."""
    return sorted(modules, key=lambda module: -1 if (layer := modules[module]) is None else layer)


def refit(site: Site, factors: Mapping[str, np.ndarray], rank: int, by: float) -> dict[str, np.ndarray]:
    """Give an adapter a rank, with zeros, and another scale: in float64, or with the bits as they are."""
    if by != 1:
        factors = rescaled(site, {name: factor.astype(np.float64) for name, factor in factors.items()}, by)
    return {name: _filled(site, name, factor, rank) for name, factor in factors.items()}


def _filled(site: Site, name: str, factor: np.ndarray, rank: int) -> np.ndarray:
    axes = site.factors[name]
    axes = axes[len(axes) - factor.ndim :]  # of a layer, without the stack
    widths = [(0, rank - n if axis == RANK else 0) for axis, n in zip(axes, factor.shape, strict=True)]
    return np.pad(factor, widths) if any(width for _, width in widths) else factor
