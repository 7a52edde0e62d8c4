"""Starts on several devices."""

import pytest

from tests.devices import run_on

pytestmark = pytest.mark.nightly


@pytest.mark.parametrize("names", ["pissa olora", "lora_ga eva"])
def test_on_a_mesh_all_is_as_on_one_device_and_lies_as_the_base_does(names):
    said = run_on(4, "tests.starts.mesh_program", *names.split(), JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    assert "all held on 4 devices" in said
