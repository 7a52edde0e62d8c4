"""The table of adapted weights that `print(lora)` shows."""

import math
import re
from collections.abc import Mapping

from rslora_jax.sites import Site

HEADER = ("weight", "in x out", "stack", "rank", "gamma", "parameters")


def table(sites: Mapping[str, Site], num_base: int) -> str:
    """Return one line for each kind of adapted weight, and the totals.

    Weights that differ only in numbers in their paths (the layers of a model) share a line.
    """
    rows: dict[tuple, list[Site]] = {}
    for site in sites.values():
        name = re.sub(r"\d+", "*", site.path)
        rows.setdefault((name, site.shape, site.rank, site.gamma, site.fallbacks), []).append(site)
    lines = [HEADER]
    for (name, *_), group in rows.items():
        site = group[0]
        lines.append(
            (
                (name if len(group) > 1 else site.path) + ("" if len(group) == 1 else f"  ({len(group)} weights)"),
                f"{site.in_size} x {site.out_size}",
                " x ".join(map(str, site.sizes(site.stack_axes))) or "-",
                str(site.rank),
                f"{site.gamma:.4g}",
                f"{sum(s.num_parameters for s in group):,}" + (" materialised" if site.fallbacks else ""),
            )
        )
    widths = [max(len(line[n]) for line in lines) for n in range(len(HEADER))]
    left = lambda n: n == 0
    text = "\n".join(
        "  ".join(c.ljust(w) if left(n) else c.rjust(w) for n, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )
    total = sum(site.num_parameters for site in sites.values())
    weights = sum(math.prod(s.sizes(s.stack_axes)) for s in sites.values())
    share = 100 * total / max(num_base, 1)
    return f"{text}\n{total:,} parameters to train on {weights} matrices; the base keeps its {num_base:,} ({share:.2f}%)"
