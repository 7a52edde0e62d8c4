"""Which weights get adapters, and why the others do not: every parameter is accounted for."""

import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from jax.extend.core import primitives

from rslora_jax import scaling
from rslora_jax.config import LoraConfig, matches, near_misses, split_use
from rslora_jax.layers import Layer, layers_named, layers_of_weights, value_of_layer, weight_of_layers, with_layers
from rslora_jax.methods.method import method_of
from rslora_jax.sites import Site
from rslora_jax.table import not_adapted, shared_name
from rslora_jax.targets import NO_TARGET, as_tuple, axes_line, layer_count, roles_by_use, targeted
from rslora_jax.trained import row_sites, trained_sites
from rslora_jax.transform import compat
from rslora_jax.transform.discover import Found, roles
from rslora_jax.transform.uses import LOOKUP, PRODUCT, USES

_SIDES = ("in", "out", "stack")
_PRODUCTS = (primitives.dot_general_p, primitives.conv_general_dilated_p, compat.ragged_dot_general_p)
_VECTOR = "norm or bias: used as a vector"
_BY_NAME = {"embedding": "embedding: by name only", "convolution": "convolution: by name only"}


@dataclasses.dataclass(frozen=True)
class Selection:
    """Where every parameter went.

    Attributes:
      sites: the adapted ones.
      left_out: the reason for each that the outputs depend on and that is not adapted, and, by their pattern
        (`path/{0,3}`), for the layers that are not of one that is.
      unused: those that no output depends on.
      notes: what the user is to be warned of.
      kinds: what each weight is, adapted or not, as `Site.kind` says.
      tied: the paths of the weights that are both looked up and multiplied.
    """

    sites: dict[str, Site]
    left_out: dict[str, str]
    unused: tuple[str, ...]
    notes: list[str]
    kinds: dict[str, str]
    tied: tuple[str, ...]


def select(
    config: LoraConfig, leaves: Mapping[str, Any], found: Found, others: Mapping[str, str] = MappingProxyType({})
) -> Selection:
    """Return what a config asks for of a program's parameters.

    Args:
      config: what to adapt.
      leaves: the parameters, or their shapes, by path.
      found: what the program does with them.
      others: those that are no parameters (`no_parameters`), by path, with their kind.

    Raises:
      ValueError: where a pattern matches nothing, a target is no weight of a matrix product, what is to be trained
        whole cannot be, a rank that a pattern gives is above the weight's own, or nothing is left to adapt.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    stored = {p for p, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.floating) and p not in others}
    everything = roles(shapes, found)
    weights = {path: role for path, role in everything.items() if path in stored} | _stated(
        config, shapes, stored, everything
    )
    weights = {path: {**role, "layer_axis": _layer_axis(path, role, found)} for path, role in weights.items()}
    tables = {math.prod(shapes[p][n] for n in r["in_axes"]) for p, r in weights.items() if r["kind"] == "embedding"}
    heads = {p for p in found.heads & weights.keys() if _out_size(shapes, weights, p) in tables}
    reasons = {p: _reason(p, leaves, everything, weights, heads, found) for p in leaves if p in found.used}
    reasons |= {p: f"no parameter: {kind}" for p, kind in others.items() if p in reasons}

    by_use = roles_by_use(shapes, found, weights)
    whole = trained_sites(config, leaves, found, everything, others)
    chosen, excluded = targeted(config, shapes, weights, by_use, heads, reasons)
    whole |= row_sites(config, shapes, weights, [*whole, *chosen])
    chosen = {one: layers for one, layers in chosen.items() if split_use(one)[0] not in whole and one not in whole}
    left = _left_out(leaves, {*chosen, *whole}, reasons | excluded)
    left |= {one: why for one, why in excluded.items() if one not in leaves and weight_of_layers(one) in chosen}
    if not chosen and not whole:
        nothing = "no weight is left to adapt" + ("" if reasons else ": no output depends on a parameter")
        remedies = _warnings_of(config, left, shapes, stored, everything, found)
        raise ValueError("\n".join([f"{nothing}; {not_adapted(left)}" if left else nothing, *remedies]))
    _check_patterns(config, {p: layer_count(shapes, weights, p) for p in chosen})
    given = {name: role for p in weights for name, role in [(p, weights[p]), *by_use.get(p, {}).items()]}
    adapted = {p: (shapes[split_use(p)[0] if p not in shapes else p], given[p]) for p in given if p in chosen}
    sites, notes = _ranked(config, adapted, chosen)
    sites |= whole
    sites = {p: dataclasses.replace(s, uses=_uses(found, s), groups=_groups(found, s)) for p, s in sites.items()}
    notes += _warnings_of(config, left, shapes, stored, everything, found)
    notes += _guesses(config, sites, found) + _large_tables(weights.keys() - whole.keys(), weights, shapes)
    unused = tuple(p for p in leaves if p not in found.used)
    kinds = {path: role["kind"] for path, role in weights.items()}
    return Selection(sites, left, unused, notes, kinds, tuple(by_use))


def _layer_axis(path: str, role: Mapping[str, Any], found: Found) -> int | None:
    """Return which of a weight's stacked axes is that of layers: the one that a scan takes apart, or else the first."""
    stack = role["stack_axes"]
    return next((n for n in stack if (path, n) in found.apart), stack[0] if stack else None)


def _check_patterns(config: LoraConfig, counts: Mapping[str, int | None]) -> None:
    """Refuse a pattern of ranks or alphas that names none of the adapters, given how many layers each has."""
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern, _ in getattr(config, name):
            whole = any(layers_named(path, pattern) is True for path in counts)
            some = layers_of_weights(pattern, f"{name} {pattern!r}", counts, alone=not whole)
            if not whole and not some:
                raise ValueError(
                    f"{name} {pattern!r} matches no adapted weight: did you mean "
                    f"{near_misses(pattern, sorted(counts))}?"
                )


def _groups(found: Found, site: Site) -> int:
    """Return into how many groups a convolution parts its channels."""
    if site.kind != "convolution":
        return 1
    counts = (use.eqn.params.get("feature_group_count", 1) for use in found.uses if use.site == site.weight)
    return max(counts, default=1)


def _uses(found: Found, site: Site) -> tuple[str, ...]:
    """Return what is done with a weight, in the program's order; to pick from a stack of matrices is no look-up."""
    kinds = {id(use.eqn): use.kind for use in found.uses if use.site == site.weight}
    return tuple(LOOKUP if kind == LOOKUP else PRODUCT for kind in kinds.values())


def _left_out(leaves: Iterable[str], chosen: set[str], reasons: Mapping[str, str]) -> dict[str, str]:
    """Return the reasons of what is not adapted, in the order of the parameters."""
    left: dict[str, str] = {}
    for path in leaves:
        own = {f"{path}@{use}" for use in USES}
        if not own & chosen:
            left |= {path: reasons[path]} if path in reasons and path not in chosen else {}
            continue
        left |= {one: reasons.get(one, "one use of a tied weight: by name only") for one in sorted(own - chosen)}
    return left


def _out_size(shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, Any], path: str) -> int:
    return math.prod(shapes[path][n] for n in weights[path]["out_axes"])


def _stated(
    config: LoraConfig, shapes: Mapping[str, tuple[int, ...]], stored: set[str], found: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return the roles of the weights whose axes the config states."""
    given: dict[str, dict[str, Any]] = {}
    named: Any = config.axes
    for pattern, names in named:
        hit = [p for p in shapes if matches(p, pattern)]
        if not hit:
            raise ValueError(
                f"axes {pattern!r} matches no parameter: did you mean {near_misses(pattern, list(shapes))}?"
            )
        for path in hit:
            if path not in stored or len(names) != len(shapes[path]):
                raise ValueError(
                    f"axes {pattern!r} states {len(names)} axes, and matches {path} of shape {shapes[path]}"
                    + ("" if path in stored else ", which is not stored in floating numbers")
                    + ": give one of 'stack', 'in', 'out' for each of its axes"
                )
            sides = {f"{side}_axes": tuple(n for n, name in enumerate(names) if name == side) for side in _SIDES}
            given.setdefault(path, {**sides, "kind": found.get(path, {}).get("kind", "linear")})
    return given


def _reason(
    path: str,
    leaves: Mapping[str, Any],
    everything: Mapping[str, Mapping[str, Any]],
    weights: Mapping[str, Mapping[str, Any]],
    heads: set[str],
    found: Found,
) -> str:
    """Say why a parameter that the outputs depend on has no adapter, unless a target names it."""
    leaf = leaves[path]
    if path in weights:
        return "output head: by name only" if path in heads else _BY_NAME.get(weights[path]["kind"], NO_TARGET)
    if path in everything:
        return f"stored in {leaf.dtype}: an adapter is added to floating numbers alone"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"no weight: it holds {leaf.dtype}"
    if leaf.ndim < 2:
        return "norm or bias: fewer than two axes"
    if sum(size != 1 for size in leaf.shape) < 2:
        return _VECTOR
    meetings = found.meetings.get(path, ())
    loud = [m for m in meetings if m.loud]
    if loud:
        return f"meets data in {loud[0].operation}, which has no rule"
    used = any(use.site == path for use in found.uses)
    if used or (meetings and all(m.vector for m in meetings)):
        return _VECTOR
    if meetings and meetings[0].primitive in _PRODUCTS:
        return f"no matrix: stands where data do, in {meetings[0].operation}"
    if meetings:
        return f"no matrix: meets data entry by entry, in {meetings[0].operation}"
    return "no matrix: reaches an output without meeting data"


def _ranked(
    config: LoraConfig,
    weights: Mapping[str, tuple[tuple[int, ...], Mapping[str, Any]]],
    chosen: Mapping[str, frozenset[int] | None],
) -> tuple[dict[str, Site], list[str]]:
    """Return the sites with their ranks, and what is to be said of these."""
    sites: dict[str, Site] = {}
    capped: dict[str, int] = {}
    large: dict[str, str] = {}
    notes = []
    for path, (shape, role) in weights.items():
        site = Site(path, shape, rank=1, alpha=config.alpha, gamma=0.0, method=method_of(config.method), **role)
        full = min(site.in_size, site.out_size)

        def own(layer: int | None, site: Site = site, full: int = full) -> Layer:
            """Return what a layer has, or, without a number, all of them."""
            given = value_of_layer(site.path, layer, config.rank_pattern, None)
            alpha = value_of_layer(site.path, layer, config.alpha_pattern, config.alpha)
            rank: int = config.rank if given is None else given
            where = site.path if layer is None else f"layer {layer} of {site.path}"
            text = f"rank {rank} is above {full}, the full rank of {where} ({site.in_size} x {site.out_size})"
            if rank > full and config.allow_large_rank:
                large.setdefault(site.path, text)
            elif rank > full and given is not None:
                raise ValueError(f"{text}: lower it in rank_pattern, or set allow_large_rank=True")
            elif rank > full:
                capped[site.path] = rank = full
            return Layer(rank, alpha, scaling.gamma(rank, alpha, config.scaling))

        some = chosen[path]
        sites[path] = with_layers(site, lambda n, own=own, some=some: None if some and n not in some else own(n))  # type: ignore[misc]
    if large:
        first, *more = large.values()
        notes.append(first + (f", and so of {len(more)} more" if more else ""))
    for path, full in list(capped.items())[:1]:
        notes.append(
            f"rank {config.rank} is above the full rank of {len(capped)} of {len(sites)} adapted weights, which get "
            f"their full rank, and its gamma: first {path} ({sites[path].in_size} x {sites[path].out_size}), "
            f"rank {full}"
        )
    return sites, notes


def _warnings_of(
    config: LoraConfig,
    left: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    stored: set[str],
    everything: Mapping[str, Mapping[str, Any]],
    found: Found,
) -> list[str]:
    """Return what to say of the weights that "all-linear" would have taken and could not."""
    if "all-linear" not in as_tuple(config.targets):
        return []
    notes = []
    for paths in _grouped(p for p in left if p not in stored and p in everything and "stored in" in left[p]):
        notes.append(
            f"{shared_name(paths)} has no adapter: {left[paths[0]]}; give the function the numbers that it stands for, "
            "as floating parameters"
        )
    lost = (p for p, why in left.items() if p in stored and why.startswith("meets data in"))
    for paths in _grouped(lost):
        notes.append(
            f"{shared_name(paths)} has no adapter: it {left[paths[0]]}; to adapt it exactly wherever it is used, by "
            f"forming the sum, state its axes: {axes_line(paths, shapes[paths[0]])}"
        )
    return notes


def _grouped(paths: Iterable[str]) -> list[list[str]]:
    """Put together the paths that differ in their numbers only."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(re.sub(r"\d+", "*", path), []).append(path)
    return list(groups.values())


def _guesses(config: LoraConfig, sites: Mapping[str, Site], found: Found) -> list[str]:
    """Return what to say of the axes that only convention tells."""
    named: Any = config.axes
    of_use = [p for p, site in sites.items() if not site.use and site.kind != "trained"]
    told = [p for p in of_use if not any(matches(p, pattern) for pattern, _ in named)]
    by = {path: [use for use in found.uses if use.site == path] for path in told}
    notes = []
    for paths in _grouped(p for p, uses in by.items() if uses[0].kind == "guessed"):
        site, primitive = sites[paths[0]], by[paths[0]][0].eqn.primitive.name
        notes.append(
            f"{shared_name(paths)} of shape {site.shape} is taken to sum over its axes {site.in_axes} and give "
            f"{site.out_axes} in {primitive}, of which the sizes do not tell; the result is exact whatever they "
            f"are, but A starts at random and B at zero: if it is otherwise, state them, as in "
            f"{axes_line(paths, site.shape)}"
        )
    return notes


def _large_tables(
    paths: Collection[str], weights: Mapping[str, Mapping[str, Any]], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Return what to say of tables that may be stacks of matrices."""
    notes = []
    tables = (p for p, r in weights.items() if p in paths and r["kind"] == "embedding" and len(shapes[p]) > 2)
    for paths in _grouped(tables):
        shape, rows = shapes[paths[0]], weights[paths[0]]["in_axes"]
        notes.append(
            f"{shared_name(paths)} of shape {shape} is looked up along its axes {rows} and so taken for a table; if it "
            f"is a stack of matrices, state its axes: {axes_line(paths, shape)}"
        )
    return notes
