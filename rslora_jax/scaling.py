"""How the adapter's product is scaled: gamma as a function of rank and alpha."""

import math
from collections.abc import Callable, Mapping

_SCALINGS: Mapping[str, Callable[[int], float]] = {
    "rslora": lambda rank: 1 / math.sqrt(rank),
    "lora": lambda rank: 1 / rank,
    "constant": lambda rank: 1.0,
}


def gamma(rank: int, alpha: float, scaling: str | Callable[[int], float] = "rslora") -> float:
    """Return the factor gamma on an adapter's product A B.

    `"rslora"` gives alpha / sqrt(rank), the only order of growth in the rank under which every
    adapter's output and gradient keep their size (arXiv 2312.03732, eq. 4 and theorem 3.2);
    `"lora"` gives alpha / rank; `"constant"` gives alpha. A callable maps rank to gamma / alpha.

    >>> gamma(rank=64, alpha=16)
    2.0
    >>> gamma(rank=64, alpha=16, scaling="lora")
    0.25
    >>> gamma(rank=16, alpha=3, scaling=lambda rank: rank**-0.25)
    1.5
    """
    if callable(scaling):
        return alpha * scaling(rank)
    if scaling not in _SCALINGS:
        raise ValueError(f"scaling={scaling!r} is not known: use one of {', '.join(_SCALINGS)}, or a function")
    return alpha * _SCALINGS[scaling](rank)
