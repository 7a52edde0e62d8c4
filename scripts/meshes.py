"""Train on meshes of eight virtual CPU devices, under pmap and across a resume, and compare with one device.

    python scripts/meshes.py                                    # the table, some minutes
    python scripts/meshes.py "fsdp=2,tensor=4" "data=8 then fsdp=4 of 4"

20 steps of AdamW on a small Llama. "losses" is the largest difference of a step's loss, relative; "adapters" the
largest of any of their numbers, absolute; "gathers" how many all-gathers of a weight's size or more the compiled step
has, and the base model's own step.
"""

import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests import mesh_program

WAYS = (
    "data=8",
    "fsdp=8",
    "data=2,fsdp=4",
    "data=4,tensor=2",
    "tensor=4,data=2",
    "data=2,fsdp=2,tensor=2",
    "pmap",
    "fsdp=4,tensor=2 then data=8",
    "data=2,fsdp=2,tensor=2 then fsdp=4 of 4",
)
SMALLEST_WEIGHT = 64 * 32


def compared(one: dict, many: dict) -> tuple[float, str, str, str]:
    """Return the columns of a line."""

    def relative(name):
        return np.abs(np.array(many[name]) / np.array(one[name])[-len(many[name]) :] - 1)

    adapters = max(np.abs(np.subtract(many["adapters"][path], want)).max() for path, want in one["adapters"].items())

    def large(name):
        return sum(size >= SMALLEST_WEIGHT for size in many[name])

    gathers = f"{large('gathers')}, {large('base_gathers')}" if "gathers" in many else ""
    held = f"{abs(many['heldout'][-1] / one['heldout'][-1] - 1):.1e}" if "heldout" in many else ""
    return relative("losses").max(), held, f"{adapters:.1e}", gathers


def main() -> int:
    if "-h" in sys.argv or "--help" in sys.argv:
        print(__doc__)
        return 0
    console = Console()
    table = Table("devices", "losses", "held-out", "adapters", "gathers: ours, base")
    one = mesh_program.train("one")
    worst = 0.0
    for way in track(sys.argv[1:] or WAYS, "training", console=console, transient=True):
        losses, *others = compared(one, mesh_program.train(way))
        table.add_row(way, f"{losses:.1e}", *others)
        worst = max(worst, losses)
    console.print(table)
    return 0 if worst < 2e-5 else 1


if __name__ == "__main__":
    sys.exit(main())
