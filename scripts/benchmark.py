"""Measure a training step with rslora_jax beside other ways to do LoRA, on the same model, data and adapters.

    python scripts/benchmark.py                       # about 12 minutes on 2 CPU cores
    python scripts/benchmark.py --width 512 --tokens 512 --ranks 8,512 --repeats 3          # about a minute
    python scripts/benchmark.py --methods floor,rslora,qwix --dtype bfloat16
    python scripts/benchmark.py --preset 7b --tokens 4096 --methods floor,rslora,factored   # a GPU of 80 GB

A step is the value and the gradients of the adapters (float32) and of the layers' input; no optimiser. The model is
a stack of Llama layers of random weights, without table and head. Before a rank is timed, all methods are given the
same A and B, and must give the same loss and gradients. Methods take turns, so that a slow minute meets all alike.
What cannot be measured is a row that says why, and the others go on.

FLOPs and temporary bytes are the compiled program's; on a GPU, whose compiler does not count the products that it hands
to a library, the FLOPs of the products in the traced gradient; of torch, the FLOPs of its matrix products without
attention's, and the bytes on a GPU only. "to least" is FLOPs over the least: the floor's as compiled, and the
adapters' on paper over all orders; planned_flops in the CSV has in its place the count of the orders that rslora_jax
chooses. "TFLOP/s" is FLOPs over the step's time.
"trace s" is the time from the model to the lowered program, adapters put in; "compile s" is XLA's.

CSV, PNG and a Markdown table go to --out; the CSV is written after each rank, so that what is measured is kept.
"""

import argparse
import datetime
import os
from pathlib import Path
from typing import Any

# For torch to find room on a GPU beside JAX.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
from benchmarks import measure, methods, report
from benchmarks.problem import PRESETS, Data, Problem, make_data
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rslora_jax.models.decoder import DecoderConfig


def numbers(text: str) -> list[int]:
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise ValueError(text)
    return found


def names(text: str) -> list[str]:
    found = text.split(",")
    unknown = [name for name in found if name not in methods.METHODS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(methods.METHODS)}")
    return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    listed = "\n".join(f"  {name:9} {text}" for name, text in methods.METHODS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"methods:\n{listed}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--preset",
        choices=PRESETS,
        help="the layers of Llama 3.2 1B or Llama 2 7B, in bfloat16, 4096 tokens: a GPU; or tiny ones",
    )
    add("--width", type=int, default=1024, help="of the residual stream (1024)")
    add("--mlp-width", type=int, help="of the MLP (2.75 times the width)")
    add("--layers", type=int, default=2, help="(2)")
    add("--heads", type=int, help="query heads (one for each 64 of the width)")
    add("--kv-heads", type=int, help="key-value heads (as many)")
    add("--tokens", type=numbers, default=[512, 2048], help="tokens a step, several with commas (512,2048)")
    add("--length", type=int, default=512, help="tokens of a row: tokens / length rows make a step (512)")
    add("--ranks", type=numbers, default=[8, 64, 256, 1024, 2048], help="(8,64,256,1024,2048, up to the width)")
    add("--alpha", type=float, default=16.0, help="the scale is alpha / sqrt(rank) in every method (16)")
    add("--dtype", choices=measure.TOLERANCE, default="float32", help="of weights and products (float32)")
    add("--repeats", type=int, default=5, help="timings of each method at each rank, of 8 steps but on a CPU (5)")
    usual = [name for name in methods.METHODS if name not in methods.BY_NAME]
    said = f"several with commas (all that are installed, but {' and '.join(methods.BY_NAME)})"
    add("--methods", type=names, default=usual, help=said)
    add(
        "--out",
        type=Path,
        default=Path("runs/benchmark"),
        help="folder of benchmark.csv, .png and .md (runs/benchmark)",
    )
    chosen, _ = parser.parse_known_args(argv)
    if chosen.preset:
        parser.set_defaults(**PRESETS[chosen.preset], dtype="bfloat16", tokens=[4096])
    return parser.parse_args(argv)


def model_config(arguments: argparse.Namespace) -> DecoderConfig:
    heads = arguments.heads or max(1, arguments.width // 64)
    return DecoderConfig(
        vocab_size=1,  # the stack has no table
        width=arguments.width,
        mlp_width=arguments.mlp_width or 11 * arguments.width // 4,
        num_layers=arguments.layers,
        num_heads=heads,
        num_kv_heads=arguments.kv_heads or heads,
        param_dtype=arguments.dtype,
        dtype=arguments.dtype,
    )


def available(wanted: list[str], console: Console) -> list[str]:
    for name in wanted:
        if methods.missing(name):
            console.print(f"left out: {name}, which needs {', '.join(methods.missing(name))}: pip install them")
    return [name for name in wanted if not methods.missing(name)]


def prepare_all(problem: Problem, data: Data, wanted: list[str], kept: dict) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the methods ready to run, and why others are not; one in which no rank plays a part is compiled once."""
    ready, failed = {}, {}
    for name in wanted:
        try:
            made = kept.get(name) or prepare(name, problem, data)
            made.wait(made.step())
        except Exception as error:  # out of memory, or a change in another library: no reason to lose the others
            failed[name] = f"{type(error).__name__}: {[*str(error).splitlines(), ''][0]}"
            continue
        ready[name] = made
        if name not in methods.ADAPTED:
            kept[name] = made
    return ready, failed


def prepare(name: str, problem: Problem, data: Data) -> measure.Ready:
    if name in methods.ON_TORCH:
        from benchmarks import torch_peft

        return torch_peft.prepare(name, problem, data)
    return measure.prepare(name, problem, data)


def main(argv: list[str] | None = None) -> None:
    arguments, console = parse(argv), Console()
    config = model_config(arguments)
    wanted = available(arguments.methods, console)
    ranks = [rank for rank in arguments.ranks if rank <= config.width]
    if len(ranks) < len(arguments.ranks):
        console.print(f"ranks up to the width of {config.width}: {', '.join(map(str, ranks))}")
    device = jax.devices()[0]
    steps = 1 if device.platform == "cpu" else 8
    sizes = f"width {config.width}, {config.num_layers} layers, {arguments.dtype}"
    title = f"{sizes}; JAX {jax.__version__}, {device.device_kind}"
    facts = {
        "width": config.width,
        "mlp_width": config.mlp_width,
        "layers": config.num_layers,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "length": arguments.length,
        "dtype": arguments.dtype,
        "alpha": arguments.alpha,
        "steps": steps,
        "jax": jax.__version__,
        "platform": device.platform,
        "device": device.device_kind,
        "cores": os.cpu_count(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[report.Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left:"), TimeRemainingColumn(), console=console) as progress:
        # In tokens, so that the time left is right for steps of different sizes; a repeat more for the compiling.
        total = sum(arguments.tokens) * len(ranks) * len(wanted) * (arguments.repeats + 1)
        task = progress.add_task("", total=total)
        variables = None
        for tokens in arguments.tokens:
            kept: dict[str, Any] = {}
            for rank in ranks:
                problem = Problem(config, tokens, min(arguments.length, tokens), rank, arguments.alpha)
                progress.update(task, description=f"{tokens} tokens, rank {rank}: compile")
                data = make_data(problem, variables)
                variables = data.variables
                ready, failed = prepare_all(problem, data, wanted, kept)
                differences, wrong = measure.check(ready, arguments.dtype)
                failed |= wrong
                ready = {name: made for name, made in ready.items() if name not in failed}
                progress.update(task, advance=tokens * len(wanted))

                def advance(name: str, tokens: int = tokens, rank: int = rank) -> None:
                    progress.update(task, advance=tokens, description=f"{tokens} tokens, rank {rank}: {name}")

                timings = measure.in_turn(ready, arguments.repeats, steps, advance)
                floor = timings.get("floor")
                floor_flops = ready["floor"].flops if "floor" in ready else None
                new = [
                    report.make_row(problem, n, r, timings[n], floor, floor_flops, disagreement=differences.get(n))
                    for n, r in ready.items()
                ]
                rows += new + [report.Row(tokens, rank, name, why=why) for name, why in failed.items()]
                for name, why in failed.items():
                    console.print(f"not measured at {tokens} tokens, rank {rank}: {name}: {why}", markup=False)
                for r in new:
                    ratio = "" if r.to_floor is None else f", {r.to_floor:.2f} of the floor"
                    console.print(f"{tokens} tokens, rank {rank}, {r.method}: {r.step_s:.4g} s{ratio}")
                report.write_csv(arguments.out / "benchmark.csv", rows, facts)
    # A cut number is worse than a broken line.
    Console(width=max(console.width, 125)).print(report.table(rows, title))
    if report.busy(rows):
        count = f"{len(report.busy(rows))} of {len(rows)}"
        console.print(f"{count} rows vary by half or more: the machine was busy, measure those again")
    report.write_png(arguments.out / "benchmark.png", rows, title)
    (arguments.out / "benchmark.md").write_text(report.markdown(rows, title, facts))
    console.print(f"written: benchmark.csv, benchmark.png and benchmark.md in {arguments.out}")


if __name__ == "__main__":
    main()
