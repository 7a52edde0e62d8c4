"""Sites: the weights that get adapters, found by how the program uses them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from rslora_jax import scaling
from rslora_jax.config import LoraConfig, first_match, matches, near_misses


@dataclasses.dataclass(frozen=True)
class Site:
    """One adapted weight.

    Attributes:
      path: its pytree path, joined with "/".
      shape: its shape.
      in_axes, out_axes, stack_axes: its axes that are summed over (or indexed), free, and stacked.
      kind: "linear", "expert" (a stack used in one batched product), "convolution" or "embedding".
      rank, alpha, gamma: this adapter's own; gamma is the whole factor on A B.
      fallbacks: the uses that have no low-rank form, by primitive; there the weight is materialised.
    """

    path: str
    shape: tuple[int, ...]
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    stack_axes: tuple[int, ...]
    kind: str
    rank: int
    alpha: float
    gamma: float
    fallbacks: tuple[str, ...] = ()

    def sizes(self, axes: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.shape[n] for n in axes)

    @property
    def a_shape(self) -> tuple[int, ...]:
        """(*stack, *in, rank)"""
        return (*self.sizes(self.stack_axes), *self.sizes(self.in_axes), self.rank)

    @property
    def b_shape(self) -> tuple[int, ...]:
        """(*stack, rank, *out)"""
        return (*self.sizes(self.stack_axes), self.rank, *self.sizes(self.out_axes))

    @property
    def in_size(self) -> int:
        return math.prod(self.sizes(self.in_axes))

    @property
    def out_size(self) -> int:
        return math.prod(self.sizes(self.out_axes))

    @property
    def num_parameters(self) -> int:
        return math.prod(self.a_shape) + math.prod(self.b_shape)


def path_name(path: Sequence[Any]) -> str:
    """Join a pytree path with "/".

    >>> [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path({"layers": [{"kernel": 0}]})]
    ['layers/0/kernel']
    """
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves of a pytree by path, in its order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def select(
    config: LoraConfig,
    shapes: Mapping[str, tuple[int, ...]],
    roles: Mapping[str, Mapping[str, Any]],
    heads: set[str],
) -> tuple[dict[str, Site], list[str]]:
    """Return the sites a config asks for, and warnings for what it asks at a cost.

    Raises:
      ValueError: where a pattern matches nothing, a target is no weight of a matrix product, a rank is
        above the weight's own, or nothing is left to adapt.
    """
    targets = (config.targets,) if isinstance(config.targets, str) else config.targets
    exclude = (config.exclude,) if isinstance(config.exclude, str) else config.exclude
    chosen: set[str] = set()
    if not roles:
        raise ValueError("no weight is left to adapt: the function uses none of its parameters in a matrix product")
    for pattern in targets:
        if pattern == "all-linear":
            tables = {shapes[p][r["in_axes"][0]] for p, r in roles.items() if r["kind"] == "embedding"}
            head = {p for p in heads if math.prod(shapes[p][n] for n in roles[p]["out_axes"]) in tables}
            chosen |= {p for p, r in roles.items() if r["kind"] in ("linear", "expert")} - head
            continue
        hit = {p for p in roles if matches(p, pattern)}
        if not hit:
            other = [p for p in shapes if matches(p, pattern)]
            if other:
                raise ValueError(
                    f"target {pattern!r} matches {other[0]} of shape {shapes[other[0]]}, which no matrix product or "
                    "look-up uses as a weight, so it cannot be factored: did you mean "
                    f"{near_misses(pattern, list(roles))}?"
                )
            raise ValueError(f"target {pattern!r} matches no weight: did you mean {near_misses(pattern, list(roles))}?")
        chosen |= hit
    for pattern in exclude:
        if not any(matches(p, pattern) for p in shapes):
            raise ValueError(
                f"exclude {pattern!r} matches no weight: did you mean {near_misses(pattern, list(roles))}?"
            )
        chosen = {p for p in chosen if not matches(p, pattern)}
    if not chosen:
        raise ValueError(
            f"no weight is left to adapt: all are excluded; the weights used are {', '.join(list(roles)[:3])}"
        )
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern, _ in getattr(config, name):
            if not any(matches(p, pattern) for p in chosen):
                raise ValueError(
                    f"{name} {pattern!r} matches no adapted weight: did you mean "
                    f"{near_misses(pattern, sorted(chosen))}?"
                )

    sites, warnings = {}, []
    for path in (p for p in roles if p in chosen):
        rank = first_match(path, config.rank_pattern, config.rank)  # type: ignore[arg-type]
        alpha = first_match(path, config.alpha_pattern, config.alpha)  # type: ignore[arg-type]
        gamma = scaling.gamma(rank, alpha, config.scaling)
        site = Site(path, shapes[path], rank=rank, alpha=alpha, gamma=gamma, **roles[path])
        full = min(site.in_size, site.out_size)
        if rank > full:
            text = f"rank {rank} is above {full}, the full rank of {path} ({site.in_size} x {site.out_size})"
            if not config.allow_large_rank:
                raise ValueError(
                    f"{text}: lower it, give this weight its own in rank_pattern, or set allow_large_rank=True"
                )
            warnings.append(text)
        sites[path] = site
    return sites, warnings
