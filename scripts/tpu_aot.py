"""Compile the benchmark's steps for a TPU, without a TPU, and compare FLOPs and memory with the count on paper.

    pip install ".[tpu-aot]"       # libtpu is large: an environment of its own is best
    JAX_PLATFORMS=cpu python scripts/tpu_aot.py
    JAX_PLATFORMS=cpu python scripts/tpu_aot.py --width 2048 --layers 1 --tokens 4096 --ranks 8,2048 --dtype float32

Nothing is run, and one chip of the topology is compiled for. A compile can take minutes, float32 most, and libtpu
lets only one process at a time use it. "to plan" is FLOPs over the floor's and the chosen orders' by the library's
own count; "to least" over the floor's and the least over all orders. It ends with exit status 1
where "to plan" is more than 2 % from 1, or the memory is more than that of the layers written by hand.
"""

import argparse
import collections
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to ask for its place

import benchmark
import jax
from benchmarks import measure, methods
from benchmarks.problem import Problem
from jax.experimental import topologies
from rich.console import Console
from rich.table import Table

from rslora_jax.transform import cost


def orders(problem: Problem) -> str:
    """Name the orders chosen: which parts go through the weight, and for how many weights."""
    plans = [cost.plan(s, problem.summable) for s in problem.sizes().values()]

    def name(p):
        return "+".join(n for n in ("forward", "dx", "factors", "keep") if getattr(p, n)) or "factored"

    return ", ".join(f"{n} x {count}" for n, count in collections.Counter(map(name, plans)).items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--topology", default="v5e:2x4", help="as libtpu names it (v5e:2x4)")
    add("--width", type=int, default=1024, help="(1024)")
    add("--layers", type=int, default=2, help="(2)")
    add("--tokens", type=benchmark.numbers, default=[512, 2048], help="tokens a step, several with commas (512,2048)")
    add("--length", type=int, default=512, help="tokens of a row (512)")
    add("--ranks", type=benchmark.numbers, default=[8, 64, 256, 1024], help="(8,64,256,1024)")
    add("--dtype", choices=measure.TOLERANCE, default="bfloat16", help="of weights and products (bfloat16)")
    arguments = parser.parse_args()
    arguments.mlp_width = arguments.heads = arguments.kv_heads = None
    config = benchmark.model_config(arguments)
    device = topologies.get_topology_desc(arguments.topology, platform="tpu").devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    sizes = f"width {config.width}, {config.num_layers} layers, {arguments.dtype}"
    table = Table(title=f"{device.device_kind}; {sizes}; JAX {jax.__version__}", caption="orders: parts x weights")
    for name in ("tokens", "rank", "method", "GFLOPs", "to plan", "to least", "temp MB", "orders"):
        table.add_column(name, justify="left" if name in ("method", "orders") else "right")
    wrong, console = [], Console()
    for tokens in arguments.tokens:
        for rank in arguments.ranks:
            problem = Problem(config, tokens, min(arguments.length, tokens), rank, 16.0, "tpu")
            figures = {}
            for method in ("floor", "rslora", "factored"):
                compiled = measure.lower(method, problem, methods.shapes(problem, sharding)).compile()
                flops, temp = figures[method] = measure.counted(compiled)
                plan, least = figures["floor"][0] + problem.planned(), figures["floor"][0] + problem.least(method)
                ours = method == "rslora"
                done = f"{flops / 1e9:.4g} GFLOPs, {temp / 1e6:.1f} MB"
                console.print(f"{tokens} tokens, rank {rank}, {method}: {done}")
                table.add_row(
                    *(str(tokens), str(rank), method, f"{flops / 1e9:.4g}"),
                    *(f"{flops / plan:.3f}" if ours else "", f"{flops / least:.3f}", f"{temp / 1e6:.1f}"),
                    orders(problem) if ours else "",
                )
                if ours and abs(flops / plan - 1) > 0.02:
                    wrong.append(f"{tokens} tokens, rank {rank}: {flops / plan:.3f} times the planned FLOPs")
            if figures["rslora"][1] > figures["factored"][1]:
                ratio = figures["rslora"][1] / figures["factored"][1]
                wrong.append(f"{tokens} tokens, rank {rank}: {ratio:.3f} times the memory of layers written by hand")
            table.add_section()
    Console(width=max(console.width, 125)).print(table)
    for text in wrong:
        console.print(text)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
