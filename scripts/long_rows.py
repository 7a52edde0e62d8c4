"""Measure a training step of SmolLM2's shape by the length of its row: temporaries and time, before and after chunks.

    python scripts/long_rows.py                                  # 512 to 16,384 tokens, memory alone: three minutes
    python scripts/long_rows.py --time 3 --lengths 512,1024,2048 # and seconds of a step, the median of three
    python scripts/long_rows.py --time 1 --lengths 8192 --forms chunks

One row, rank 32 on all matrices, AdamW, remat "full". "chunks" is the step as it is: attention and the loss make scores
and logits some at a time. "all at once" is what it was before: attention "xla", and the logits of all tokens. Memory is
the compiled program's temporaries, and needs no room for them. The exponent is that of the last two lengths.
"""

import argparse
import dataclasses
import math
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.progress import track

import rslora_jax as rslora
from rslora_jax.models.decoder import Decoder, DecoderConfig
from rslora_jax.train import TrainState, make_step, token_loss
from rslora_jax.train.batches import Batch

SMOLLM2 = DecoderConfig(
    vocab_size=49152,
    width=576,
    mlp_width=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    scan_layers=True,
    remat="full",
)
FORMS = {"all at once": ("xla", True), "chunks": ("auto", False)}


def step_of(form: str, length: int, rank: int) -> tuple[Any, tuple[Any, ...]]:
    """Return a step and the shapes of its arguments."""
    attention, is_whole = FORMS[form]
    config = dataclasses.replace(SMOLLM2, attention=attention, max_len=length)
    model, tokens = Decoder(config), jax.ShapeDtypeStruct((1, 8), "int32")
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    lora = rslora.wrap(model.apply, params, tokens, config=rslora.LoraConfig(rank=rank))
    optimizer = optax.adamw(1e-4)
    state = jax.eval_shape(lambda: TrainState.create(lora.init(jax.random.key(0)), optimizer))
    loss = token_loss(length, chunk=length if is_whole else None)
    batch = Batch(*(jax.ShapeDtypeStruct((1, length), of) for of in ("int32", "int32", "float32", "int32", "int32")))
    return make_step(lora, loss, optimizer), (state, params, batch)


def seconds_of(step: Any, shapes: Any, repeats: int) -> float:
    """Return the median seconds of a step, of weights at random."""

    def filled(path: Any, leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return 0.02 * jax.random.normal(jax.random.key(len(path)), leaf.shape, leaf.dtype)
        return jnp.zeros(leaf.shape, leaf.dtype)

    state, params, batch = jax.tree_util.tree_map_with_path(filled, shapes)
    length = batch.tokens_BxT.shape[1]
    row = jnp.arange(length, dtype=jnp.int32)[None]
    batch = Batch(row % 999, row % 997, jnp.ones((1, length)), row, jnp.zeros_like(row))
    took = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        state, out = step(state, params, batch)
        jax.block_until_ready((state, out))
        took.append(time.perf_counter() - begun)
    return statistics.median(took[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192,16384", help="tokens (%(default)s)")
    parser.add_argument("--forms", default=",".join(FORMS), help="which (%(default)s)")
    parser.add_argument("--rank", type=int, default=32, help="(%(default)s)")
    parser.add_argument(
        "--time", type=int, default=0, metavar="N", help="time so many steps of each, too (%(default)s)"
    )
    a = parser.parse_args()
    lengths, forms = [int(n) for n in a.lengths.split(",")], a.forms.split(",")
    memory: dict[str, list[int]] = {form: [] for form in forms}
    console = Console()
    heads = [f"{form}: {what}" for form in forms for what in (["GB"] + ["s"] * bool(a.time))]
    lines = [["tokens", *heads], ["--:"] * (1 + len(heads))]
    for length in track(lengths, "compiling" if not a.time else "measuring", console=Console(stderr=True)):
        lines.append([f"{length:,}"])
        for form in forms:
            step, shapes = step_of(form, length, a.rank)
            memory[form].append(step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes)
            lines[-1].append(f"{memory[form][-1] / 1e9:.2f}")
            if a.time:
                lines[-1].append(f"{seconds_of(step, shapes, a.time):.2f}")
    for line in lines:
        console.print(f"| {' | '.join(line)} |", soft_wrap=True)
    for form, sizes in memory.items():
        if len(sizes) > 1:
            exponent = math.log(sizes[-1] / sizes[-2]) / math.log(lengths[-1] / lengths[-2])
            console.print(f"{form}: temporaries grow as the length to the power {exponent:.2f}")


if __name__ == "__main__":
    main()
