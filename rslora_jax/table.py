"""The table of adapted weights that `print(lora)` shows."""

import math
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rslora_jax.layers import Layer
from rslora_jax.sites import Site

_HEADER = ("weight", "in x out", "stack", "rank", "gamma", "parameters")


def shared_name(paths: Sequence[str]) -> str:
    """Write paths that differ only in their numbers as one.

    >>> shared_name(["layers_0/dense_1/w", "layers_1/dense_1/w"])
    'layers_{0..1}/dense_1/w'
    """
    parts = [re.split(r"(\d+)", path) for path in paths]

    def one(column: tuple[str, ...]) -> str:
        if len(set(column)) == 1:
            return column[0]
        numbers = sorted(set(map(int, column)))
        whole = len(numbers) == numbers[-1] - numbers[0] + 1
        return f"{{{numbers[0]}..{numbers[-1]}}}" if whole else f"{{{len(numbers)} of {numbers[0]}..{numbers[-1]}}}"

    return "".join(one(column) for column in zip(*parts, strict=True))


def table(sites: Mapping[str, Site], num_base: int) -> str:
    """Return one line for each kind of adapted weight, and the totals.

    Weights that differ only in numbers in their paths (the layers of a model) share a line.
    """
    rows: dict[tuple, list[Site]] = {}
    for site in sites.values():
        name = re.sub(r"\d+", "*", site.path)
        rows.setdefault((name, site.shape, site.rank, site.gamma, site.layers, site.fallbacks), []).append(site)
    lines: list[tuple[str, ...]] = [_HEADER]
    lines += [_line(group) for group in rows.values()]
    widths = [max(len(line[n]) for line in lines) for n in range(len(_HEADER))]
    text = "\n".join(
        "  ".join(c.rjust(w) if n else c.ljust(w) for n, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )
    total = sum(site.num_parameters for site in sites.values())
    scaled = [site for site in sites.values() if site.scaled]
    weights = sum(math.prod(s.sizes(s.stack_axes)) * len(_adapted(s)) // max(len(s.layers), 1) for s in scaled)
    whole = sum(site.kind == "trained" for site in sites.values())
    of_tables = sum(site.rank for site in sites.values() if not site.scaled)
    counted = [f"{weights} matrices"] * (weights > 0 or not whole + of_tables)
    counted += [f"{whole} trained whole"] * (whole > 0) + [f"{of_tables} row{'s' * (of_tables > 1)}"] * (of_tables > 0)
    share = 100 * total / max(num_base, 1)
    return (
        f"{text}\n{total:,} parameters to train on {_listed(counted)}; the base keeps its {num_base:,} ({share:.2f}%)"
    )


def _listed(parts: Sequence[str]) -> str:
    """Write a list in words.

    >>> _listed(["3 matrices"]), _listed(["3 matrices", "2 trained whole", "4 rows"])
    ('3 matrices', '3 matrices, 2 trained whole and 4 rows')
    """
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def _line(group: Sequence[Site]) -> tuple[str, ...]:
    """Return the cells of weights that differ in their paths alone."""
    site = group[0]
    size, rank = f"{site.in_size} x {site.out_size}", _ranks(site)
    gamma = _span([f"{layer.gamma:.4g}" for layer in _adapted(site)], key=float)
    if not site.scaled:
        rank, gamma = f"{site.rank} row{'s' * (site.rank > 1)}" if site.rank else "whole", "-"
        size = size if site.rank else " x ".join(map(str, site.sizes(site.out_axes))) or "1"
    return (
        shared_name([s.path for s in group]),
        size,
        " x ".join(map(str, site.sizes(site.stack_axes))) or "-",
        rank,
        gamma,
        f"{sum(s.num_parameters for s in group):,}" + (" materialised" if site.fallbacks else ""),
    )


def _adapted(site: Site) -> list[Layer]:
    """Return what the layers of a weight have that have an adapter; where all are alike, what they have."""
    return [layer for layer in site.layers if layer.rank] or [Layer(site.rank, site.alpha, site.gamma)]


def _ranks(site: Site) -> str:
    """Write the rank of an adapter, or the ranks of its layers, and how many these are if not all."""
    adapted = _adapted(site)
    text = _span([str(layer.rank) for layer in adapted], key=int)
    if not site.layers:
        return text + (" = full" if site.rank == min(site.in_size, site.out_size) else "")
    return text + (f" ({len(adapted)} of {len(site.layers)})" if len(adapted) < len(site.layers) else "")


def _span(texts: Sequence[str], key: Any) -> str:
    """Write the least and the largest of some numbers.

    >>> _span(["8", "16", "8"], int)
    '8..16'
    """
    ends = sorted(set(texts), key=key)
    return ends[0] if len(ends) == 1 else f"{ends[0]}..{ends[-1]}"


_NOUNS = {
    "embedding: by name only": ("table by name only", "tables by name only"),
    "output head: by name only": ("head by name only", "heads by name only"),
    "convolution: by name only": ("convolution by name only", "convolutions by name only"),
    "norm or bias": ("norm or bias", "norms and biases"),
    "no matrix: stands": ("that stands where data do", "that stand where data do"),
    "no matrix: meets data": ("that meets data entry by entry", "that meet data entry by entry"),
}


def not_adapted(left_out: Mapping[str, str], unused: Sequence[str] = (), width: int | None = None) -> str:
    """Return what is not adapted in one line, and below it the paths by reason.

    Args:
      left_out: the reason by path.
      unused: the paths of the parameters that no output depends on.
      width: of a line; by default the terminal's.

    >>> vector = "norm or bias: fewer than two axes"
    >>> reasons = {"embed/table": "embedding: by name only", "norm_0/scale": vector, "norm_1/scale": vector}
    >>> print(not_adapted(reasons, width=80))
    not adapted: 1 table by name only, 2 norms and biases
      table by name only: embed/table
      norms and biases: norm_{0..1}/scale
    """
    groups: dict[str, list[str]] = {}
    for path, why in left_out.items():
        groups.setdefault(next((kind for kind in _NOUNS if why.startswith(kind)), why), []).append(path)
    if unused:
        groups["unused"] = list(unused)
    if not groups:
        return ""

    def noun(kind: str, paths: Sequence[str]) -> str:
        return _NOUNS[kind][len(paths) > 1] if kind in _NOUNS else kind

    counts = ", ".join(f"{len(paths)} {noun(kind, paths)}" for kind, paths in groups.items())
    width = width or shutil.get_terminal_size((120, 24)).columns
    lines = textwrap.wrap(f"not adapted: {counts}", width, subsequent_indent="  ", break_on_hyphens=False)
    for kind, paths in groups.items():
        named: dict[str, list[str]] = {}
        for path in paths:
            named.setdefault(re.sub(r"\d+", "*", path), []).append(path)
        text = f"{noun(kind, paths)}: " + ", ".join(shared_name(alike) for alike in named.values())
        wrap = {
            "initial_indent": "  ",
            "subsequent_indent": "    ",
            "break_on_hyphens": False,
            "break_long_words": False,
        }
        lines += textwrap.wrap(text, width, **wrap)  # type: ignore[arg-type]
    return "\n".join(lines)
