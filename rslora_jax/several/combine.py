"""Several adapters of one base as one: PEFT's ways of `add_weighted_adapter`, with each weight's own scale."""

import difflib
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rslora_jax.adapters import check_adapters
from rslora_jax.config import LoraConfig
from rslora_jax.layers import Layer
from rslora_jax.methods.method import asked
from rslora_jax.methods.random import site_key
from rslora_jax.pytrees import Params
from rslora_jax.several.join import joined
from rslora_jax.several.merging import ELECTIONS, KINDS, Kind, merged
from rslora_jax.sites import Site, named_leaves
from rslora_jax.wrap import Adapters, Lora

# By which `combine` knows them: of factors, and with "svd" of whole updates.
METHODS = ("linear", "cat", "svd", *(name for name in KINDS if name != "linear"))
METHODS += tuple(f"{name}_svd" for name in KINDS if name != "linear")


class _Source(NamedTuple):
    """One adapter of one weight, for one element of its stack.

    Attributes:
      number: which of the adapters it is of.
      weight: its weight among the adapters.
      gamma: its scale.
      first, second: its factors (in, r) and (r, out), in float64.
    """

    number: int
    weight: float
    gamma: float
    first: np.ndarray
    second: np.ndarray


_Pair = tuple[np.ndarray, np.ndarray]


class _Way(NamedTuple):
    """What `combine` was asked for."""

    method: str
    kind: Kind
    density: float | None
    key: Array | None
    election: str


def combine(
    adapters: Iterable[tuple[Lora, Adapters]],
    weights: Sequence[float],
    method: str = "linear",
    *,
    params: Params = None,
    rank: int | None = None,
    density: float | None = None,
    key: Array | None = None,
    majority_sign_method: str = "total",
) -> tuple[Lora, Adapters]:
    """Combine several adapters of one base into one: (its `Lora`, of gamma 1, its adapters).

    The update w gamma A B of an adapter has that weight's own gamma, whatever the scaling, ranks and alphas of each.
    A weight, or a layer of one, that an adapter lacks counts as zeros. In float64, on the host, rounded once.

    ==================  =========================================================  ===========================
    method              the combined update                                        rank
    ==================  =========================================================  ===========================
    "cat"               sum of w gamma A B, exactly                                the sum of the ranks
    "svd"               the nearest to that of the rank, exact where it is enough  `rank`, or the largest
    "linear"            (sum of s A) (sum of s B), s = sqrt(abs(w gamma))          the largest
    "ties"              as "linear", of A and of B each by TIES (arXiv 2306.01708) the largest
    "dare_linear"       as "linear", of A and B with entries dropped at random     the largest
    "dare_ties"         both (DARE: arXiv 2311.03099)                              the largest
    "magnitude_prune"   as "linear", of the largest entries of A and B             the largest
    with "_svd" behind  the same of whole updates gamma A B, then the nearest      `rank`, or the largest
    ==================  =========================================================  ===========================

    What is of A and B apart mixes those of different adapters, so that "linear" is none of the sum of updates; the sign
    of a negative weight goes to A.

    What is trained whole, or by rows, becomes the base's value and the sum of w (value - base's), with changes pruned
    and signs elected as whole updates are. It is to be trained alike by all that train it.

    Args:
      adapters: pairs of what `wrap` returns and its adapters.
      weights: a number for each, which may be negative.
      method: the way.
      params: the base, where an adapter trains parameters whole or by rows.
      rank: of the result, for "svd" and what ends in it; at most a weight's full rank.
      density: the part of entries that pruning keeps, above 0 and at most 1.
      key: a PRNG key, for what drops at random.
      majority_sign_method: how TIES elects a sign: "total" (of the sum) or "frequency" (of the more).

    Returns:
      lora: with the sites of all.
      adapters: numpy arrays of the widest dtype of all.

    Raises:
      ValueError: the adapters are of different bases or cannot be joined (as of `stack`), are neither of low rank nor
        values, are not finite, or what is asked for does not fit the method; or the base is needed.

    >>> import rslora_jax as rslora
    >>> params, x = {"w": jnp.ones((6, 4))}, jnp.ones((2, 6))
    >>> def adapted(rank):
    ...     lora = rslora.wrap(lambda p, x: x @ p["w"], params, x, config=rslora.LoraConfig(rank=rank, alpha=3))
    ...     return lora, jax.tree.map(jnp.ones_like, lora.init(jax.random.key(0)))
    >>> lora, both = combine([adapted(2), adapted(3)], [0.7, -0.3], "cat")  # 0.7 3/sqrt(2) 2 - 0.3 3/sqrt(3) 3
    >>> lora.sites["w"].rank, round(float((lora.merge(params, both)["w"] - params["w"])[0, 0]), 4)
    (5, 1.411)
    """
    pairs = list(adapters)
    way = _Way(method, _kind_of(method), density, key, majority_sign_method)
    _check(way, pairs, weights, rank)
    leaves = _leaves_of(pairs, params)
    paths = {path for own, _ in pairs for path in own.sites}
    lora = joined([own for own, _ in pairs], {path: _rank(path, pairs, way, rank) for path in paths})
    dtype = jnp.dtype(lora.config.dtype)

    def one(site: Site) -> dict[str, Any]:
        if not site.scaled:
            return {name: np.asarray(v, dtype) for name, v in _values(way, site, pairs, weights, leaves).items()}
        stack = site.sizes(site.stack_axes)
        each = enumerate(_by_element(site, pairs, weights))
        elements = [_of_rank(site, *_one(way, site, n, sources)) if sources else _zeros(site) for n, sources in each]
        first, second = (np.stack(parts).reshape(*stack, *parts[0].shape) for parts in zip(*elements, strict=True))
        factors = site.method.of_low_rank(site, first, second)  # type: ignore[attr-defined]
        return {name: np.asarray(factor, dtype) for name, factor in factors.items()}

    return lora, {path: one(site) for path, site in lora.sites.items()}


def norm_of_sum(adapters: Iterable[tuple[Lora, Adapters]], weights: Sequence[float]) -> float:
    """Return the Frobenius norm of the sum of all updates w gamma A B, of all weights together.

    What cancels is known to about 1e-8 of what there was before. What is trained whole or by rows does not count.

    Args:
      adapters: pairs of what `wrap` returns and its adapters, of one base.
      weights: a number for each.

    Raises:
      ValueError: an adapter is none of low rank, or not finite.

    >>> import rslora_jax as rslora
    >>> lora = rslora.wrap(lambda p, x: x @ p["w"], {"w": jnp.ones((6, 4))}, jnp.ones((2, 6)),
    ...                    config=rslora.LoraConfig(rank=1, alpha=3))
    >>> ones = jax.tree.map(jnp.ones_like, lora.init(jax.random.key(0)))
    >>> round(norm_of_sum([(lora, ones), (lora, ones)], [1, -0.5]), 4)  # 0.5 * 3 * sqrt(24)
    7.3485
    """
    pairs = list(adapters)
    sites = {path: site for own, _ in pairs for path, site in own.sites.items() if site.scaled}
    squares = 0.0
    for site in sites.values():
        for first, second in (_sum(sources) for sources in _by_element(site, pairs, weights) if sources):
            squares += float(np.sum((first.T @ first) * (second @ second.T)))  # ||A B||^2 = <A'A, B B'>
    return math.sqrt(max(squares, 0.0))


def _kind_of(method: str) -> Kind:
    """Return how arrays are merged in a method."""
    if method not in METHODS:
        near = difflib.get_close_matches(str(method), METHODS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(METHODS)}"
        raise ValueError(f"method={method!r} is not known: {hint}")
    return KINDS.get(method.removesuffix("_svd"), KINDS["linear"])


def _check(way: _Way, pairs: Sequence[tuple[Lora, Adapters]], weights: Sequence[float], rank: int | None) -> None:
    """Raise a ValueError that says what was asked for and cannot be."""
    if not pairs:
        raise ValueError("there are no adapters to combine: give at least one pair of a Lora and its adapters")
    if len(weights) != len(pairs):
        raise ValueError(f"there are {len(pairs)} adapters and {len(weights)} weights: give one for each")
    if wrong := [w for w in weights if not math.isfinite(w)]:
        raise ValueError(f"the weight {wrong[0]} is not finite: give numbers")
    if rank is not None and not way.method.endswith("svd"):
        raise ValueError(f"{way.method!r} has a rank of its own: leave out rank={rank}, or take a method with 'svd'")
    if rank is not None and (rank < 1 or rank != int(rank)):
        raise ValueError(f"rank={rank} is not a positive whole number: an adapter needs a rank of 1 or more")
    if (way.density is None) != (not way.kind.prunes):
        unless = f"leave out density={way.density}" if way.density else "pass density=, the part of entries to keep"
        raise ValueError(f"{way.method!r} {'prunes' if way.kind.prunes else 'prunes nothing'}: {unless}")
    if way.density is not None and not 0 < way.density <= 1:
        raise ValueError(f"density={way.density} is no part of the entries: give a number above 0 and at most 1")
    if way.key is None and way.kind.prunes == "random":
        raise ValueError(f"{way.method!r} drops entries at random: pass key=jax.random.key(seed)")
    if way.election not in ELECTIONS:
        raise ValueError(f"majority_sign_method={way.election!r} is not known: use {' or '.join(map(repr, ELECTIONS))}")
    for own, its in pairs:
        check_adapters(own.sites, its)
        for site in own.sites.values():
            if site.scaled and getattr(site.method, "of_low_rank", None) is None:
                raise ValueError(
                    f"the method {type(site.method).__name__} cannot be combined, as its update of {site.path} is no "
                    "product of two factors: keep such adapters apart (rslora_jax.stack, rslora generate --adapters), "
                    "or merge one into the base and train the next on that"
                )


def _leaves_of(pairs: Sequence[tuple[Lora, Adapters]], params: Params) -> Mapping[str, Any]:
    """Return the base's parameters by path; raise a ValueError where they are needed and not given, or do not fit."""
    for own, its in pairs:
        valued = next((path for path, site in own.sites.items() if not site.scaled), None)
        if params is not None:
            own.check(params, its)
        elif valued is not None:
            raise ValueError(
                f"an adapter trains {valued} itself, of which the change from the base is combined: give the base, "
                "combine(..., params=params)"
            )
    return {} if params is None else named_leaves(params)


def _rank(path: str, pairs: Sequence[tuple[Lora, Adapters]], way: _Way, rank: int | None) -> int:
    """Return the rank that the combined adapter has at a site."""
    sites = [own.sites[path] for own, _ in pairs if path in own.sites]
    if not sites[0].scaled:
        return sites[0].rank
    if way.method == "cat":
        elements = range(math.prod(sites[0].sizes(sites[0].stack_axes)))
        return max(sum(_layer(site, n).rank for site in sites) for n in elements)
    largest = max(site.rank for site in sites)
    if way.method.endswith("svd"):
        return min(rank or largest, sites[0].in_size, sites[0].out_size)
    return largest


def _layer(site: Site, element: int) -> Layer:
    """Return the rank, alpha and gamma that an element of a site's stack has."""
    if not site.layers:
        return Layer(site.rank, site.alpha, site.gamma)
    place = np.unravel_index(element, site.sizes(site.stack_axes))
    return site.layers[place[site.stack_axes.index(site.layer_axis)]]  # type: ignore[arg-type]


def _by_element(
    site: Site, pairs: Sequence[tuple[Lora, Adapters]], weights: Sequence[float]
) -> Iterator[list[_Source]]:
    """Yield, for each element of a site's stack, the adapters that there are of it."""
    there = [
        (n, weight, own.sites[site.path], _matrices(own.sites[site.path], its[site.path]))
        for n, ((own, its), weight) in enumerate(zip(pairs, weights, strict=True))
        if site.path in own.sites
    ]
    for element in range(math.prod(site.sizes(site.stack_axes))):
        sources = []
        for n, weight, its, (first, second) in there:
            rank, _, gamma = _layer(its, element)
            sources.append(_Source(n, weight, gamma, first[element, :, :rank], second[element, :rank]))
        yield [source for source in sources if source.first.size]


def _matrices(site: Site, arrays: Mapping[str, Any]) -> _Pair:
    """Return an adapter as two factors, (elements, in, r) and (elements, r, out), in float64."""
    low_rank = asked(site.method, "low_rank", "be measured, as only updates of two factors can")
    first, second = low_rank(site, _wide(site, arrays))
    return first.reshape(-1, *first.shape[-2:]), second.reshape(-1, *second.shape[-2:])


def _wide(site: Site, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return an adapter's arrays in float64."""
    wide = {name: np.asarray(array).astype(np.float64) for name, array in arrays.items()}
    if wrong := [name for name, array in wide.items() if not np.isfinite(array).all()]:
        raise ValueError(f"adapter {site.path}/{wrong[0]} is not finite in all entries: it cannot be combined")
    return wide


def _values(
    way: _Way,
    site: Site,
    pairs: Sequence[tuple[Lora, Adapters]],
    weights: Sequence[float],
    leaves: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """Return the values of a parameter: the base's, and what comes of the changes from them that several make."""
    w = leaves[site.weight]
    config = LoraConfig(dtype=str(jnp.promote_types(w.dtype, "float32")))
    start = _wide(site, site.method.init(site, jax.random.key(0), w, config))
    there = [
        (n, weight, _wide(site, its[site.path]))
        for n, ((own, its), weight) in enumerate(zip(pairs, weights, strict=True))
        if site.path in own.sites
    ]
    elements = math.prod(site.sizes(site.stack_axes))

    def one(name: str, base: np.ndarray) -> np.ndarray:
        changes = [(its[name] - base).reshape(elements, -1) for _, _, its in there]
        its_weights = [weight for _, weight, _ in there]

        def change(element: int) -> np.ndarray:
            own = [each[element] for each in changes]
            keys = [_key(way, site, n, element, 0) for n, _, _ in there]
            return merged(way.kind, own, its_weights, density=way.density, keys=keys, election=way.election)

        return base + np.stack([change(n) for n in range(elements)]).reshape(base.shape)

    return {name: one(name, base) for name, base in start.items()}


def _one(way: _Way, site: Site, element: int, sources: Sequence[_Source]) -> _Pair:
    """Return the combined factors of one element of a site's stack."""
    if way.method in ("cat", "svd"):
        return _sum(sources) if way.method == "cat" else _nearest_of_product(*_sum(sources), site.rank)

    def together(arrays: Sequence[np.ndarray], weights: Sequence[float], which: int) -> np.ndarray:
        keys = [_key(way, site, source.number, element, which) for source in sources]
        return merged(way.kind, arrays, weights, density=way.density, keys=keys, election=way.election)

    if way.method.endswith("_svd"):
        updates = [source.gamma * source.first @ source.second for source in sources]
        return _nearest(together(updates, [source.weight for source in sources], 0), site.rank)
    scales = [source.weight * source.gamma for source in sources]
    sizes = [math.sqrt(abs(scale)) for scale in scales]
    signed = [math.copysign(size, scale) for size, scale in zip(sizes, scales, strict=True)]
    first = together([source.first for source in sources], signed, 0)
    return first, together([source.second for source in sources], sizes, 1)


def _sum(sources: Sequence[_Source]) -> _Pair:
    """Return the factors, side by side, of the sum of w gamma A B."""
    first = np.concatenate([source.first for source in sources], 1)
    return first, np.concatenate([source.weight * source.gamma * source.second for source in sources])


def _key(way: _Way, site: Site, *place: int) -> Array | None:
    """Return the key of an array by its place: which adapter, which element, which factor."""
    if way.key is None:
        return None
    return functools.reduce(jax.random.fold_in, place, site_key(way.key, site.path))


def _nearest_of_product(first: np.ndarray, second: np.ndarray, rank: int) -> _Pair:
    """Return the factors of the nearest to a product of two, from their singular values; it is not formed."""
    (q_in, left), (q_out, right) = np.linalg.qr(first), np.linalg.qr(second.T)
    first, second = _nearest(left @ right.T, rank)
    return q_in @ first, second @ q_out.T


def _nearest(update: np.ndarray, rank: int) -> _Pair:
    """Return the factors (in, r) and (r, out) of the matrix of at most a rank that is nearest to one."""
    left, values, right = np.linalg.svd(update, full_matrices=False)
    return left[:, :rank], values[:rank, None] * right[:rank]


def _of_rank(site: Site, first: np.ndarray, second: np.ndarray) -> _Pair:
    """Fill up factors with zeros to the site's rank."""
    missing = site.rank - first.shape[1]
    return np.pad(first, [(0, 0), (0, missing)]), np.pad(second, [(0, missing), (0, 0)])


def _zeros(site: Site) -> _Pair:
    return np.zeros((site.in_size, site.rank)), np.zeros((site.rank, site.out_size))
