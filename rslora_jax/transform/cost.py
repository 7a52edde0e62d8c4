"""The one place that says in which order an adapted product is contracted, and why.

Counts are FLOPs (two for a multiply-add) from static shapes. For T rows of data, a weight of i x o and rank r:

=====================  =====================================  ==========================================
part                   factored                               through the weight
=====================  =====================================  ==========================================
value                  x A, (x A) B: 2Tr(i+o)                 W + A B: 2rio
gradient of x          dy B', (dy B') A': 2Tr(i+o)            the same sum: 0 if kept, else 2rio
gradients of A and B   2Tr(i+o), with x A and dy B' at hand   dW = x' dy: 2Tio, then 4rio
=====================  =====================================  ==========================================

The sum is kept from the forward to the backward pass where it is no larger than the x A (T x r) that the
factored order would keep; elsewhere it is formed twice, so that no copy of the base lives through a step.
A weight stored in fewer bits than float32 is never summed with its update, which the rounding would lose:
"through the weight" is then x W + x (A B), at 2Tio more.
"""

import dataclasses
import itertools
from collections.abc import Iterable

# Take another order than the factored one only if it saves more than this part of the adapter's FLOPs: it
# costs a pass over the weight's memory that the count does not see.
_MARGIN = 0.02


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which parts of a product go through the weight; the default is all factored.

    Attributes:
      value_alone: the value, where nothing is differentiated.
      forward, dx, factors: the value, the data's gradient and the factors' gradients in a training step.
      keep: keep the sum of weight and update from the forward to the backward pass.
    """

    value_alone: bool = False
    forward: bool = False
    dx: bool = False
    factors: bool = False
    keep: bool = False


@dataclasses.dataclass(frozen=True)
class Sizes:
    """FLOPs of the contractions a product can be made of, and the sizes of what it could keep.

    Attributes:
      base: x W, or its gradient dW = x' dy.
      meet: x with the first factor; also dA from (x, dy B').
      leave: the result with the second factor; also dy B', and dB from (x A, dy).
      full: the two factors with each other; also dA or dB from dW.
      kept_weight, kept_rows: numbers in the sum W + A B, and in x A.
    """

    base: int
    meet: int
    leave: int
    full: int
    kept_weight: int
    kept_rows: int


def flops(sizes: Sizes, plan: Plan, summable: bool) -> int:
    """Return the FLOPs of a training step's product beside the base's own value and data gradient."""
    s = sizes
    apart = 0 if summable else s.base
    total = s.full + apart if plan.forward else s.meet + s.leave
    if plan.dx:
        total += apart + (0 if plan.forward and plan.keep else s.full)
    else:
        total += s.leave + s.meet
    if plan.factors:
        return total + s.base + 2 * s.full
    have_xa, have_dyb = not plan.forward, not plan.dx
    return total + (0 if have_xa else s.meet) + (0 if have_dyb else s.leave) + s.meet + s.leave


def plan(sizes: Sizes, summable: bool) -> Plan:
    """Return the cheapest plan for a product; all factored where a size is a symbol, as `jax.export` has them.

    Args:
      sizes: FLOPs of its parts.
      summable: whether the weight is stored in a dtype in which its sum with the update keeps the update.

    >>> d, tokens, rank = 512, 2048, 128
    >>> met = 2 * tokens * rank * d
    >>> sizes = Sizes(2 * tokens * d * d, met, met, 2 * rank * d * d, d * d, tokens * rank)
    >>> plan(sizes, summable=True)
    Plan(value_alone=True, forward=True, dx=True, factors=False, keep=True)
    >>> plan(sizes, summable=False)
    Plan(value_alone=False, forward=False, dx=False, factors=False, keep=False)
    """
    if not all(isinstance(n, int) for n in vars(sizes).values()):
        return Plan()
    keep = sizes.kept_weight <= sizes.kept_rows
    apart = 0 if summable else sizes.base
    alone = sizes.full + apart < sizes.meet + sizes.leave
    options = [
        Plan(alone, forward, dx, factors, keep and (forward or dx))
        for forward, dx, factors in itertools.product((False, True), repeat=3)
    ]
    best = min(options, key=lambda p: flops(sizes, p, summable))
    saved = flops(sizes, Plan(), summable) - flops(sizes, best, summable)
    return best if saved > _MARGIN * flops(sizes, Plan(), summable) else Plan(alone)


def least(sizes: Iterable[Sizes], summable: bool = True) -> int:
    """Return the least FLOPs of several products beside the base's own, by the plans chosen here."""
    return sum(flops(s, plan(s, summable), summable) for s in sizes)
