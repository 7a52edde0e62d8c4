"""The error of a ratio of two sums, against scipy's, the formula term by term in exact fractions, and a simulation."""

import math
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings

from rslora_jax.train.ratio import ratio
from rslora_jax.train.score import Losses
from rslora_jax.train.sweep import mean_loss

UNITS = st.lists(st.tuples(st.integers(-1000, 1000), st.integers(1, 50)), min_size=2, max_size=12)


@settings(max_examples=200, deadline=None)
@given(UNITS)
def test_it_is_cochrans_and_that_of_the_losses_and_of_a_sweep(units):
    count, total = len(units), sum(n for _, n in units)
    value = Fraction(sum(s for s, _ in units), total)
    variance = Fraction(count, count - 1) * sum((s - value * n) ** 2 for s, n in units) / total**2
    found = ratio(*zip(*units, strict=True))
    assert found.value == pytest.approx(float(value), rel=1e-12, abs=1e-12)
    assert found.error == pytest.approx(math.sqrt(variance), rel=1e-9, abs=1e-9)
    sums, counts = np.array(units, float).T
    lost = Losses(sums, counts)
    assert (lost.mean, lost.error) == tuple(found) == tuple(mean_loss(np.array(units, float)))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20))
def test_with_one_in_each_unit_it_is_the_error_of_a_mean(values):
    want = (np.mean(values), scipy.stats.sem(values))
    assert ratio(values, np.ones(len(values))) == pytest.approx(want, rel=1e-9, abs=1e-9)


def test_it_is_how_far_the_ratio_strays(units=200, draws=4000):
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 60, (draws, units))
    sums = counts * 1.7 + rng.normal(size=(draws, units)) * np.sqrt(counts) * 3
    found = [ratio(s, c) for s, c in zip(sums, counts, strict=True)]
    strayed = np.std([one.value for one in found], ddof=1)
    assert np.mean([one.error for one in found]) == pytest.approx(strayed, rel=0.05)


def test_of_one_unit_there_is_no_error():
    assert ratio([3.0], [2]).value == 1.5 and math.isnan(ratio([3.0], [2]).error)
