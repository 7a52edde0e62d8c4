"""The one `Lora` that several have between them: their sites together, with a scale of 1."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rslora_jax.config import LoraConfig
from rslora_jax.layers import weight_of_layers
from rslora_jax.methods.rows import Rows
from rslora_jax.sites import Site
from rslora_jax.wrap import Lora

# What two sites of one weight are to have in common, and what it is called.
_COMMON = {
    "shape": "the shape",
    "method": "the method",
    "in_axes": "the in-axes",
    "out_axes": "the out-axes",
    "stack_axes": "the stacked axes",
    "layer_axis": "the axis of layers",
    "groups": "the number of groups",
}


def joined(loras: Sequence[Lora], ranks: Mapping[str, int] | None = None) -> Lora:
    """Return a `Lora` with the sites of all, of gamma 1: their scales are to be in the adapters.

    Its config says the same in words, so that `wrap` with it gives the same sites. All layers of a stacked weight are
    alike, whatever they have in each. Nothing is traced.

    Args:
      loras: of one base.
      ranks: the rank of each site, by path; by default the largest that one of them has.

    Raises:
      ValueError: they are of different bases, or a site of two cannot be one; it names the first.
    """
    first, *others = loras
    for other in others:
        _check_same_base(first.shapes, other.shapes)
    sites: dict[str, Site] = {}
    for lora in loras:
        for path, site in lora.sites.items():
            _check_joins(first, lora, sites, site)
            rank = ranks[path] if ranks else max(site.rank, sites[path].rank if path in sites else 0)
            sites[path] = dataclasses.replace(site, rank=rank, alpha=1.0, gamma=1.0, layers=())
    adapted = {name for site in sites.values() for name in (site.path, site.weight)}
    left_out = {path: why for path, why in first.left_out.items() if weight_of_layers(path) not in adapted}
    return first.having(config=_config(loras, sites), sites=sites, left_out=left_out)


def _check_same_base(shapes: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the first parameter that two bases do not share."""
    for path in {**shapes, **others}:
        one, other = shapes.get(path, "missing"), others.get(path, "missing")
        if one != other:
            raise ValueError(
                f"the adapters are of different bases: parameter {path} is {one} in the first and {other} in another; "
                "take adapters of one base"
            )


def _check_joins(first: Lora, lora: Lora, sites: Mapping[str, Site], site: Site) -> None:
    """Raise a ValueError that says why a site cannot be joined with those that there are."""
    if site.path not in sites:
        for other in (known for known in sites.values() if known.weight == site.weight):
            if not (site.use and other.use):
                whole, part = (other, site) if site.use else (site, other)
                raise ValueError(
                    f"{whole.path} cannot be joined: one adapter is that of all its uses, and another, {part.path}, of "
                    "one; train both with the same targets"
                )
        if lora.config.method != first.config.method:
            raise ValueError(
                f"{site.path} cannot be joined: its method is {lora.config.method!r}, and the first adapter's "
                f"{first.config.method!r}; join adapters of one method"
            )
        return
    other = sites[site.path]
    for field, what in _COMMON.items():
        one, two = getattr(other, field), getattr(site, field)
        if one != two:
            raise ValueError(
                f"{site.path} cannot be joined: {what} of one adapter is {one}, and of another {two}; join adapters "
                "that are trained alike there"
            )


def _config(loras: Sequence[Lora], sites: Mapping[str, Site]) -> LoraConfig:
    """Return the config with which `wrap` finds these sites."""
    configs = [lora.config for lora in loras]
    axes: Any = [pair for c in configs for pair in c.axes]
    scaled = {path: site for path, site in sites.items() if site.scaled}
    each = [site.rank for site in scaled.values()]
    rank = max(each, key=each.count, default=1)
    named = [(c.targets, c.exclude, c.trained, c.trained_rows) for c in configs]
    alike = all(one == named[0] for one in named)
    alike = alike and not any(site.layers for lora in loras for site in lora.sites.values())
    values = [path for path, site in sites.items() if site.kind == "trained"]
    rows = {path: site.method.ids for path, site in sites.items() if isinstance(site.method, Rows)}
    own: dict[str, Any] = {
        "targets": tuple(map(_exactly, scaled)),
        "exclude": (),
        "trained": tuple(map(_exactly, values)),
    }
    own |= {"trained_rows": {_exactly(path): ids for path, ids in rows.items()}}
    return dataclasses.replace(
        configs[0],
        **({} if alike else own),
        rank=rank,
        alpha=1.0,
        scaling="constant",
        rank_pattern={_exactly(path): site.rank for path, site in scaled.items() if site.rank != rank},
        alpha_pattern=(),
        axes=tuple(dict.fromkeys(axes)),
        dtype=str(functools.reduce(np.promote_types, [np.dtype(c.dtype) for c in configs])),
        allow_large_rank=any(site.rank > min(site.in_size, site.out_size) for site in scaled.values()),
        dropout=0.0,
    )


def _exactly(path: str) -> str:
    """Return a glob for one path: what means something in a glob stands for any character."""
    return re.sub(r"[][*?{}]", "?", path)
