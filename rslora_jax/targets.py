"""Which weights a config's targets and exclusions name: whole, or by one use of a tied weight."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rslora_jax.config import LoraConfig, expand_braces, matches, near_misses, split_use
from rslora_jax.layers import layers_left, layers_of_weights, pattern_of_layers
from rslora_jax.transform.discover import Found, roles
from rslora_jax.transform.uses import LOOKUP, PRODUCT

_Roles = Mapping[str, Mapping[str, Any]]
_Layers = frozenset[int] | bool  # those of a weight that a pattern names; True for all

NO_TARGET = "no target names it"


def as_tuple(patterns: str | Sequence[str]) -> tuple[str, ...]:
    """Return one pattern, or several, as a tuple."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def roles_by_use(shapes: Mapping[str, tuple[int, ...]], found: Found, weights: _Roles) -> dict[str, dict[str, Any]]:
    """Return the roles of both uses of each weight that is looked up and multiplied, {path: {path@use: role}}.

    A weight's axes may have other roles in its product than in its look-up: of a head, the rows are the out-axes.
    """
    tied: dict[str, dict[str, Any]] = {}
    for path, role in weights.items():
        met = [use for use in found.uses if use.site == path and use.kind != LOOKUP]
        if role["kind"] != "embedding" or not met:
            continue
        product = roles(shapes, dataclasses.replace(found, uses=met)).get(path)
        if product is not None:
            own = {LOOKUP: role, PRODUCT: product}
            tied[path] = {f"{path}@{use}": {**of, "use": use} for use, of in own.items()}
    return tied


def targeted(
    config: LoraConfig,
    shapes: Mapping[str, tuple[int, ...]],
    weights: _Roles,
    by_use: Mapping[str, _Roles],
    heads: set[str],
    reasons: Mapping[str, str],
) -> tuple[dict[str, frozenset[int] | None], dict[str, str]]:
    """Return the adapters that a config asks for, and why those that it leaves out have none.

    The adapters are given by path, with the numbers of their layers where it asks for some of these alone; what is
    left out, by path or, of single layers, by their pattern.
    """
    counts = {path: layer_count(shapes, weights, path) for path in weights}
    named: dict[str, list[_Layers]] = {}
    for pattern in as_tuple(config.targets):
        if pattern == "all-linear":
            hit = {p for p, r in weights.items() if r["kind"] in ("linear", "expert")} - heads
            single: Mapping[str, frozenset[int]] = {}
        else:
            hit = _named(pattern, weights, by_use)
            single = layers_of_weights(pattern, f"target {pattern!r}", counts, alone=not hit)
            if not hit and not single:
                raise ValueError(_no_target(pattern, shapes, weights, by_use, reasons))
        _add(named, {**single, **dict.fromkeys(hit, True)})
    gone: dict[str, list[_Layers]] = {}
    left: dict[str, str] = {}
    for pattern in as_tuple(config.exclude):
        found = _excluded(pattern, shapes, weights, by_use, counts)
        for one in found:  # of a weight that is adapted whole, the other use is left
            whole, use = split_use(one)
            there = whole in named and True not in gone.get(whole, ())
            if use and there and whole not in found and one in by_use.get(whole, {}):
                named |= dict.fromkeys(by_use[whole], named.pop(whole))
        for path in found.keys() & named.keys():
            now = layers_left(named[path], gone.get(path, ()), counts.get(path))
            then = layers_left(named[path], [*gone.get(path, ()), found[path]], counts.get(path))
            left |= _left(path, now, then, counts.get(path), f"excluded by {pattern!r}")
        _add(gone, found)
    chosen: dict[str, frozenset[int] | None] = {}
    for path, of in named.items():
        layers = layers_left(of, gone.get(path, ()), counts.get(path))
        if layers is None or layers:
            chosen[path] = layers
            left |= _left(path, None, layers_left(of, (), counts.get(path)), counts.get(path), NO_TARGET)
    for path, own in by_use.items():
        if path in chosen and (twice := chosen.keys() & own.keys()):
            raise ValueError(
                f"targets name {path} whole, and {min(twice)} too, which is one use of it: name one of them"
            )
    return chosen, left


def _add(to: dict[str, list[_Layers]], found: Mapping[str, _Layers]) -> None:
    for path, layers in found.items():
        to.setdefault(path, []).append(layers)


def _excluded(
    pattern: str,
    shapes: Mapping[str, tuple[int, ...]],
    weights: _Roles,
    by_use: Mapping[str, _Roles],
    counts: Mapping[str, int | None],
) -> dict[str, _Layers]:
    """Return what a pattern takes out, by path: True for a whole weight and each of its uses, or layers."""
    gone = _named(pattern, weights, by_use)
    single = layers_of_weights(pattern, f"exclude {pattern!r}", counts, alone=not gone)
    if not gone and not single and not any(matches(p, pattern) for p in shapes):
        known = [*weights, *(one for own in by_use.values() for one in own)]
        raise ValueError(f"exclude {pattern!r} matches no weight: did you mean {near_misses(pattern, known)}?")
    whole = [*gone, *(one for p in gone for one in by_use.get(p, {}))]
    return {**single, **dict.fromkeys(whole, True)}


def _left(
    path: str, before: frozenset[int] | None, after: frozenset[int] | None, count: int | None, why: str
) -> dict[str, str]:
    """Return the reason for what has no adapter after a step and had one before: the weight, or some layers of it."""
    every = frozenset(range(1 if count is None else count))
    had, has = (every if layers is None else layers for layers in (before, after))
    if not had - has:
        return {}
    return {path if not has else pattern_of_layers(path, had - has): why}


def layer_count(shapes: Mapping[str, tuple[int, ...]], weights: _Roles, path: str) -> int | None:
    """Return how many layers an adapter's weight holds; None where it is no stack."""
    whole = path if path in shapes else split_use(path)[0]
    axis = weights[whole]["layer_axis"]
    return None if axis is None else shapes[whole][axis]


def _named(pattern: str, weights: _Roles, by_use: Mapping[str, _Roles]) -> set[str]:
    """Return the adapters' paths that a pattern names. Where a weight has one use only, that is the weight."""
    hit = {p for p in weights if matches(p, pattern)}
    for whole, use in map(split_use, expand_braces(pattern)):
        for path in (p for p in weights if use and matches(p, whole)):
            if path in by_use:
                hit.add(f"{path}@{use}")
            elif (weights[path]["kind"] == "embedding") == (use == LOOKUP):
                hit.add(path)
    return hit


def _no_target(
    pattern: str,
    shapes: Mapping[str, tuple[int, ...]],
    weights: _Roles,
    by_use: Mapping[str, _Roles],
    reasons: Mapping[str, str],
) -> str:
    """Say why a target names nothing, and what would."""
    whole, use = split_use(pattern)
    known = [*weights, *(one for own in by_use.values() for one in own)] if use else list(weights)
    meant = f"did you mean {near_misses(pattern, known)}?"
    if use and (other := [p for p in weights if matches(p, whole)]):
        return f"target {pattern!r} matches {other[0]}, of which there is no {use}: {meant}"
    if other := [p for p in shapes if matches(p, pattern)]:
        why = reasons.get(other[0], "no output depends on it")
        return (
            f"target {pattern!r} matches {other[0]} of shape {shapes[other[0]]}, which cannot be adapted as it is used "
            f"({why}){_remedy(other[0], shapes[other[0]], reasons)}: {meant}"
        )
    return f"target {pattern!r} matches no weight: {meant}"


def _remedy(path: str, shape: Sequence[int], reasons: Mapping[str, str]) -> str:
    """Say how to adapt a weight all the same, if there is a way."""
    if len(shape) < 2 or path not in reasons or reasons[path].startswith("no parameter"):
        return ""
    return f"; to adapt it exactly wherever it is used, by forming the sum, state its axes: {axes_line([path], shape)}"


def axes_line(paths: Sequence[str], shape: Sequence[int]) -> str:
    """Return the line that states the axes of some weights, as the last two are most often stored."""
    pattern = paths[0] if len(paths) == 1 else re.sub(r"\d+", "*", paths[0])
    names = ("stack",) * (len(shape) - 2) + ("in", "out")
    return f"LoraConfig(axes={{{pattern!r}: {names!r}}})"
