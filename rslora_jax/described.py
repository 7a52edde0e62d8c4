"""What `Lora.describe` says: all that the table of `print(lora)` shows, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rslora_jax.config import LoraConfig
from rslora_jax.sites import Site


def described(
    config: LoraConfig, sites: Mapping[str, Site], left_out: Mapping[str, str], unused: tuple[str, ...], num_base: int
) -> dict[str, Any]:
    """Return a dict of plain values, which `json.dumps` takes where the config has no functions."""
    trained = sum(site.num_parameters for site in sites.values())
    return {
        "config": {name: getattr(config, name) for name in ("rank", "alpha", "scaling", "method")},
        "sites": {path: _of_site(site) for path, site in sites.items()},
        "left_out": dict(left_out),
        "unused": list(unused),
        "parameters": {"trained": trained, "base": num_base, "share": trained / max(num_base, 1)},
    }


def _of_site(site: Site) -> dict[str, Any]:
    layers = [{"rank": layer.rank, "alpha": layer.alpha, "gamma": layer.gamma} for layer in site.layers]
    return {
        "shape": list(site.shape),
        "kind": site.kind,
        **{name: list(getattr(site, f"{name}_axes")) for name in ("in", "out", "stack")},
        **({"rank": site.rank, "alpha": site.alpha, "gamma": site.gamma} if site.scaled else {}),
        **({"layers": layers} if layers else {}),
        "parameters": site.num_parameters,
        "fallbacks": list(site.fallbacks),
    }
