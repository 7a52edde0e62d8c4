"""How large adapters are beside their weights, and how many directions they use, from the spectrum of A B."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rslora_jax.config import LoraConfig
from rslora_jax.layers import Layer, site_by_arrays
from rslora_jax.methods.method import asked
from rslora_jax.sites import Site
from rslora_jax.stored.form import dense
from rslora_jax.trained import trained_whole

SHARE = 0.01  # of the largest singular value: what counts as one that is used


@dataclasses.dataclass(frozen=True)
class Matrix:
    """One adapted matrix: a weight, or an element of a stack of them.

    Attributes:
      path, index: the weight's path, and the place on its stack axes (() where there are none).
      module, layer: what layers have in common, and which layer; None where no number tells.
      in_size, out_size, rank, gamma: as of `Site`.
      update_frobenius, update_spectral: norms of gamma A B.
      weight_frobenius, weight_spectral: norms of the base weight W; None where there is no base.
      effective_rank: of A B (`effective_rank`).
      above: how many singular values of A B are above 1 % of the largest.
    """

    path: str
    index: tuple[int, ...]
    module: str
    layer: int | None
    in_size: int
    out_size: int
    rank: int
    gamma: float
    update_frobenius: float
    update_spectral: float
    weight_frobenius: float | None
    weight_spectral: float | None
    effective_rank: float
    above: int

    @property
    def relative_frobenius(self) -> float | None:
        """||gamma A B|| / ||W||, Frobenius."""
        return _ratio(self.update_frobenius, self.weight_frobenius)

    @property
    def relative_spectral(self) -> float | None:
        """||gamma A B|| / ||W||, spectral: by how much the update turns what W does most."""
        return _ratio(self.update_spectral, self.weight_spectral)


def _ratio(update: float, weight: float | None) -> float | None:
    if weight is None:
        return None
    return update / weight if weight else math.nan


def measure(
    config: LoraConfig,
    adapters: Mapping[str, Mapping[str, Any]],
    *,
    sites: Mapping[str, Site] | None = None,
    weights: Mapping[str, Any] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> list[Matrix]:
    """Measure every adapted matrix, with stacks taken apart; what is trained whole has no spectrum, and is left out.

    Args:
      config: the adapters' config.
      adapters: `{path: {name: array}}`, of any array type.
      sites: of `wrap`; needed where there are `weights`.
      weights: the base weights by path, arrays or stored; without them, norms are absolute.
      shapes: the weights' shapes by path, where there are neither; without them too, axes that all factors have in
        front are taken for a stack.
      progress: told the number of matrices done and their number in all.

    Raises:
      ValueError: the config's method has no factors of low rank.

    >>> factors = {"a": np.eye(4, 2), "b": np.diag([3.0, 4.0])}
    >>> (found,) = measure(LoraConfig(rank=2, alpha=8, scaling="lora"), {"w": factors})
    >>> found.gamma, found.update_frobenius, found.update_spectral, found.relative_frobenius
    (4.0, 20.0, 16.0, None)
    """
    if sites is None:
        left, known, what = trained_whole(config, adapters), shapes or {}, "be measured without its base"
        factors = {path: own for path, own in adapters.items() if path not in left}
        sites = {path: site_by_arrays(config, path, own, known.get(path), what) for path, own in factors.items()}
    sites = {path: site for path, site in sites.items() if site.scaled}
    total = sum(sum(1 for _ in _elements(site)) for site in sites.values())
    found: list[Matrix] = []
    for path, site in sites.items():  # they come in the order in which the model uses them
        weight = None
        if weights is not None:
            weight = np.transpose(
                np.asarray(dense(weights[site.weight])), (*site.stack_axes, *site.in_axes, *site.out_axes)
            )
        for one in _measure(site, adapters[path], weight):
            found.append(one)
            progress(len(found), total)
    return found


def _elements(site: Site) -> Iterator[tuple[tuple[int, ...], Layer]]:
    """Yield the places on a stack that have an adapter, and the rank, alpha and gamma of each."""
    axis = site.stack_axes.index(site.layer_axis) if site.layers else 0  # type: ignore[arg-type]
    for index in np.ndindex(site.sizes(site.stack_axes)):
        own = site.layers[index[axis]] if site.layers else Layer(site.rank, site.alpha, site.gamma)
        if own.rank:
            yield index, own


def _measure(site: Site, factors: Mapping[str, Any], weight: np.ndarray | None) -> Iterator[Matrix]:
    low_rank = asked(site.method, "low_rank", "be measured by its factors")
    first, second = low_rank(site, {name: np.asarray(factor) for name, factor in factors.items()})
    for index, own in _elements(site):
        a_IxR, b_RxO = (of[index].astype(np.float64) for of in (first, second))
        a_IxR, b_RxO = a_IxR[:, : own.rank], b_RxO[: own.rank]
        values = singular_values(a_IxR, b_RxO)
        module, layer = _place(site.path, index)
        w_IxO = None if weight is None else weight[index].reshape(len(a_IxR), -1)
        yield Matrix(
            site.path,
            index,
            module,
            layer,
            in_size=a_IxR.shape[0],
            out_size=b_RxO.shape[1],
            rank=a_IxR.shape[1],
            gamma=own.gamma,
            update_frobenius=own.gamma * float(np.linalg.norm(values)),
            update_spectral=own.gamma * float(values[0]),
            weight_frobenius=None if w_IxO is None else float(np.linalg.norm(w_IxO.astype(np.float64))),
            weight_spectral=None if w_IxO is None else spectral_norm(w_IxO),
            effective_rank=effective_rank(values),
            above=count_above(values),
        )


def _place(path: str, index: Sequence[int]) -> tuple[str, int | None]:
    """Return what a matrix has in common with those of other layers, and its layer.

    The layer is the first number of the path, or else the first place on the stack.

    >>> _place("params/layers_3/attn/q_proj/kernel", ()), _place("params/layers/attn/q_proj/kernel", (3,))
    (('attn/q_proj', 3), ('attn/q_proj', 3))
    >>> _place("params/decoder/layers_3/moe/up", (5,)), _place("params/embed/embedding", ())
    (('decoder/moe/up[5]', 3), ('embed/embedding', None))
    """
    parts = path.split("/")
    layer: int | None
    numbered = next((n for n, part in enumerate(parts) if re.search(r"\d", part)), None)
    if numbered is not None:
        layer, rest = int(re.findall(r"\d+", parts[numbered])[0]), list(index)
        parts = parts[:numbered] + (parts[numbered + 1 :] or [re.sub(r"[_-]?\d+", "", parts[numbered])])
    else:
        layer, rest = (index[0], list(index[1:])) if index else (None, [])
        parts = [part for part in parts if part != "layers"] if index else parts
    for name, at in (("params", 0), ("kernel", -1)):  # what every path has tells nothing
        if len(parts) > 1 and parts[at] == name:
            del parts[at]
    return "/".join(parts) + "".join(f"[{n}]" for n in rest), layer


def singular_values(a_IxR: np.ndarray, b_RxO: np.ndarray) -> np.ndarray:
    """Return the singular values of A B, largest first, as many as the rank allows, without forming A B.

    With A = Q_a R_a and B^T = Q_b R_b they are those of R_a R_b^T, a matrix no larger than the rank (Halko, Martinsson
    and Tropp, arXiv 0909.4061, section 5, reduce a factored matrix in this way). Costs O((in + out) r^2).

    >>> singular_values(np.eye(5, 2), np.diag([3.0, 4.0])).round(12).tolist()
    [4.0, 3.0]
    """
    r_a, r_b = (np.asarray(np.linalg.qr(factor, mode="r")) for factor in (a_IxR, b_RxO.T))
    return np.linalg.svd(r_a @ r_b.T, compute_uv=False)


def effective_rank(values: np.ndarray) -> float:
    """Return the effective rank of a matrix with these singular values: exp of the entropy of p = s / sum(s).

    From 1, where one direction does all, to the rank, where all are as strong; 0 for a matrix of zeros (Roy and
    Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007).

    >>> round(effective_rank(np.array([2.0, 2.0, 2.0, 0.0])), 9), effective_rank(np.zeros(3))
    (3.0, 0.0)
    """
    if not np.sum(values) > 0:
        return 0.0
    p = values / np.sum(values)
    p = p[p > 0]
    return float(np.exp(-np.sum(p * np.log(p))))


def count_above(values: np.ndarray, share: float = SHARE) -> int:
    """Count the singular values above a share of the largest.

    This is the numerical rank at that tolerance (Golub and Van Loan, "Matrix Computations", on numerical rank), here
    much coarser than rounding: below 1 % of the largest a direction hardly matters.

    >>> count_above(np.array([5.0, 0.06, 0.04]))
    2
    """
    return int(np.sum(values > share * values[0])) if values.size else 0


def spectral_norm(w: np.ndarray, *, tolerance: float = 1e-5, most: int = 200) -> float:
    """Return the largest singular value of a matrix, to about `tolerance` where some stand out, 1e-3 where none do.

    By Lanczos's method on the smaller of W W^T and W^T W, with the basis kept orthogonal (Golub and Van Loan, "Matrix
    Computations", chapter 10), in products with W as it is: the full decomposition of one matrix of a 7B takes minutes.
    """
    w = np.asarray(w, np.float32)
    w = w if w.shape[0] >= w.shape[1] else w.T
    if w.shape[1] <= 64:  # small enough for the whole decomposition
        return float(np.linalg.norm(w.astype(np.float64), 2))
    v: Any = np.random.default_rng(0).standard_normal(w.shape[1])
    basis = np.empty((0, w.shape[1]))
    diagonal: list[float] = []
    beside: list[float] = []
    top = 0.0
    for step in range(1, min(most, w.shape[1]) + 1):
        v = v / np.linalg.norm(v)
        basis = np.vstack([basis, v])
        u = (w.T @ (w @ v.astype(np.float32))).astype(np.float64)
        diagonal.append(float(u @ v))
        for _ in range(2):  # once leaves what rounding brings back
            u -= basis.T @ (basis @ u)
        ended = np.linalg.norm(u) <= 1e-6 * max(diagonal)
        if step % 5 == 0 or ended or step == min(most, w.shape[1]):
            before, top = top, _top(diagonal, beside)
            if ended or top - before <= tolerance * top:
                break
        beside.append(float(np.linalg.norm(u)))
        v = u
    return math.sqrt(max(top, 0.0))


def _top(diagonal: list[float], beside: list[float]) -> float:
    """Return the largest eigenvalue of a symmetric tridiagonal matrix."""
    return float(np.linalg.eigvalsh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))[-1])
