"""How several arrays become one, entry by entry: pruned, of the elected sign, summed (arXiv 2306.01708, 2311.03099)."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax import Array


@dataclasses.dataclass(frozen=True)
class Kind:
    """One way to merge arrays.

    Attributes:
      prunes: how each loses a part of its entries before: "magnitude" (the smallest), "random" (and the rest becomes as
        much larger), or "" for not at all.
      elects: whether, entry by entry, the mean is taken of those alone that have the elected sign; else the sum of all.
    """

    prunes: str = ""
    elects: bool = False


KINDS: Mapping[str, Kind] = {
    "linear": Kind(),
    "ties": Kind("magnitude", elects=True),
    "dare_linear": Kind("random"),
    "dare_ties": Kind("random", elects=True),
    "magnitude_prune": Kind("magnitude"),
}

# How a sign is elected: by the sum of the entries, or by how many there are of each.
ELECTIONS = ("total", "frequency")


def merged(
    kind: Kind,
    arrays: Sequence[np.ndarray],
    weights: Sequence[float],
    *,
    density: float | None = None,
    keys: Sequence[Array | None] = (),
    election: str = "total",
) -> np.ndarray:
    """Merge arrays, each times its weight.

    Smaller arrays are pruned by their own size, and filled up with zeros to that of the largest along each axis.

    Args:
      kind: the way.
      arrays: the arrays, of the same number of axes.
      weights: of each array; signs are elected without them, as PEFT does.
      density: the part of its entries that each keeps.
      keys: for each array, where what is pruned is drawn.
      election: how signs are elected, one of `ELECTIONS`.

    >>> one, other = np.array([4.0, -1.0, 2.0]), np.array([-1.0, -3.0, 4.0])
    >>> merged(KINDS["linear"], [one, other], [1, 0.5]).tolist()
    [3.5, -2.5, 4.0]
    >>> merged(KINDS["ties"], [one, other], [1, 0.5], density=0.7).tolist()  # two of three are kept of each
    [4.0, -1.5, 2.0]
    """
    if kind.prunes == "magnitude":
        arrays = [_largest(array, density) for array in arrays]
    elif kind.prunes:
        arrays = [_drawn(array, density, key) for array, key in zip(arrays, keys, strict=True)]
    stacked = np.stack(_of_one_shape(arrays))
    terms = np.reshape(np.asarray(weights, stacked.dtype), (-1, *(1,) * (stacked.ndim - 1))) * stacked
    if not kind.elects:
        return terms.sum(0)
    signs = np.sign(stacked)
    votes = (stacked if election == "total" else signs).sum(0)
    agreeing = signs == np.where(votes >= 0, 1, -1)
    return (terms * agreeing).sum(0) / np.maximum(agreeing.sum(0), 1)


def _largest(array: np.ndarray, density: float | None) -> np.ndarray:
    """Return an array of which the largest entries are kept, as many as the density says; of equals the first."""
    kept = int((density or 0) * array.size)
    if kept == array.size:
        return array
    flat = array.reshape(-1)
    sparse = np.zeros_like(flat)
    if kept:
        places = np.argsort(-np.abs(flat), kind="stable")[:kept]
        sparse[places] = flat[places]
    return sparse.reshape(array.shape)


def _drawn(array: np.ndarray, density: float | None, key: Array | None) -> np.ndarray:
    """Return an array of which each entry is kept with this probability, and is as much larger then."""
    assert density is not None and key is not None
    return np.where(np.asarray(jax.random.bernoulli(key, density, array.shape)), array / density, 0)


def _of_one_shape(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Fill up arrays with zeros to the size of the largest along each axis."""
    shape = np.max([array.shape for array in arrays], 0)
    return [np.pad(array, [(0, n - own) for own, n in zip(array.shape, shape, strict=True)]) for array in arrays]
