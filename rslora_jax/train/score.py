"""How good a model is on held-out examples: its loss with a standard error, and its answers."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rslora_jax.pytrees import Params
from rslora_jax.train.batches import Batch, Rows, heldout_batches
from rslora_jax.train.loss import states, token_losses
from rslora_jax.train.metrics import perplexity
from rslora_jax.train.ratio import ratio
from rslora_jax.train.tokens import Progress


@dataclasses.dataclass(frozen=True, eq=False)
class Losses:
    """Hold what each of E examples lost: `sums_E` in nats, over `tokens_E` tokens with loss; both float64."""

    sums_E: np.ndarray
    tokens_E: np.ndarray

    @property
    def mean(self) -> float:
        """The loss of a token, as training reports it."""
        return ratio(self.sums_E, self.tokens_E).value

    @property
    def error(self) -> float:
        """The standard error of `mean` over examples, as `ratio` has it; NaN of one example."""
        return ratio(self.sums_E, self.tokens_E).error

    @property
    def perplexity(self) -> float:
        """exp of `mean`."""
        return perplexity(self.mean)

    @property
    def perplexity_error(self) -> float:
        """The standard error of `perplexity`, to first order."""
        return self.perplexity * self.error

    def minus(self, other: Losses) -> Losses:
        """Give the differences of two models on the same examples: their error is that of a paired comparison.

        >>> ours, theirs = Losses(np.array([2.0, 6.0]), np.array([1.0, 3.0])), Losses(np.ones(2), np.array([1.0, 3.0]))
        >>> ours.minus(theirs).mean
        1.5
        """
        return Losses(self.sums_E - other.sums_E, self.tokens_E)


def losses(
    apply: Callable[..., Any], variables: Params, rows: Rows, *, batch_size: int, progress: Progress | None = None
) -> Losses:
    """Score a `rslora_jax.models.Decoder` on prepared examples.

    Args:
      apply: the model, `apply(variables, tokens, positions, segments, method=...)`; it is part of what is compiled.
      variables: whatever pytree it takes, such as (base, adapters).
      rows: from `prepare`.
      batch_size: rows that are scored together.
      progress: called with (batches done, batches in all).
    """
    tokens_S = np.array([float(encoded.is_learnt_N[1:].sum()) for encoded in rows.sequences])
    sums_S = np.zeros(len(rows.sequences))
    batches = heldout_batches(rows, batch_size=batch_size)
    score = _make_score(apply, rows.places, max(map(len, rows.rows)))
    for number in range(len(batches)):
        sums_BxK = np.asarray(score(variables, batches[number]), np.float64)
        members = rows.rows[number * batch_size : (number + 1) * batch_size]
        for sums_K, row in zip(sums_BxK, members, strict=False):
            sums_S[list(row)] = sums_K[: len(row)]
        if progress:
            progress(number + 1, len(batches))
    count = max(rows.owners) + 1
    by_example = functools.partial(np.bincount, rows.owners, minlength=count)
    return Losses(by_example(weights=sums_S), by_example(weights=tokens_S))


@functools.lru_cache(maxsize=2)  # a program takes tens of megabytes
def _make_score(apply: Callable[..., Any], places: int, segments: int) -> Callable[[Any, Batch], Array]:
    """Make the compiled `score(variables, batch)`: the summed loss of each row's examples, float32 (B, segments).

    As in `token_loss`, the product with the vocabulary is made at `places` tokens of each row only.
    """

    @jax.jit
    def score(variables: Params, batch: Batch) -> Array:
        run = functools.partial(apply, variables)
        x_BxTxD = states(run, batch)
        mask_BxP, at_BxP = jax.lax.top_k(jnp.asarray(batch.loss_mask_BxT), min(places, x_BxTxD.shape[1]))

        def chosen(values: Any) -> Array:
            return jnp.take_along_axis(jnp.asarray(values), at_BxP, axis=1)

        x_BxPxD = jnp.take_along_axis(x_BxTxD, at_BxP[..., None], axis=1)
        found_BxP = token_losses(functools.partial(run, method="head"), x_BxPxD, chosen(batch.targets_BxT))
        losses_BxP = jnp.where(mask_BxP > 0, found_BxP, 0)
        # Segments count from 1; what belongs to none has no loss.
        own_BxPxK = chosen(batch.segment_ids_BxT)[..., None] == 1 + jnp.arange(segments)
        return jnp.sum(losses_BxP[..., None] * own_BxPxK, axis=1)

    return score


@dataclasses.dataclass(frozen=True)
class Matches:
    """Say how many answers of how many were right."""

    right: int
    examples: int

    @property
    def rate(self) -> float:
        """The part that was right."""
        return self.right / self.examples

    @property
    def error(self) -> float:
        """The standard error of `rate`: that of a mean of zeros and ones; NaN of one example.

        >>> Matches(right=1, examples=5).error
        0.2
        """
        return math.sqrt(self.rate * (1 - self.rate) / (self.examples - 1)) if self.examples > 1 else math.nan


def count_matches(answers: Sequence[str], wanted: Sequence[str]) -> Matches:
    """Count the answers that match what is wanted. See `is_match`."""
    return Matches(sum(map(is_match, answers, wanted)), len(wanted))


def is_match(answer: str, wanted: str) -> bool:
    """Say whether an answer is right, as GSM8K counts it: by the number after "####" alone.

    GSM8K (Cobbe et al., arXiv 2110.14168) ends each solution in "#### <number>", and an answer is right when its
    first such number is that of the solution: its authors' `extract_answer` (openai/grade-school-math,
    grade_school_math/dataset.py) takes the number and drops its commas. Here, blanks, a "$" and a dot at the end are
    dropped too, and numbers are compared as numbers: 18, $18, 18.00 and "18." are one. An answer without "####" is
    wrong, whatever number it has. Where what is wanted has no "####" the whole texts are compared, but for blanks.

    >>> is_match("18 - 2 = 16\\n#### $1,016.00", "So many.\\n#### 1016"), is_match("It is 16.", "#### 16")
    (True, False)
    >>> is_match(" Paris ", "Paris")
    True
    """
    if "####" not in wanted:
        return " ".join(answer.split()) == " ".join(wanted.split())
    found, right = _final_number(answer), _final_number(wanted)
    return found is not None and found == right


def _final_number(text: str) -> Decimal | None:
    """Give the number after the first "####" that has one, exactly; None where there is none.

    >>> _final_number("#### -1,234.50 apples"), _final_number("#### none")
    (Decimal('-1234.50'), None)
    """
    found = re.search(r"####\s*(-?\s*\$?\s*-?[\d.,]+)", text)
    if not found:
        return None
    try:
        return Decimal(re.sub(r"[\s$,]", "", found[1]).rstrip("."))
    except InvalidOperation:
        return None
