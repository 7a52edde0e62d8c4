"""Single layers of a weight that holds several, as a scanned model's do: how patterns name them, and what each has."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rslora_jax.config import LoraConfig, matches_adapter
from rslora_jax.methods.method import asked, method_of
from rslora_jax.methods.rows import Rows
from rslora_jax.scaling import gamma

if TYPE_CHECKING:
    from rslora_jax.sites import Site

# Numbers in braces at the end of a part of a path, or that are one: layers_{3}, {0,2}, {4..7}.
_NUMBERS = re.compile(r"(?:^|[/_])\{(\d+(?:\.\.\d+)?(?:,\d+(?:\.\.\d+)?)*)\}(?=/|@|$)")

_MOST = 100_000  # layers in a run: a pattern may come from a stranger's file


class Layer(NamedTuple):
    """What one layer has of the adapter of a weight that holds several.

    Attributes:
      rank: its own; 0 where it has no adapter.
      alpha, gamma: its own.
    """

    rank: int
    alpha: float
    gamma: float


def layers_named(path: str, pattern: str) -> frozenset[int] | bool:
    """Return which layers of an adapter's weight a pattern names: True for all of them, False for none.

    Numbers in braces at the end of a part of the pattern are those of layers where the weight's own path lacks them:
    one pattern serves a model with a weight for each layer and one that has them stacked, as for a scan.

    >>> layers_named("params/layers/3/mlp/up", "*/layers/{3,5}/mlp/*")
    True
    >>> sorted(layers_named("params/layers/mlp/up", "*/layers/{3,5}/mlp/*"))
    [3, 5]
    >>> sorted(layers_named("params/layers/mlp/up", "*/layers_{0..2}/*")), layers_named("params/head", "*/{3}/mlp/*")
    ([0, 1, 2], False)
    """
    if matches_adapter(path, pattern):
        return True
    for found in _NUMBERS.finditer(pattern):
        rest = pattern[: found.start()] + pattern[found.end() :]
        if matches_adapter(path, rest.removeprefix("/") if not found.start() else rest):
            return frozenset(number for part in found[1].split(",") for number in _run(part))
    return False


def _run(text: str) -> range:
    first, _, last = text.partition("..")
    return range(int(first), min(int(last or first), int(first) + _MOST) + 1)


def value_of_layer(path: str, layer: int | None, patterns: Any, default: Any) -> Any:
    """Return the value of the first pattern that names an adapter, or, where a number is given, that layer of it.

    >>> patterns = [("*/layers/{1}/up", 8), ("*/up", 4)]
    >>> [value_of_layer("params/layers/up", n, patterns, 2) for n in range(3)]
    [4, 8, 4]
    """
    for pattern, value in patterns:
        named = layers_named(path, pattern)
        if named is True or (named and layer in named):
            return value
    return default


def layers_of_weights(
    pattern: str, what: str, counts: Mapping[str, int | None], *, alone: bool = True
) -> dict[str, frozenset[int]]:
    """Return the layers, by path, of the weights of which a pattern names some.

    Args:
      pattern: the pattern.
      what: what an error calls it.
      counts: how many layers each weight holds, by path; None where it holds no stack of them.
      alone: whether the pattern names no weight as a whole, as in a model that has one for each layer.

    Raises:
      ValueError: a weight has not as many; or, with `alone`, none of those named has layers.
    """
    named = {path: layers for path in counts if not isinstance(layers := layers_named(path, pattern), bool)}
    found = {path: layers for path, layers in named.items() if counts[path] is not None}
    if named and not found and alone:
        raise ValueError(f"{what} names layers of {min(named)}, which holds no stack of them: leave the number out")
    for path, layers in found.items():
        if max(layers) >= (counts[path] or 0):
            raise ValueError(f"{what} names layer {max(layers)} of {path}, whose layers are 0 to {counts[path] - 1}")  # type: ignore[operator]
    return found


def layers_left(
    named: Iterable[frozenset[int] | bool], gone: Iterable[frozenset[int] | bool], count: int | None
) -> frozenset[int] | None:
    """Return which layers of a weight some patterns name and others leave out of these; None where it is all.

    Args:
      named, gone: what each pattern names of it: True for all, or the numbers of some.
      count: how many layers it has; of one that holds no stack of them, None.

    >>> layers_left([frozenset({0, 1}), frozenset({3})], [frozenset({1})], 4), layers_left([True], [], None)
    (frozenset({0, 3}), None)
    """
    every = frozenset(range(1 if count is None else count))

    def of(patterns: Iterable[frozenset[int] | bool]) -> frozenset[int]:
        return frozenset().union(*(every if one is True else one or frozenset() for one in patterns))

    left = of(named) - of(gone)
    return None if left == every else left


def with_layers(site: Site, own: Callable[[int | None], Layer | None]) -> Site:
    """Return a site with rank, alpha and gamma, and with those of each layer where they differ.

    Args:
      site: of which these are not known yet.
      own: gives what a layer has, by its number, or None where it has no adapter; without a number, what all have.
    """
    if site.layer_axis is None:
        one = own(None)
        return site if one is None else dataclasses.replace(site, **one._asdict())
    layers = [own(n) for n in range(site.shape[site.layer_axis])]
    largest = max((layer for layer in layers if layer), key=lambda layer: layer.rank)
    each = tuple(Layer(0, largest.alpha, 0.0) if layer is None else layer for layer in layers)
    return dataclasses.replace(site, **largest._asdict(), layers=each if set(each) != {largest} else ())


def site_by_arrays(
    config: LoraConfig, path: str, factors: Mapping[str, Any], shape: Sequence[int] | None, what: str
) -> Site:
    """Return the site of an adapter of which only the arrays are known, and perhaps its weight's shape.

    Raises:
      ValueError: the config's method has arrays that do not tell; `what` says what cannot be done.
    """
    infer = asked(method_of(config.method), "site_of", what)
    site = infer(path, factors, shape, alpha=config.alpha, scaling=config.scaling)
    return _as_configured(dataclasses.replace(site, layer_axis=site.stack_axes[0] if site.stack_axes else None), config)


def _count(site: Site) -> int | None:
    return None if site.layer_axis is None else site.shape[site.layer_axis]


def _as_configured(site: Site, config: LoraConfig) -> Site:
    """Return a site that is known by the arrays of its adapter, with the ranks and scales of a config.

    The arrays have the largest rank; a config may ask for one that its weight was too narrow for.
    """

    named, gone = (
        [found for pattern in ((of,) if isinstance(of, str) else of) if (found := layers_named(site.path, pattern))]
        for of in (config.targets, config.exclude)
    )
    single = layers_left(named or [True], gone, _count(site))  # as by "all-linear", or a target whose weight is whole

    def own(layer: int | None) -> Layer | None:
        if layer is not None and single is not None and layer not in single:
            return None
        rank = min(value_of_layer(site.path, layer, config.rank_pattern, config.rank), site.rank)
        alpha = value_of_layer(site.path, layer, config.alpha_pattern, config.alpha)
        return Layer(rank, alpha, gamma(rank, alpha, config.scaling))

    return with_layers(site, own)


def patterns_of(sites: Mapping[str, Site]) -> dict[str, Any]:
    """Return the targets, ranks and alphas of a config with these sites, given by the paths that they are to have.

    A path is written as it is, for those that hold no character of a pattern.
    """
    trained = tuple(path for path, site in sites.items() if site.kind == "trained")
    rows = {path: site.method.ids for path, site in sites.items() if isinstance(site.method, Rows)}
    sites = {path: site for path, site in sites.items() if site.scaled}
    layers = {
        (path, n): layer
        for path, site in sites.items()
        for n, layer in (enumerate(site.layers) if site.layers else [(None, Layer(site.rank, site.alpha, site.gamma))])
        if layer.rank
    }
    whole = {path for path, site in sites.items() if all(layer.rank for layer in site.layers)}
    targets = [path for path in sites if path in whole]
    return {
        "targets": (*targets, *(pattern_of_layer(path, n) for path, n in layers if path not in whole)),
        "exclude": (),
        "trained": trained,
        "trained_rows": rows,
        "rank_pattern": tuple((pattern_of_layer(*key), layer.rank) for key, layer in layers.items()),
        "alpha_pattern": tuple((pattern_of_layer(*key), layer.alpha) for key, layer in layers.items()),
    }


def pattern_of_layer(path: str, layer: int | None) -> str:
    """Return a pattern for one layer of the weight of this path.

    >>> pattern_of_layer("params/layers/up", 3), pattern_of_layer("params/up", None)
    ('params/layers/up/{3}', 'params/up')
    """
    return path if layer is None else pattern_of_layers(path, [layer])


def pattern_of_layers(path: str, layers: Iterable[int]) -> str:
    """Return a pattern for some layers of the weight of this path.

    >>> pattern_of_layers("params/layers/up", [0, 2, 3, 4])
    'params/layers/up/{0,2..4}'
    """
    runs: list[list[int]] = []
    for n in sorted(layers):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    text = ",".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return f"{path}/{{{text}}}".removeprefix("/")


def weight_of_layers(pattern: str) -> str:
    """Return the path of the weight that `pattern_of_layers` made a pattern of; of any other path, that itself.

    >>> weight_of_layers("params/layers/up/{0,2..4}"), weight_of_layers("params/up")
    ('params/layers/up', 'params/up')
    """
    found = _NUMBERS.search(pattern)
    return pattern[: found.start()] if found and found.end() == len(pattern) else pattern
