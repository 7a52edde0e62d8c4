from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rslora_jax.train.packing import pack


@given(
    capacity=st.integers(1, 40),
    draws=st.lists(st.integers(0, 10**6), max_size=60),
    seed=st.integers(0, 2**32),
    window=st.integers(1, 70),
)
def test_every_example_is_in_one_row_and_no_row_overflows(capacity, draws, seed, window):
    lengths = [1 + draw % capacity for draw in draws]
    rows = pack(lengths, capacity, seed=seed, window=window)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[index] for index in row) <= capacity for row in rows)
    assert rows == pack(lengths, capacity, seed=seed, window=window)


@given(draws=st.lists(st.integers(1, 32), min_size=1, max_size=200), seed=st.integers(0, 100))
def test_the_rows_are_few(draws, seed):
    rows = pack(draws, 32, seed=seed)
    # No packing needs fewer than the ceiling; first-fit decreasing is within 11/9 of the best, plus a row.
    fewest = max(math.ceil(sum(draws) / 32), sum(length > 16 for length in draws))
    assert len(rows) <= math.ceil(fewest * 11 / 9) + 1 + sum(9 < length <= 16 for length in draws) // 2


def test_another_seed_gives_other_company():
    lengths = np.random.default_rng(0).integers(1, 100, size=300).tolist()
    assert pack(lengths, 100, seed=0) != pack(lengths, 100, seed=1)


def test_no_examples_need_no_rows():
    assert pack([], 8) == []


@pytest.mark.parametrize("lengths", [[3, 0], [3, 9]])
def test_a_length_that_fits_no_row_is_named(lengths):
    with pytest.raises(ValueError, match=r"example 1 has length \d, which is not in 1\.\.8"):
        pack(lengths, 8)


def test_a_window_of_nothing_is_refused():
    with pytest.raises(ValueError, match="window is 0"):
        pack([1], 8, window=0)
