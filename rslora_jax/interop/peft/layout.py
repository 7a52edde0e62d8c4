"""How a weight and its two factors lie in PyTorch, beside how they lie here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np

from rslora_jax.interop.names import Names, Place, places
from rslora_jax.sites import Site
from rslora_jax.wrap import Lora


def site_modules(
    lora: Lora, names: Names
) -> tuple[dict[str, Place], dict[str, tuple[int, ...]], dict[str, dict[int | None, str]]]:
    """Return the model's places, its shapes, and the modules of each adapted weight by their layer.

    Raises:
      ValueError: an adapted weight has no form in PEFT: no name, or stacked axes other than that of the layers.
    """
    shapes = dict(lora.shapes)
    found = places(names, shapes)
    modules: dict[str, dict[int | None, str]] = {path: {} for path in lora.sites}
    for name, place in found.items():
        if place.path in modules:
            if not name.endswith(".weight"):
                raise ValueError(f"{place.path} is {name}, which is no weight of a module: PEFT has no adapter for it")
            modules[place.path][place.layer] = name.removesuffix(".weight")
    for path, site in lora.sites.items():
        stack = () if None in modules[path] else (0,)
        if site.stack_axes != stack:
            raise ValueError(
                f"{path} of shape {site.shape} has the stacked axes {site.stack_axes}, where the table of names has "
                f"{stack}: PEFT has adapters for one matrix each"
            )
        last = len(site.shape) - 1
        if site.kind == "convolution" and (site.out_axes != (last,) or site.in_axes != tuple(range(last))):
            raise ValueError(f"{path} of shape {site.shape} is no kernel with axes (*window, in, out): exclude it")
    return found, shapes, modules


def factor_names(module: str, site: Site) -> tuple[str, str]:
    """Return the names of A and B after PEFT's prefix."""
    if site.kind == "embedding":
        return f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def factor_shapes(site: Site, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of A and B in PEFT: (r, in), (out, r); of a convolution (r, in, *window), (out, r, 1...)."""
    if site.kind == "convolution":
        *window, width = site.sizes(site.in_axes)
        return (rank, width, *window), (site.out_size, rank, *(1 for _ in window))
    return (rank, site.in_size), (site.out_size, rank)


def to_peft(site: Site, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give one layer's factors, (*in, r) and (r, *out), PEFT's shapes."""
    shape_a, shape_b = factor_shapes(site, a.shape[-1])
    a = np.moveaxis(a, (-1, -2), (0, 1)) if site.kind == "convolution" else a.reshape(-1, a.shape[-1]).T
    return a.reshape(shape_a), b.reshape(b.shape[0], -1).T.reshape(shape_b)


def from_peft(site: Site, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give factors of PEFT's shapes ours, of one layer: (*in, r) and (r, *out)."""
    rank = a.shape[0]
    a = np.moveaxis(a, (0, 1), (-1, -2)) if site.kind == "convolution" else a.T
    b = b.reshape(-1, rank).T
    return a.reshape(*site.sizes(site.in_axes), rank), b.reshape(rank, *site.sizes(site.out_axes))


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


def is_table(path: str) -> bool:
    """Say whether a weight is a token table, by its path."""
    return path.rsplit("/", 1)[-1] == "embedding"


def by_path(found: Mapping[str, Place]) -> dict[str, dict[int | None, str]]:
    """Return the Hugging Face names of each path by layer."""
    names: dict[str, dict[int | None, str]] = {}
    for name, place in found.items():
        names.setdefault(place.path, {})[place.layer] = name
    return names


def sorted_layers(modules: Mapping[int | None, str]) -> list[int | None]:
    """Return the layers in their order."""
    return sorted(modules, key=lambda n: -1 if n is None else n)


def scaled(b: np.ndarray, factor: float) -> np.ndarray:
    """Multiply in float64, or leave the bits alone."""
    return b if factor == 1 else b.astype(np.float64) * factor


def fill_up(factor: np.ndarray, axis: int, rank: int) -> np.ndarray:
    """Fill the rank's axis up with zeros."""
    widths = [(0, 0)] * factor.ndim
    widths[axis] = (0, rank - factor.shape[axis])
    return np.pad(factor, widths) if widths[axis][1] else factor
