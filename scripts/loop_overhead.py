"""Measure what the training loop adds to the bare compiled step, on the real model and data.

    python scripts/loop_overhead.py [--steps 20] [--repeats 3]

The bare run calls the compiled step on the same batches, made beforehand, and waits once at the end. The other run
is `fit` as a user calls it: batches made on the way, metrics written, the bar drawn; without evaluation, and its
checkpoints timed apart. Both start from the same adapters and run in turn; medians and the spread are printed.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax
import optax

import rslora_jax as rslora
from rslora_jax import train
from rslora_jax.interop.gguf import find_smollm2, load_gguf
from rslora_jax.models.decoder import Decoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    steps = arguments.steps

    config, variables, tokenizer = load_gguf(find_smollm2(), scan_layers=True, dequantize=True)
    tokens = jax.ShapeDtypeStruct((1, 8), "int32")
    lora = rslora.wrap(Decoder(config).apply, variables, tokens, config=rslora.LoraConfig(rank=32, alpha=16))
    rows = train.prepare(tokenizer, train.docstring_pairs("train")[:400], max_len=256)
    batches = train.train_batches(rows, batch_size=2)
    loss, optimizer = train.token_loss(rows.places), optax.adam(1e-3)
    adapters = lora.init(jax.random.key(0))
    step = train.make_step(lora, loss, optimizer)

    def bare(count: int) -> float:
        state = train.TrainState.create(adapters, optimizer)
        ready = [batches[n] for n in range(count)]
        begun = time.perf_counter()
        for batch in ready:
            state, _ = step(state, variables, batch)
        jax.block_until_ready(state)
        return (time.perf_counter() - begun) / count

    def looped(count: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            result = train.fit(
                lora,
                variables,
                adapters,
                batches=batches,
                loss=loss,
                optimizer=optimizer,
                steps=count,
                folder=Path(folder) / "run",
                save_every=count,
            )
        return sum(record["seconds"] for record in result.records) / count

    bare(1), looped(1)  # compile
    times: dict[str, list[float]] = {"bare step": [], "fit": []}
    for _ in range(arguments.repeats):
        times["bare step"].append(bare(steps))
        times["fit"].append(looped(steps))
    for name, seconds in times.items():
        low, high = min(seconds), max(seconds)
        print(f"{name:10} {statistics.median(seconds):.3f} s a step (from {low:.3f} to {high:.3f})")
    extra = statistics.median(times["fit"]) / statistics.median(times["bare step"]) - 1
    print(f"the loop adds {100 * extra:.1f} % (median of {arguments.repeats} runs of {steps} steps)")


if __name__ == "__main__":
    main()
