"""Optimisers that try adapters out, on a mesh and by pmap: all devices agree, and are where one device would be."""

import json

import numpy as np
import pytest

from tests.devices import run_on
from tests.optimizer_program import OPTIMIZERS

pytestmark = [pytest.mark.nightly, pytest.mark.xdist_group("meshes")]
FIRST = ["lbfgs", "hessian", "noisy_sgd"]  # each of another kind


@pytest.mark.parametrize("names", [FIRST, sorted({*OPTIMIZERS} - {*FIRST})])
def test_many_devices_take_the_step_of_one(names):
    said = run_on(4, "tests.optimizer_program", *names, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    found = json.loads(said.splitlines()[-1])
    assert list(found) == names
    for name, ways in found.items():
        one = ways["one"]["adapters"]
        for way, got in ways.items():
            for path, want in one.items():
                np.testing.assert_allclose(
                    got["adapters"][path], want, atol=1e-5 * np.abs(want).max(), err_msg=f"{name}, {way}, {path}"
                )
            assert got.get("same", True), f"{name}, {way}: the devices have different adapters"
            assert got.get("compiled", 1) == 1, f"{name}, {way}"
