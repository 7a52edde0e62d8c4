"""Real processes on loopback: they train as one does, write each checkpoint once, and stop together."""

import functools
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from rslora_jax.store import checkpoint
from tests.train.tiny import Run

pytestmark = [
    pytest.mark.by_day_on("newest"),
    pytest.mark.xdist_group("meshes"),
    pytest.mark.usefixtures("compile_fast"),
]


def processes(number, devices, *arguments):
    """Run tests/process_program.py in so many processes and return what each printed."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-m", "tests.process_program", str(port), str(number)]
    running = [
        subprocess.Popen(
            [*command, str(n), *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(number)
    ]
    try:
        said = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * number, said[0][1][-3000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


@functools.cache
def alone(folder):
    return Run().fit(folder, 8)


def same_as_alone(found, folder):
    want = alone(folder)
    losses = [r["loss"] for r in want.records if "loss" in r]
    for process in found:
        np.testing.assert_allclose(process["losses"], losses[: process["step"]], rtol=2e-5)
    if found[0]["step"] == 8:
        np.testing.assert_allclose(found[0]["heldout"], list(want.heldout.values()), rtol=2e-5)
        import jax

        for got, x in zip(found[0]["adapters"], jax.tree.leaves(want.adapters), strict=True):
            np.testing.assert_allclose(got, np.ravel(x), atol=2e-3)  # Adam, as in test_meshes


@pytest.mark.nightly
def test_two_processes_are_stopped_together_and_one_goes_on_alone(tmp_path, tmp_path_factory):
    """A SIGTERM to the second process alone, at step 4; then one process, on another mesh, takes up what they left."""
    whole = tmp_path_factory.mktemp("alone")
    found = processes(2, 2, tmp_path, 8, "fsdp=2,tensor=2", 4)
    assert [process["rows"] for process in found] == [[0, 2], [2, 4]]
    assert {process["devices"] for process in found} == {4}
    assert {process["signal"] for process in found} == {15}
    assert 4 < found[0]["step"] == found[1]["step"] < 8
    assert checkpoint.steps_in(tmp_path)[-1] == found[0]["step"]
    same_as_alone(found, whole)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, found[0]["step"] + 1))
    checkpoint.load_adapters(tmp_path, params=Run().params)

    (found,) = processes(1, 4, tmp_path, 8, "data=4", "resume")
    assert found["step"] == 8 and found["rows"] == [0, 4]
    same_as_alone([found], whole)


@pytest.mark.nightly
@pytest.mark.parametrize("mesh", ["data=4", "data=2,tensor=2", "fsdp=4", "fsdp=2,tensor=2"])
def test_four_processes(mesh, tmp_path, tmp_path_factory):
    found = processes(4, 1, tmp_path, 8, mesh)
    rows = {"data=4": 1, "fsdp=4": 1}.get(mesh, 2)
    assert [process["rows"][1] - process["rows"][0] for process in found] == [rows] * 4
    assert sorted({n for process in found for n in range(*process["rows"])}) == [0, 1, 2, 3]
    same_as_alone(found, tmp_path_factory.mktemp("alone"))
    assert checkpoint.steps_in(tmp_path)[-1] == 8


@pytest.mark.nightly
def test_a_folder_that_cannot_be_used_is_refused_by_every_process(tmp_path):
    Run().fit(tmp_path, 2)
    with pytest.raises(AssertionError, match="already holds a run, at step 2"):
        processes(2, 1, tmp_path, 8, "data=2")
