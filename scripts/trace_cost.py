"""Measure what adapters add to tracing and lowering, on a decoder of many layers.

    python scripts/trace_cost.py [--layers 32] [--repeats 5]

Each figure is the processor time of `jax.jit(f).trace(...).lower()` with JAX's caches emptied before, in turn for
the base model, for the wrapped one, and for the same adapters written into the layers by hand; medians, and the ratio
to the base with its spread. "whole" includes the base model's own trace, which `wrap` has made already and keeps: a
first call after `wrap` costs what "after wrap" says. The layers by hand are traced from the model, always in whole.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from benchmarks.methods import beside_kernels, factored_layers
from rich.console import Console
from rich.table import Table

import rslora_jax as rslora
from rslora_jax.models.decoder import Decoder, DecoderConfig


def seconds(fn: Callable, *args: object) -> float:
    """Return the processor time of tracing and lowering a function once."""
    begun = time.process_time()
    jax.jit(fn).trace(*args).lower()
    return time.process_time() - begun


def measure(config: DecoderConfig, change: Callable) -> tuple[float, float, float, float]:
    """Return the times of the base model, of the wrapped one after `wrap` and in all, and of layers by hand."""
    model, tokens = Decoder(config), jnp.ones((2, 16), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)

    def loss(params: dict, tokens: jax.Array) -> jax.Array:
        return model.apply(params, tokens).sum()

    def adapted(adapters: dict, params: dict, tokens: jax.Array) -> jax.Array:
        return lora.apply(params, adapters, tokens).sum()

    def by_hand(adapters: dict, params: dict, tokens: jax.Array) -> jax.Array:
        with factored_layers(gamma):
            return model.apply(beside_kernels(params, adapters, jnp.float32), tokens).sum()

    gamma = 7 / 3**0.5
    jax.clear_caches()
    base = seconds(change(loss), variables, tokens)
    jax.clear_caches()
    lora = rslora.wrap(model.apply, variables, tokens, config=rslora.LoraConfig(rank=3, alpha=7))
    adapters = jax.eval_shape(lora.init, jax.random.key(0))
    after = seconds(change(adapted), adapters, variables, tokens)
    jax.clear_caches()
    whole = seconds(change(adapted), adapters, variables, tokens)
    jax.clear_caches()
    return base, after, whole, seconds(change(by_hand), adapters, variables, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="layers of the decoder (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each figure (default %(default)s)")
    arguments = parser.parse_args()

    head = ("layers", "program", "base", "after wrap", "whole", "by hand")
    table = Table(*head, *(f"{name} / base" for name in head[3:]))
    small = {"vocab_size": 64, "width": 32, "mlp_width": 48, "num_heads": 4, "num_kv_heads": 2}
    for scan in (False, True):
        config = DecoderConfig(**small, num_layers=arguments.layers, scan_layers=scan)
        for name, change in (("forward", lambda f: f), ("gradient", jax.grad)):
            runs = [measure(config, change) for _ in range(arguments.repeats)]
            times = [f"{statistics.median(column):.2f} s" for column in zip(*runs, strict=True)]
            ratios = [[run[n] / run[0] for run in runs] for n in (1, 2, 3)]
            spreads = [f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in ratios]
            table.add_row(f"{arguments.layers} {'scanned' if scan else 'looped'}", name, *times, *spreads)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
