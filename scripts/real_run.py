"""Measure the real training step of a large decoder of random weights: tokens a second, memory, and use of the device.

    python scripts/real_run.py                                     # Llama 3.1 8B in bfloat16, 4,096 tokens: 40 GB
    python scripts/real_run.py --base nf4 --length 16384 --attention cudnn
    python scripts/real_run.py --base nf4 --by peft                # PEFT and bitsandbytes on torch, the same sizes
    python scripts/real_run.py --model tiny --length 64            # to try it out, on a CPU

One case a process, for a device says how much of its memory was taken at most, and not since when. The step is that of
`rslora train`: AdamW, adapters on all matrices of the layers, remat, the loss of all tokens. Its FLOPs are the model's
(`train.step_flops`: what is computed again counts once). "of a product" is their rate over that of a large product of
random matrices in bfloat16 (float32 on a CPU), measured in the same process before the step. Memory is what lies there
before a step (base, adapters, moments, batch) and the step's temporaries by the compiler; of torch, the most that its
allocator held in a step. A row is an array of --length tokens of one text; with --packed, of so many texts, as training
data are, which not every attention can take. A line is added to --out/real.csv.
"""

import argparse
import csv
import dataclasses
import importlib.util
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rslora_jax as rslora
from rslora_jax import train
from rslora_jax.models.configs import LLAMA2_7B, LLAMA31_8B
from rslora_jax.models.decoder import REMAT_POLICIES, Decoder, DecoderConfig
from rslora_jax.models.decoder_config import ATTENTION
from rslora_jax.sites import from_paths, named_leaves
from rslora_jax.stored.quantize import kept_leaves

TINY = dataclasses.replace(LLAMA2_7B, vocab_size=96, width=64, mlp_width=160, num_layers=2, num_heads=4, num_kv_heads=2)
MODELS = {"llama-3.1-8b": LLAMA31_8B, "llama-2-7b": LLAMA2_7B, "tiny": TINY}
TOKENS = jax.ShapeDtypeStruct((1, 8), "int32")


def base_of(config: DecoderConfig, form: str) -> Any:
    """Return random weights, in a form: made and rounded one by one, so that one is there in full at most."""
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), TOKENS)
    leaves = named_leaves(shapes)
    kept = leaves if form == "bfloat16" else kept_leaves(leaves, None)
    made: dict[str, Any] = {}
    for n, (path, leaf) in enumerate(leaves.items()):
        if path.endswith("scale"):
            made[path] = jnp.ones(leaf.shape, leaf.dtype)
            continue
        made[path] = 0.02 * jax.random.normal(jax.random.key(n), leaf.shape, leaf.dtype)
        if path not in kept:
            made[path] = rslora.quantize({path: made[path]}, form, donate=True)[0][path]
    return from_paths(shapes, made)


def batch_of(config: DecoderConfig, a: argparse.Namespace) -> train.Batch:
    """Return rows of random tokens, all with loss: of one text, or packed."""
    shape = (a.rows, a.length)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, *shape), np.int32)
    text_T = np.arange(a.length) * max(a.packed, 1) // a.length
    places = (np.arange(a.length) - np.searchsorted(text_T, text_T), text_T + 1)
    return train.Batch(*tokens, np.ones(shape, np.float32), *(np.broadcast_to(x.astype("i4"), shape) for x in places))


def loss_of(a: argparse.Namespace) -> Any:
    """Return the loss of all tokens, by a model that is told of a row of one text that it is one."""
    loss = train.token_loss(a.length)

    def plain(run: Any, batch: train.Batch) -> Any:
        return loss(lambda tokens, *places, method: run(tokens, method=method), batch)

    return loss if a.packed else plain


def matrix_rate(size: int) -> float:
    """Return the FLOPs a second of products of random matrices, on this device."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    x, w = (jax.random.normal(jax.random.key(n), (size, size), dtype) / size**0.5 for n in range(2))
    product = jax.jit(jnp.matmul)
    seconds = timed(lambda y: product(y, w), x, steps=20, repeats=5)
    return 2 * size**3 / statistics.median(seconds)


def timed(step: Any, state: Any, steps: int, repeats: int) -> list[float]:
    """Return the seconds of a step in each repeat: of so many steps asked for at once, after a first."""
    state, took = jax.block_until_ready(step(state)), []
    for _ in range(repeats):
        begun = time.perf_counter()
        for _ in range(steps):
            state = step(state)
        jax.block_until_ready(state)
        took.append((time.perf_counter() - begun) / steps)
    return took


def wrapped(config: DecoderConfig, params: Any, a: argparse.Namespace) -> rslora.Lora:
    return rslora.wrap(Decoder(config).apply, params, TOKENS, config=rslora.LoraConfig(rank=a.rank, alpha=16))


def ours(config: DecoderConfig, a: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of this library's step."""
    begun = time.perf_counter()
    params = jax.block_until_ready(base_of(config, a.base))
    print(f"the base is there after {time.perf_counter() - begun:.0f} s", flush=True)
    lora, optimizer, batch = wrapped(config, params, a), optax.adamw(1e-4), batch_of(config, a)
    state = train.TrainState.create(lora.init(jax.random.key(1)), optimizer)
    batch = jax.tree.map(jnp.asarray, batch)
    begun = time.perf_counter()
    compiled = train.make_step(lora, loss_of(a), optimizer).lower(state, params, batch).compile()
    compile_s = time.perf_counter() - begun
    memory, device = compiled.memory_analysis(), jax.devices()[0]
    held = (device.memory_stats() or {}).get("bytes_in_use")
    held = held or sum(x.nbytes for x in jax.tree.leaves((params, state, batch)))
    losses = []

    def step(state: Any) -> Any:
        state, metrics = compiled(state, params, batch)
        losses.append(metrics["loss"])
        return state

    seconds = timed(step, state, a.steps, a.repeats)
    temporary = memory.temp_size_in_bytes
    figures = {"compile_s": round(compile_s, 1), "loss": float(losses[-1]), "version": f"jax {jax.__version__}"}
    return figures | {"seconds": seconds, "held": held, "temporary": temporary, "peak": held + temporary}


def write(path: Path, row: dict[str, Any]) -> None:
    """Add a line to a CSV, with the names over it where it is new."""
    is_new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*row])
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=MODELS, default="llama-3.1-8b", help="its sizes (%(default)s)")
    add("--layers", type=int, help="so many in place of all")
    add("--by", choices=("rslora", "peft"), default="rslora", help="this library, or PEFT on torch (%(default)s)")
    add("--base", choices=("bfloat16", "nf4", "int8"), default="bfloat16", help="what it is stored in (%(default)s)")
    for name, default in (("rows", 1), ("length", 4096), ("rank", 64), ("steps", 5), ("repeats", 3), ("packed", 0)):
        add(f"--{name}", type=int, default=default, help="(%(default)s)")
    add("--remat", choices=("none", "full", *REMAT_POLICIES), default="full", help="(%(default)s)")
    add("--attention", choices=ATTENTION, default="auto", help="(%(default)s)")
    add("--matrix", type=int, default=8192, help="width of the product that the rate is measured with (%(default)s)")
    add("--out", type=Path, default=Path("runs/real"), help="folder (%(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    a = parse(argv)
    needed = ("torch", "transformers", "peft", *(["bitsandbytes"] if a.base != "bfloat16" else []))
    if a.by == "peft" and (missing := [name for name in needed if not importlib.util.find_spec(name)]):
        print(f"left out: PEFT over {a.base}, which needs {', '.join(missing)}: pip install them")
        return
    sizes = dataclasses.replace(MODELS[a.model], remat=a.remat, attention=a.attention)
    config = dataclasses.replace(sizes, num_layers=a.layers or sizes.num_layers, max_len=max(a.length, sizes.max_len))
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), TOKENS)
    lora = wrapped(config, shapes, a)
    adapters = jax.eval_shape(lora.init, jax.random.key(0))
    flops = train.step_flops(lora, loss_of(a), shapes, adapters, batch_of(config, a))
    rate = matrix_rate(a.matrix)
    if a.by == "peft":
        from benchmarks import torch_real

        found = torch_real.measure(config, batch_of(config, a), a)
    else:
        found = ours(config, a)
    seconds = found.pop("seconds")
    step = statistics.median(seconds)
    row = {
        "device": jax.devices()[0].device_kind, "by": a.by, "model": a.model, "layers": config.num_layers,
        "base": a.base, "rows": a.rows, "length": a.length, "packed": a.packed, "rank": a.rank,
        "remat": a.remat, "attention": a.attention, "step_s": step, "least_s": min(seconds), "most_s": max(seconds),
        "tokens_per_second": a.rows * a.length / step, "flops": flops, "matrix_tflops": rate / 1e12,
        "of_a_product": flops / step / rate, "of_the_data_sheet": mfu(flops / step), **found,
    }  # fmt: skip
    write(a.out / "real.csv", row)
    print(
        f"{a.by}, {a.model}, {config.num_layers} layers, {a.base}, {a.rows} x {a.length} tokens, rank {a.rank}, remat "
        f"{a.remat}, attention {a.attention}, on {row['device']}, {found['version']}:\n  {step:.4g} s a step "
        f"({min(seconds):.4g} to {max(seconds):.4g}), {row['tokens_per_second']:,.0f} tokens/s; "
        f"{flops / step / 1e12:,.3g} TFLOP/s, {row['of_a_product']:.0%} of the {rate / 1e12:,.3g} of a product here; "
        f"{found['held'] / 1e9:.2f} GB held, {found['peak'] / 1e9:.2f} GB in a step"
    )


def mfu(rate: float) -> Any:
    """Return the part of the device's peak by its data sheet, as `rslora train` has it; "" where that is not known."""
    peak = train.peak_flops(jax.devices()[0])
    return rate / peak if peak else ""


if __name__ == "__main__":
    main()
