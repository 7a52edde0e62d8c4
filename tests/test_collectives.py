"""Collectives on a weight, on four virtual devices: on one they do nothing, and no fault in them shows."""

import os
import subprocess
import sys
from pathlib import Path


def test_weights_that_are_gathered_and_passed_on_by_hand_are_as_merged_ones():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    run = subprocess.run(
        [sys.executable, "-m", "tests.collective_program"],
        env={**os.environ, "XLA_FLAGS": flags},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("right: ") == 18
