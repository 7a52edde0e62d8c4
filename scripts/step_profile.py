"""Show where a training step's time goes on a GPU, with adapters and without: its kernels, by what they are for.

    python scripts/step_profile.py --preset 7b --layers 2 --ranks 64,2048
    python scripts/step_profile.py --preset 1b --layers 4 --ranks 8 --top 20   # and the 20 dearest kernels of each

The step is that of `scripts/benchmark.py`. The kernels run one after the other, so the sum is the time that the GPU
is busy; it is read from three steps after a pause, while the clock of a long run may be lower: compare its parts.
"""

import argparse
import os

# Command buffers hide which kernel is whose.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
from benchmarks import measure, trace
from benchmarks.problem import PRESETS, Problem, make_data
from rich.console import Console
from rich.table import Table

from rslora_jax.models.decoder import DecoderConfig


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="7b", help="layers of Llama 3.2 1B, Llama 2 7B or tiny, in bfloat16 (7b)")
    add("--layers", type=int, default=2, help="(2)")
    add("--tokens", type=int, default=4096, help="tokens a step, in rows of 512 (4096)")
    add("--ranks", default="64", help="several with commas (64)")
    add("--top", type=int, default=0, help="show so many of the dearest kernels too (0)")
    return parser.parse_args()


def main() -> None:
    arguments, console = parse(), Console(width=150)
    if jax.default_backend() != "gpu":
        console.print("JAX finds no GPU here, and of a CPU these are the instructions of several threads.")
    sizes = PRESETS[arguments.preset]
    config = DecoderConfig(
        vocab_size=1,
        width=sizes["width"],
        mlp_width=sizes["mlp_width"],
        num_layers=arguments.layers,
        num_heads=sizes["heads"],
        num_kv_heads=sizes["kv_heads"],
        param_dtype="bfloat16",
        dtype="bfloat16",
    )
    columns = {}
    for rank in map(int, arguments.ranks.split(",")):
        problem = Problem(config, arguments.tokens, min(512, arguments.tokens), rank, 16.0)
        data = make_data(problem)
        for method in ("floor", "rslora"):
            title = method if method == "floor" else f"{method}, rank {rank}"
            if title in columns:
                continue
            compiled = measure.lower(method, problem, data.arguments).compile()
            found = columns[title] = trace.kernels(compiled, data.arguments)
            for kernel in found[: arguments.top]:
                console.print(f"{title}: {1e6 * kernel.seconds:8.1f} us  {kernel.name}  {kernel.source}", markup=False)
    of = f"{arguments.preset}, {arguments.layers} layers, {jax.devices()[0].device_kind}"
    table = Table(title=f"Microseconds of a step's kernels: {of}")
    table.add_column("what for")
    for title in columns:
        table.add_column(title, justify="right")
    parts = {title: trace.by_kind(found) for title, found in columns.items()}
    for kind in trace.KINDS:
        table.add_row(kind, *(f"{1e6 * seconds[kind]:.0f}" for seconds in parts.values()))
    table.add_row("all", *(f"{1e6 * sum(seconds.values()):.0f}" for seconds in parts.values()))
    console.print(table)


if __name__ == "__main__":
    main()
