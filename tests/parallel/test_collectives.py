"""Collectives on a weight, on four virtual devices: on one they do nothing, and no fault in them shows."""

from tests.devices import run_on


def test_weights_that_are_gathered_and_passed_on_by_hand_are_as_merged_ones():
    said = run_on(4, "tests.collective_program", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    assert said.count("right: ") == 18
