"""Scripts of the tests on several virtual devices, which JAX has to be told of before it starts."""

import os
import subprocess
import sys


def run_on(devices: int, module: str, *args: str, **environment: str) -> str:
    """Run a module of the tests as a script on virtual devices of the CPU; return what it prints."""
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-m", module, *args],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"} | environment,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout
