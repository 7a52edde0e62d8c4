"""The table of adapted weights that `print(lora)` shows."""

import math
import re
from collections.abc import Mapping, Sequence

from rslora_jax.sites import Site

HEADER = ("weight", "in x out", "stack", "rank", "gamma", "parameters")


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
        rows.setdefault((name, site.shape, site.rank, site.gamma, site.fallbacks), []).append(site)
    lines = [HEADER]
    for group in rows.values():
        site = group[0]
        lines.append(
            (
                shared_name([s.path for s in group]),
                f"{site.in_size} x {site.out_size}",
                " x ".join(map(str, site.sizes(site.stack_axes))) or "-",
                str(site.rank),
                f"{site.gamma:.4g}",
                f"{sum(s.num_parameters for s in group):,}" + (" materialised" if site.fallbacks else ""),
            )
        )
    widths = [max(len(line[n]) for line in lines) for n in range(len(HEADER))]
    text = "\n".join(
        "  ".join(c.rjust(w) if n else c.ljust(w) for n, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )
    total = sum(site.num_parameters for site in sites.values())
    weights = sum(math.prod(s.sizes(s.stack_axes)) for s in sites.values())
    share = 100 * total / max(num_base, 1)
    return (
        f"{text}\n{total:,} parameters to train on {weights} matrices; the base keeps its {num_base:,} ({share:.2f}%)"
    )
