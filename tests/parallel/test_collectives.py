"""Collectives on a weight, on four virtual devices: on one they do nothing, and no fault in them shows."""

import pytest

from tests.devices import run_on


@pytest.mark.by_day_on("newest")
def test_weights_that_are_gathered_and_passed_on_by_hand_are_as_merged_ones():
    said = run_on(4, "tests.collective_program", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    assert said.count("right: ") == 18
