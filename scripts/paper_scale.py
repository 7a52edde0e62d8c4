"""Compile steps of large decoders for TPU slices, without one: the paper's own, long rows, and a base in few bits.

    pip install ".[tpu-aot]"       # libtpu is large: an environment of its own is best
    JAX_PLATFORMS=cpu python scripts/paper_scale.py
    JAX_PLATFORMS=cpu python scripts/paper_scale.py --missing    # what an earlier run did not come to
    JAX_PLATFORMS=cpu python scripts/paper_scale.py --ask --missing --models "Llama 3.3 70B"  # memory alone: seconds
    JAX_PLATFORMS=cpu python scripts/paper_scale.py --models "Llama 3.1 8B" --bases nf4
    JAX_PLATFORMS=cpu python scripts/paper_scale.py --topology v5e:4x4 --mesh fsdp=4,tensor=4 --ranks 64 --out .

The paper's is Llama 2 7B at rank 64 and 2048, 32 rows of 512 tokens; the others are Llama 3.1 8B and Llama 3.3 70B at
rank 64, over a base in bfloat16 and in NF4, a row of 2,048 or 4,096 tokens on each device; 8B with rows of 8,192 by
what is kept for the backward pass, and of 2,048 to 131,072 on the eight chips of one host by each form of attention.
Nothing is run and no weight is made: the arguments are shapes that say where they lie. The step is that of
`rslora_jax.train` with AdamW. A compile takes some minutes. Results go to `scale.csv` and to the tables in `README.md`;
a run replaces its own lines there, each as soon as it is compiled. It ends with exit status 1 where the step gathers
base weights that the base alone does not or moves more than its adapters explain, a device holds more than it has, or a
case that is said to fit does not.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to ask for its place

import jax
from benchmarks import hlo, scale, scale_report
from benchmarks.scale_report import PAPER, Row
from jax.experimental import topologies
from rich.console import Console
from rich.table import Table

from rslora_jax.models.configs import LLAMA2_7B, LLAMA31_8B, LLAMA33_70B
from rslora_jax.models.decoder import REMAT_POLICIES
from rslora_jax.parallel import sharding

# What the compiler leaves to a program of a chip's 16 and 95 GB.
MEMORY = {"TPU v5 lite": 15.75 * 2**30, "TPU v5": 95.74 * 2**30}


MODELS = {PAPER: LLAMA2_7B, "Llama 3.1 8B": LLAMA31_8B, "Llama 3.3 70B": LLAMA33_70B}


@dataclasses.dataclass(frozen=True)
class Case:
    """One step to compile, and whether it must fit (None: find out)."""

    topology: str
    mesh: str
    rank: int
    remat: str = "full"
    activations: str = "by rows"
    adapters: str = "as weights"
    model: str = PAPER
    base: str = "bfloat16"
    rows: int = 32
    length: int = 512
    attention: str = "pallas"  # what "auto" is on a TPU
    fits: bool | None = None


ONE = "v5p:2x2x1"  # four chips, of which a mesh of one device takes one
SPLIT: dict[str, Any] = {"adapters": "rank too"}
FREE: dict[str, Any] = {"activations": "free", "attention": "xla"}  # a kernel would have to be told of the mesh
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
    *(
        Case("v5e:2x4", mesh, 64, remat, model="Llama 3.1 8B", rows=rows, length=length, attention=attention)
        for length, mesh, rows, remat, attentions in (
            (2048, "fsdp=8", 8, "full", ("pallas", "chunked", "xla")),
            (8192, "fsdp=8", 8, "full", ("pallas", "chunked", "xla")),
            (32768, "fsdp=8", 8, "full", ("pallas", "chunked")),
            (32768, "fsdp=8", 8, "offload", ("pallas",)),
            (32768, "fsdp=4,tensor=2", 4, "full", ("pallas",)),
            (49152, "fsdp=8", 8, "offload", ("pallas",)),
            (65536, "tensor=8", 1, "offload", ("pallas",)),
            (131072, "tensor=8", 1, "offload", ("pallas",)),
        )
        for attention in attentions
    ),
    *(
        Case(*place, 64, model="Llama 3.1 8B", base=base, rows=rows, length=length, fits=fits)
        for length in (2048, 4096)
        for *place, base, rows, fits in (
            ("v5e:2x2", "fsdp=1", "nf4", 1, True),
            ("v5e:2x2", "fsdp=1", "bfloat16", 1, None),
            (ONE, "fsdp=1", "bfloat16", 1, True),
            ("v5e:2x2", "fsdp=4", "bfloat16", 4, True),
        )
    ),
    *(
        Case(*place, 64, model="Llama 3.3 70B", base=base, rows=rows, length=2048, fits=fits, **adapters)
        for *place, adapters, rows, base, fits in (
            ("v5e:4x4", "fsdp=16", SPLIT, 16, "nf4", True),
            ("v5e:4x4", "fsdp=16", SPLIT, 16, "bfloat16", None),
            ("v5e:4x4", "fsdp=4,tensor=4", {}, 4, "nf4", True),
            ("v5e:4x4", "fsdp=4,tensor=4", {}, 4, "bfloat16", None),
            ("v5e:2x4", "fsdp=8", SPLIT, 8, "nf4", None),
            ("v5e:2x2", "fsdp=4", SPLIT, 4, "nf4", None),
            (ONE, "fsdp=1", {}, 1, "nf4", None),
        )
    ),
    *(
        Case(*place, 64, remat, model="Llama 3.1 8B", rows=rows, length=8192, fits=fits)
        for *place, rows, remats in (
            (ONE, "fsdp=1", 1, {"none": None, "products": None, "full": True, "offload": True}),
            ("v5e:2x2", "fsdp=4", 4, {"products": None, "full": True, "offload": True}),
        )
        for remat, fits in remats.items()
    ),
)


def key(case: Case) -> tuple[str, ...]:
    """Return what a case's line is found by."""
    return tuple(str(x) for x in dataclasses.astuple(case)[: scale_report.KEY])


ORDER = [key(case) for case in CASES]


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


def make_job(case: Case, layers: int | None = None, devices: Sequence[Any] | None = None) -> scale.Job:
    """Return the step of a case.

    Args:
      case: which.
      layers: how many, in place of the model's own number.
      devices: by default those of its topology, described.
    """
    devices = devices or topologies.get_topology_desc(case.topology, platform="tpu").devices
    model = MODELS[case.model]
    config = dataclasses.replace(
        model,
        remat=case.remat,
        num_layers=layers or model.num_layers,
        attention=case.attention,  # by name: "auto" is by the machine that compiles
        max_len=max(case.length, model.max_len),
    )
    sizes = math.prod(int(n) for n in re.findall(r"=(\d+)", case.mesh))
    mesh = sharding.make_mesh(case.mesh, devices[:1] if sizes == 1 else devices)
    pin, split = case.activations == "by rows", case.adapters == "rank too"
    base = None if case.base == "bfloat16" else case.base
    return scale.Job(
        config, mesh, case.rank, case.rows, case.length, pin=pin, split_rank=split, platform="tpu", base=base
    )


def compile_row(case: Case, job: scale.Job, base: tuple[int, int] | None, seconds: float, made: Any) -> Row:
    """Put the figures of one case together; `made` is from `make`."""
    device, n = job.mesh.devices.flat[0].device_kind, job.mesh.devices.size
    arguments = scale.bytes_on_a_device((job.state, job.params, job.batch))
    counts = temp = total = None
    if isinstance(made, int):
        temp, total = made - arguments, made
    elif not isinstance(made, str):
        counts, memory = hlo.count(made.as_text()), made.memory_analysis()
        inputs = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        temp = memory.temp_size_in_bytes
        total = inputs + temp + memory.generated_code_size_in_bytes
    return Row(
        **{name: value for name, value in dataclasses.asdict(case).items() if name != "fits"},
        device=device,
        devices=n,
        adapter_parameters=job.lora.num_parameters,
        argument_bytes=arguments,
        temp_bytes=temp,
        total_bytes=total,
        memory_bytes=int(MEMORY[device]),
        complaint=made if isinstance(made, str) else "",
        flops=counts and counts.flops,
        flops_by_hand=job.flops()[1] // n,
        kernel_flops=job.kernel_flops // n,
        flops_xla=None if counts is None else made.cost_analysis()["flops"],
        collectives=summary(counts) if counts else "",
        moved_bytes=counts and sum(c.bytes for c in counts.collectives),
        base_moved_bytes=base and base[0],
        weights_gathered=counts and weight_gathers(counts, job.params),
        base_weights_gathered=base and base[1],
        compile_s=round(seconds, 1),
        jax=jax.__version__,
        host_bytes=None if counts is None else made.memory_analysis().host_temp_size_in_bytes,
    )


def compiled_or_not(lowered: Any) -> Any:
    """Compile, and return the program or, where memory is short, the bytes that the compiler asks for (None)."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # The compiler calls them temporaries, but the arguments are among them.
        needs = re.search(r"[Uu]sed ([\d.]+)G|HLO temporaries \(([\d.]+)G\)", str(error))
        return None if needs is None else int(float(needs[1] or needs[2]) * 2**30)


def make(job: scale.Job, ask: bool) -> Any:
    """Compile a step: return the program, or what the compiler says against it.

    With `ask` it is only asked how many bytes a step needs on a device, and they are returned if there are as many. It
    is given a device with less than a GiB left, and refuses within seconds.
    """
    room = int(MEMORY[job.mesh.devices.flat[0].device_kind])
    beside = room >> 30 << 30 if ask else 0
    found = compiled_or_not(job.train_step(beside))
    if found is None:
        return "does not fit"
    if not isinstance(found, int):
        return found
    needs = found - beside
    return needs if ask and needs <= room else f"needs {needs / 1e9:.1f} GB"


def wrong(case: Case, row: Row) -> list[str]:
    """Return what is not as it must be."""
    name = f"{case.model} {case.base}, {case.topology} {case.mesh} rank {case.rank}"
    found = []
    if case.fits and row.total_bytes is None:
        found.append(f"{name}: said to fit and does not: {row.complaint}")
    if row.total_bytes is not None and row.total_bytes > row.memory_bytes:
        found.append(f"{name}: {row.total_bytes / 1e9:.2f} GB on a device of {row.memory_bytes / 1e9:.2f} GB")
    if row.base_weights_gathered is not None and (row.weights_gathered or 0) > row.base_weights_gathered:
        more = (row.weights_gathered or 0) - row.base_weights_gathered
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
    add("--ranks", help="of every adapter, with commas; in the tables, which cases (all)")
    add("--models", help=f"which, with commas: {', '.join(MODELS)}")
    add("--bases", help="which, with commas: bfloat16, nf4, int8, float8")
    add("--attention", help="which, with commas: pallas, chunked, xla (all)")
    add("--missing", action="store_true", help="only what the file has no line of")
    add(
        "--ask", action="store_true", help="ask the compiler how much memory a step needs, in seconds, and compile none"
    )
    add("--topology", help="one slice as libtpu names it, in place of the tables' own cases")
    add("--mesh", help="its axes by name, such as fsdp=4,tensor=4 (fsdp=-1)", default="fsdp=-1")
    add("--remat", choices=("none", "full", *REMAT_POLICIES), default="full", help="with --topology (full)")
    add("--free", action="store_true", help="with --topology: let XLA place the activations")
    add("--split-rank", action="store_true", help="with --topology: let adapters lie along their rank too")
    add("--batch", type=int, default=32, help="with --topology: rows of a batch (32)")
    add("--length", type=int, default=512, help="with --topology: tokens of a row (512)")
    add("--layers", type=int, help="in place of the model's own")
    add("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "scale", help="(docs/scale)")
    return out


def chosen(arguments: argparse.Namespace) -> list[Case]:
    """Return the cases that the command line names."""

    def listed(text: str | None) -> list[str]:
        return text.split(",") if text else []

    models, bases, ranks = listed(arguments.models), listed(arguments.bases), listed(arguments.ranks)
    cases: Sequence[Case] = CASES
    if arguments.topology:
        how = ["free" if arguments.free else "by rows", "rank too" if arguments.split_rank else "as weights"]
        size, attention = (arguments.batch, arguments.length), arguments.attention or "pallas"
        cases = [
            Case(arguments.topology, arguments.mesh, int(rank), arguments.remat, *how, model, base, *size, attention)
            for model in models or [PAPER]
            for base in bases or ["bfloat16"]
            for rank in ranks or ["64", "2048"]
        ]
    done = {row.key for row in scale_report.read_csv(arguments.out / "scale.csv")} if arguments.missing else set()
    wanted = ((models, "model"), (bases, "base"), (ranks, "rank"), (listed(arguments.attention), "attention"))
    return [
        case
        for case in cases
        if key(case) not in done and all(not of or str(getattr(case, name)) in of for of, name in wanted)
    ]


def main() -> None:
    arguments = parser().parse_args()
    console, bases, found, rows, sections = Console(), {}, [], [], []
    for case in chosen(arguments):
        job = make_job(case, arguments.layers)
        with console.status(" ".join(key(case))):
            begun = time.process_time()  # the compiler has one thread, and what else the machine does is not its time
            made = make(job, arguments.ask)
            seconds, base = time.process_time() - begun, None
            same = dataclasses.replace(case, rank=0, adapters="", fits=None)
            if not isinstance(made, str | int) and job.mesh.devices.size > 1 and case.model == PAPER:
                if same not in bases:
                    counts = hlo.count(job.base_step().compile().as_text())
                    moved = sum(c.bytes for c in counts.collectives)
                    bases[same] = (moved, weight_gathers(counts, job.params))
                base = bases[same]
        row = compile_row(case, job, base, seconds, made)
        found += wrong(case, row)
        sections = list(dict.fromkeys([*sections, row.section]))
        arguments.out.mkdir(parents=True, exist_ok=True)
        rows = scale_report.merge_csv(
            arguments.out / "scale.csv", [row], ORDER
        )  # at once: a compile is long, and the next may be cut off
        scale_report.update_page(arguments.out / "README.md", rows)
        head, (line,) = scale_report.table([row], row.section)
        console.print("; ".join(f"{name}: {cell}" for name, cell in zip(head, line, strict=True) if cell))
    for section in sections:
        head, lines = scale_report.table(rows, section)
        shown = Table(*head, title=f"{section}; JAX {jax.__version__}")
        for line in lines:
            shown.add_row(*line)
        Console(width=max(console.width, 200)).print(shown)
    for text in found:
        console.print(text)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
