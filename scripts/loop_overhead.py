"""Measure what the training loop adds to its steps: to those of an accelerator, or to real ones on this machine.

    python scripts/loop_overhead.py                      # a fake device, 20 ms a step: half a minute
    python scripts/loop_overhead.py --milliseconds 5 --steps 2000
    python scripts/loop_overhead.py --real [--steps 20]  # SmolLM2's own steps on this machine

The fake device takes so long for a step and none of the host's cores; it counts for how long it had nothing to do,
which is what a loop costs. All before it is real: `fit` with its defaults and event files, packed batches of 16 rows of
2,048 tokens out of some thousand rows by grain, the transfer, a compiled step with adapters and AdamW, the bar. "held"
is the same with the host held up for 50 ms in every twentieth batch, as by a slow disk. What other processes take of
the machine counts too: medians of the turns are printed with their spread, and the processor time of a step.

With --real the bare run calls the compiled step on batches made beforehand, and waits once at the end; the other run is
`fit` without evaluation. They take turns, from the same adapters; medians and the spread are printed.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from benchmarks.fake_device import FakeDevice

import rslora_jax as rslora
from rslora_jax import train
from rslora_jax.interop.gguf import find_smollm2, load_gguf
from rslora_jax.models.decoder import Decoder
from rslora_jax.train.bytelevel import ByteTokenizer

ROWS, LENGTH = 16, 2048


class HeldUp:
    """Batches of which every twentieth takes a while longer."""

    def __init__(self, batches: Any, seconds: float):
        self.batches, self.seconds = batches, seconds

    def __getitem__(self, n: int) -> Any:
        if n % 20 == 19:
            time.sleep(self.seconds)
        return self.batches[n]


def packed_rows() -> train.Rows:
    """Return some thousand full rows of examples of all lengths, as of chats."""
    lengths = np.clip(np.random.default_rng(0).lognormal(4.8, 0.8, 40000).astype(int), 8, LENGTH - 8)
    examples = [train.Example("q" * (n // 2), "a" * (n - n // 2)) for n in lengths.tolist()]
    return train.prepare(ByteTokenizer(), examples, max_len=LENGTH, workers=1)


def small_problem() -> tuple[Any, Any, Any]:
    """Return (a wrapped model of 32 small matrices, its parameters, a loss that takes all of a batch)."""
    params = {f"layer_{n}": jnp.eye(8) for n in range(32)}

    def fn(params: Any, x: Any) -> Any:
        for w in params.values():
            x = x @ w
        return x

    def loss(run: Any, batch: train.Batch) -> tuple[Any, Any]:
        x = jnp.stack([jnp.mean(jnp.asarray(part, jnp.float32)) for part in batch])
        return jnp.sum(run(jnp.tile(x[:1], (1, 8))) ** 2), jnp.sum(batch.loss_mask_BxT)

    config = rslora.LoraConfig(rank=2, alpha=3)
    return rslora.wrap(fn, params, jnp.ones((1, 8)), config=config), params, loss


def on_a_fake_device(milliseconds: float, steps: int, repeats: int) -> None:
    """Print the cost of the loop by how the host is held up."""
    lora, params, loss = small_problem()
    rows = packed_rows()
    print(rows.statistics)
    batches = train.train_batches(rows, batch_size=ROWS)
    adapters, optimizer = lora.init(jax.random.key(0)), optax.adamw(1e-3)
    print(f"{milliseconds:g} ms a step, {steps} steps; device {jax.devices()[0].device_kind}, JAX {jax.__version__}")
    print(f"{'':8}{'costs':>22}{'of it outside of saves':>26}{'processor':>12}")
    for name, given in (("fit", batches), ("held", HeldUp(batches, 0.05))):
        costs, apart, spent = [], [], []
        for turn in range(repeats + 1):
            device = FakeDevice(milliseconds / 1e3)
            with tempfile.TemporaryDirectory() as folder, device.in_place():
                begun = time.process_time()
                train.fit(
                    lora, params, adapters, batches=given, loss=loss, optimizer=optimizer,
                    steps=steps, folder=Path(folder) / "run", tensorboard=True,
                )  # fmt: skip
                took = time.process_time() - begun
            if turn:  # the first compiles and imports
                saves = range(-(-steps // 4) - 1, steps, -(-steps // 4))
                costs.append(sum(device.idle) / steps / device.seconds)
                others = [idle for n, idle in enumerate(device.idle) if n not in saves]
                apart.append(sum(others) / steps / device.seconds)
                spent.append(1e3 * took / steps)
        shown = f"{100 * statistics.median(costs):.2f} % ({100 * min(costs):.2f}, {100 * max(costs):.2f})"
        print(f"{name:8}{shown:>22}{100 * statistics.median(apart):>24.2f} %{statistics.median(spent):>9.2f} ms")


def on_this_machine(steps: int, repeats: int) -> None:
    """Print what `fit` adds to SmolLM2's compiled step here."""
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
                lora, variables, adapters, batches=batches, loss=loss, optimizer=optimizer,
                steps=count, folder=Path(folder) / "run", save_every=count,
            )  # fmt: skip
        return sum(record["seconds"] for record in result.records) / count

    bare(1), looped(1)  # compile
    compare({"bare step": bare, "fit": looped}, steps, repeats)


def compare(runs: dict[str, Callable[[int], float]], steps: int, repeats: int) -> None:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(run(steps))
    for name, seconds in times.items():
        low, high = min(seconds), max(seconds)
        print(f"{name:10} {statistics.median(seconds):.3f} s a step (from {low:.3f} to {high:.3f})")
    extra = statistics.median(times["fit"]) / statistics.median(times["bare step"]) - 1
    print(f"the loop adds {100 * extra:.1f} % (median of {repeats} runs of {steps} steps)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="SmolLM2's steps on this machine")
    parser.add_argument("--milliseconds", type=float, default=20.0, help="of the fake device's step (%(default)s)")
    parser.add_argument("--steps", type=int, help="(20 with --real, else 400)")
    parser.add_argument("--repeats", type=int, default=3, help="(%(default)s)")
    a = parser.parse_args()
    if a.real:
        on_this_machine(a.steps or 20, a.repeats)
    else:
        on_a_fake_device(a.milliseconds, a.steps or 400, a.repeats)


if __name__ == "__main__":
    main()
