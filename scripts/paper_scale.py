"""Compile the paper's own step, Llama 2 7B at rank 64 and 2048, for TPU slices, without one.

    pip install ".[tpu-aot]"       # libtpu is large: an environment of its own is best
    JAX_PLATFORMS=cpu python scripts/paper_scale.py
    JAX_PLATFORMS=cpu python scripts/paper_scale.py --topology v5e:4x4 --mesh fsdp=4,tensor=4 --ranks 64 --out .

Nothing is run and no weight is made: the arguments are shapes that say where they lie. The step is that of
`rslora_jax.train` with AdamW, a batch of 32 rows of 512 tokens. A compile takes a minute or two. Results go to
`scale.csv` and to the table in `README.md`; a run replaces its own lines there. It ends with exit
status 1 where the step gathers base weights that the base alone does not or moves more than its adapters explain, a
device holds more than it has, or a case that is said to fit does not.
"""

import argparse
import collections
import dataclasses
import itertools
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to ask for its place

import jax
from benchmarks import hlo, scale, scale_report
from benchmarks.scale_report import Row
from jax.experimental import topologies
from rich.console import Console
from rich.table import Table

from rslora_jax.models.configs import LLAMA2_7B
from rslora_jax.models.decoder import REMAT_POLICIES
from rslora_jax.parallel import sharding

# What the compiler leaves to a program of a chip's 16 and 95 GB.
MEMORY = {"TPU v5 lite": 15.75 * 2**30, "TPU v5": 95.74 * 2**30}


@dataclasses.dataclass(frozen=True)
class Case:
    """One step to compile, and whether it must fit (None: find out)."""

    topology: str
    mesh: str
    rank: int
    remat: str = "full"
    activations: str = "by rows"
    adapters: str = "as weights"
    fits: bool | None = None


ONE = "v5p:2x2x1"  # four chips, of which a mesh of one device takes one
SPLIT: dict[str, Any] = {"adapters": "rank too"}
FREE: dict[str, Any] = {"activations": "free"}
CASES = (
    Case(ONE, "fsdp=1", 64, fits=True),
    Case("v5e:2x2", "fsdp=4", 64, fits=True),
    Case("v5e:4x4", "fsdp=16", 64, fits=True),
    Case("v5e:4x4", "fsdp=16", 64, "none", fits=True),
    Case("v5e:4x4", "fsdp=16", 64, **FREE),
    Case(ONE, "fsdp=1", 2048),
    Case("v5e:4x4", "fsdp=16", 2048),
    Case("v5e:4x4", "fsdp=4,tensor=4", 2048),
    Case("v5e:2x4", "fsdp=8", 2048, fits=True, **SPLIT),
    Case("v5e:4x4", "fsdp=16", 2048, fits=True, **SPLIT),
    Case("v5e:4x4", "fsdp=16", 2048, "none", **SPLIT),
)


ORDER = [tuple(str(x) for x in dataclasses.astuple(case)[:6]) for case in CASES]


def weight_gathers(counts: hlo.Counts, params: Any) -> int:
    """Return the bytes of base weights, of a layer or of a stack, that all-gathers make on a device."""
    found = set()
    for leaf in jax.tree.leaves(params):
        local = leaf.sharding.shard_shape(leaf.shape)
        for sizes in itertools.product(*({n, m} for n, m in zip(leaf.shape, local, strict=True))):
            split = [axis for axis, (n, m) in enumerate(zip(leaf.shape, local, strict=True)) if n != m]
            if leaf.ndim > 1 and any(sizes[axis] == leaf.shape[axis] for axis in split):
                found |= {tuple(sorted(sizes)), tuple(sorted(sizes[1:]))} if leaf.ndim > 2 else {tuple(sorted(sizes))}

    def plain(sizes):
        return tuple(sorted(n for n in sizes if n != 1))

    gathers = [c for c in counts.collectives if c.kind == "all-gather"]
    return sum(c.bytes for c in gathers if any(plain(sizes) in found for _, sizes in c.shapes))


def summary(counts: hlo.Counts) -> str:
    """Return the collectives of a step by kind, with their number and the bytes they make on a device."""
    times, size = collections.Counter(), collections.Counter()
    for one in counts.collectives:
        times[one.kind] += one.times
        size[one.kind] += one.bytes
    return ", ".join(f"{kind} {times[kind]:,} ({size[kind] / 1e9:.3g} GB)" for kind in hlo.KINDS if times[kind])


def make_job(case: Case, arguments: argparse.Namespace) -> scale.Job:
    devices = topologies.get_topology_desc(case.topology, platform="tpu").devices
    config = dataclasses.replace(
        LLAMA2_7B, remat=case.remat, dtype=arguments.dtype, param_dtype=arguments.dtype, num_layers=arguments.layers
    )
    sizes = math.prod(int(n) for n in re.findall(r"=(\d+)", case.mesh))
    mesh = sharding.make_mesh(case.mesh, devices[:1] if sizes == 1 else devices)
    pin, split = case.activations == "by rows", case.adapters == "rank too"
    return scale.Job(
        config, mesh, case.rank, arguments.batch, arguments.length, pin=pin, split_rank=split, platform="tpu"
    )


def compile_row(case: Case, job: scale.Job, base: tuple[int, int] | None, seconds: float, compiled: Any) -> Row:
    """Put the figures of one case together; `compiled` is the program or what the compiler said against it."""
    device, n = job.mesh.devices.flat[0].device_kind, job.mesh.devices.size
    counts = memory = None
    if not isinstance(compiled, str):
        counts, memory = hlo.count(compiled.as_text()), compiled.memory_analysis()
    inputs = memory and memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Row(
        **{name: value for name, value in dataclasses.asdict(case).items() if name != "fits"},
        device=device,
        devices=n,
        adapter_parameters=job.lora.num_parameters,
        argument_bytes=scale.bytes_on_a_device((job.state, job.params, job.batch)),
        temp_bytes=memory and memory.temp_size_in_bytes,
        total_bytes=memory and inputs + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        memory_bytes=int(MEMORY[device]),
        complaint=compiled if isinstance(compiled, str) else "",
        flops=counts and counts.flops,
        flops_by_hand=job.flops()[1] // n,
        flops_xla=None if counts is None else compiled.cost_analysis()["flops"],
        collectives=summary(counts) if counts else "",
        moved_bytes=counts and sum(c.bytes for c in counts.collectives),
        base_moved_bytes=base and base[0],
        weights_gathered=counts and weight_gathers(counts, job.params),
        base_weights_gathered=base and base[1],
        compile_s=round(seconds, 1),
        jax=jax.__version__,
    )


def compiled_or_not(lowered: Any) -> Any:
    """Compile, and return the program or, where memory is short, what the compiler says it needs."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # The compiler calls them temporaries, but the arguments are among them.
        needs = re.search(r"[Uu]sed ([\d.]+)G|HLO temporaries \(([\d.]+)G\)", str(error))
        return "does not fit" if needs is None else f"needs {float(needs[1] or needs[2]) * 2**30 / 1e9:.1f} GB"


def wrong(case: Case, row: Row) -> list[str]:
    """Return what is not as it must be."""
    name = f"{case.topology} {case.mesh} rank {case.rank}"
    found = []
    if case.fits and row.flops is None:
        found.append(f"{name}: said to fit and does not: {row.complaint}")
    if row.total_bytes is not None and row.total_bytes > row.memory_bytes:
        found.append(f"{name}: {row.total_bytes / 1e9:.2f} GB on a device of {row.memory_bytes / 1e9:.2f} GB")
    if row.weights_gathered and row.weights_gathered > (row.base_weights_gathered or 0):
        more = row.weights_gathered - (row.base_weights_gathered or 0)
        found.append(f"{name}: gathers {more / 1e9:.3f} GB of base weights that the base alone does not")
    if row.moved_bytes is not None and row.base_moved_bytes is not None:
        # A weight may also be passed on in a ring, piece by piece. Adapters need no more than to be whole once in the
        # forward pass, its repetition and the backward pass, a sum of their gradients, and a little between the two.
        allowed, more = 5 * 2 * row.adapter_parameters, row.moved_bytes - row.base_moved_bytes
        if more > allowed:
            found.append(f"{name}: moves {more / 1e9:.3f} GB beside the base alone, more than {allowed / 1e9:.3f} GB")
    return found


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = out.add_argument
    add("--topology", help="one slice as libtpu names it, in place of the table's own cases")
    add("--mesh", help="its axes by name, such as fsdp=4,tensor=4 (fsdp=-1)", default="fsdp=-1")
    add(
        "--ranks",
        default="64,2048",
        help="of every adapter; or of the table's cases that are compiled (64,2048)",
    )
    add("--remat", choices=("none", "full", *REMAT_POLICIES), default="full", help="with --topology (full)")
    add("--free", action="store_true", help="with --topology: let XLA place the activations")
    add("--split-rank", action="store_true", help="with --topology: let adapters lie along their rank too")
    add("--batch", type=int, default=32, help="rows of a batch (32)")
    add("--length", type=int, default=512, help="tokens of a row (512)")
    add("--layers", type=int, default=32, help="(32)")
    add("--dtype", default="bfloat16", help="of weights and products (bfloat16)")
    add("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "scale", help="(docs/scale)")
    return out


def main() -> None:
    arguments = parser().parse_args()
    ranks = [int(r) for r in arguments.ranks.split(",")]
    cases = [case for case in CASES if case.rank in ranks]
    if arguments.topology:
        activations, adapters = (
            "free" if arguments.free else "by rows",
            "rank too" if arguments.split_rank else "as weights",
        )

        def of(rank):
            return Case(arguments.topology, arguments.mesh, rank, arguments.remat, activations, adapters)

        cases = [of(rank) for rank in ranks]
    console, bases, found = Console(), {}, []
    for case in cases:
        job = make_job(case, arguments)
        with console.status(f"{case.topology} {case.mesh} rank {case.rank}, {case.activations}, {case.adapters}"):
            begun = time.perf_counter()
            compiled = compiled_or_not(job.train_step())
            seconds, base = time.perf_counter() - begun, None
            key = (case.topology, case.mesh, case.remat, case.activations)
            if not isinstance(compiled, str) and job.mesh.devices.size > 1:
                if key not in bases:
                    counts = hlo.count(job.base_step().compile().as_text())
                    moved = sum(c.bytes for c in counts.collectives)
                    bases[key] = (moved, weight_gathers(counts, job.params))
                base = bases[key]
        row = compile_row(case, job, base, seconds, compiled)
        found += wrong(case, row)
        arguments.out.mkdir(parents=True, exist_ok=True)
        rows = scale_report.merge_csv(
            arguments.out / "scale.csv", [row], ORDER
        )  # at once: a compile is long, and the next may be cut off
        scale_report.update_page(arguments.out / "README.md", rows)
        head, (line,) = scale_report.table([row])
        console.print("; ".join(f"{name}: {cell}" for name, cell in zip(head, line, strict=True) if cell))
    head, lines = scale_report.table(rows)
    shown = Table(*head, title=f"Llama 2 7B, {arguments.batch} x {arguments.length} tokens; JAX {jax.__version__}")
    for line in lines:
        shown.add_row(*line)
    Console(width=max(console.width, 200)).print(shown)
    for text in found:
        console.print(text)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
