"""Adapters over the layers of a model: a picture, and a table as CSV."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rslora_jax.analysis.spectrum import SHARE, Matrix


def write_csv(matrices: Sequence[Matrix], path: Path) -> None:
    """Write a line for each adapted matrix; what is unknown stays empty."""
    fields = [field.name for field in dataclasses.fields(Matrix)]
    columns = [
        *fields[:-2],
        "relative_frobenius",
        "relative_spectral",
        "effective_rank",
        "singular_values_above_1_percent",
    ]

    def text(matrix: Matrix, name: str) -> str:
        value = getattr(matrix, "above" if name.startswith("singular") else name)
        if isinstance(value, tuple):
            return " ".join(map(str, value))
        return "" if value is None else f"{value:.9g}" if isinstance(value, float) else str(value)

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([text(matrix, name) for name in columns] for matrix in matrices)


def draw(matrices: Sequence[Matrix], path: Path, title: str) -> None:
    """Draw two heat maps, modules by layers, as PNG: the size of the update, and its effective rank.

    Matrices of one module and layer are averaged; a module without layers fills its row.
    """
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    relative = matrices[0].weight_frobenius is not None
    size = "‖γAB‖ / ‖W‖, Frobenius" if relative else "‖γAB‖, Frobenius (no base given)"
    panels: list[tuple[str, Callable[[Matrix], float | None]]] = [
        (size, lambda m: m.relative_frobenius if relative else m.update_frobenius),
        ("effective rank of AB", lambda m: m.effective_rank),
    ]
    modules, layers = modules_of(matrices), layers_of(matrices)
    wide = min(max(0.24 * len(layers), 3.2), 13.0)  # inches
    tall = min(max(0.34 * len(modules), 1.1), 12.0)
    labels = 0.085 * max(map(len, modules))
    # Many layers are wide: one panel above the other.
    stacked = wide > 5.5
    rows, columns = (2, 1) if stacked else (1, 2)
    figure = Figure(figsize=(columns * (wide + 0.9) + labels + 0.6, rows * (tall + 0.9) + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axis, (label, value) in zip(axes, panels, strict=True):
        image = _panel(axis, label, grid_of(matrices, value, modules, layers))
        _ticks(axis, modules, layers, most=wide / 0.24)
        _color_bar(figure, axis, image)
        if axis is axes[-1] or not stacked:
            axis.set_xlabel("layer", fontsize=9)
    figure.suptitle(title, fontsize=11, parse_math=False)
    figure.savefig(path, dpi=150)


def _panel(axis: Any, label: str, grid: np.ndarray) -> Any:
    """Draw one heat map; return the image."""
    from matplotlib.colors import LogNorm

    # Zeros and what is no number stay grey: they would be one end of the scale.
    known = grid[np.isfinite(grid)]
    # One weight that moves far more than others would leave these without a difference.
    wide_range = known.size > 0 and known.max() > 3 * known.min() > 0
    image = axis.imshow(
        np.ma.masked_invalid(grid),
        aspect="auto",
        interpolation="nearest",
        cmap="viridis",
        norm=LogNorm(known.min(), known.max()) if wide_range else None,
    )
    axis.set_facecolor("0.85")
    axis.set_title(label, fontsize=10, loc="left")
    return image


def _ticks(axis: Any, modules: Sequence[str], layers: Sequence[int], most: float) -> None:
    """Write modules and layers beside a heat map, of the layers about `most`, and lines between them."""
    every = max(1, math.ceil(len(layers) / most))
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if step >= every)
    shown = [n for n, layer in enumerate(layers) if layer % every == 0]
    axis.set_yticks(range(len(modules)), modules, fontsize=9)
    axis.set_xticks(shown, [str(layers[n]) for n in shown], fontsize=8)
    axis.set_xticks(np.arange(len(layers) + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(len(modules) + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=0.6)
    axis.tick_params(which="both", length=0)
    axis.spines[:].set_visible(False)


def _color_bar(figure: Any, axis: Any, image: Any) -> None:
    """Draw the scale of a heat map beside it; a logarithmic one with five numbers from end to end."""
    from matplotlib.colors import LogNorm

    bar = figure.colorbar(image, ax=axis, pad=0.015, fraction=0.05)
    bar.outline.set_visible(False)
    if isinstance(image.norm, LogNorm):
        low, high = image.get_clim()
        ticks = np.geomspace(low, high, 5).tolist()
        bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
        bar.minorticks_off()
    bar.ax.tick_params(labelsize=8)


def modules_of(matrices: Sequence[Matrix]) -> list[str]:
    """Return the modules in the order in which they come."""
    return list(dict.fromkeys(matrix.module for matrix in matrices))


def layers_of(matrices: Sequence[Matrix]) -> list[int]:
    """Return the layers; one where no matrix has a number."""
    return sorted({matrix.layer for matrix in matrices if matrix.layer is not None}) or [0]


def grid_of(
    matrices: Sequence[Matrix],
    value: Callable[[Matrix], float | None],
    modules: Sequence[str],
    layers: Sequence[int],
) -> np.ndarray:
    """Return means as an array of modules by layers, NaN where there is no matrix or no update."""
    cells: dict[tuple[int, int], list[float]] = {}
    for matrix in matrices:
        found = value(matrix) if matrix.update_frobenius else None
        for column in range(len(layers)) if matrix.layer is None else (layers.index(matrix.layer),):
            cells.setdefault((modules.index(matrix.module), column), []).append(math.nan if found is None else found)
    grid = np.full((len(modules), len(layers)), np.nan)
    for cell, values in cells.items():
        grid[cell] = np.mean(values)
    return grid


def summarise(matrices: Sequence[Matrix], every: bool = False) -> tuple[list[str], list[list[str]]]:
    """Return the head and the lines of a table: one for each module, or one for each matrix.

    A line of several matrices has their mean, and the least and the largest of them.
    """
    relative = matrices[0].weight_frobenius is not None
    name = "‖γAB‖/‖W‖" if relative else "‖γAB‖"
    head = ["weight" if every else "module", "matrices", "in x out", "rank", "gamma", f"{name} Frobenius"]
    head += [f"{name} spectral", "effective rank", f"σ > {SHARE:.0%}"]
    groups: dict[tuple, list[Matrix]] = {}
    for n, matrix in enumerate(matrices):
        key = (n,) if every else (matrix.module, matrix.in_size, matrix.out_size, matrix.rank, matrix.gamma)
        groups.setdefault(key, []).append(matrix)

    def line(group: list[Matrix]) -> list[str]:
        first = group[0]
        label = first.path + "".join(f"[{n}]" for n in first.index) if every else first.module
        size = "relative" if relative else "update"
        return [
            label,
            str(len(group)),
            f"{first.in_size} x {first.out_size}",
            str(first.rank),
            f"{first.gamma:.4g}",
            _spread([getattr(m, f"{size}_frobenius") for m in group], ".2e" if relative else ".3g"),
            _spread([getattr(m, f"{size}_spectral") for m in group], ".2e" if relative else ".3g"),
            _spread([m.effective_rank for m in group], ".1f"),
            _spread([float(m.above) for m in group], ".3g"),
        ]

    lines = [line(group) for group in groups.values()]
    if every:
        head, lines = [c for n, c in enumerate(head) if n != 1], [[c for n, c in enumerate(l) if n != 1] for l in lines]
    return head, lines


def _spread(values: Sequence[float], form: str) -> str:
    """Write the mean, and the least and the largest where they differ.

    >>> _spread([1.0, 2.0], ".1f"), _spread([1.0], ".1f")
    ('1.5 (1.0 to 2.0)', '1.0')
    """
    mean, low, high = (format(of(values), form) for of in (lambda v: sum(v) / len(v), min, max))
    return mean if low == high else f"{mean} ({low} to {high})"
