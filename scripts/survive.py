"""Kill a training run again and again, at random moments, and compare what it learns with an unbroken run.

    python scripts/survive.py                 # 20 kills (SIGKILL), some minutes
    python scripts/survive.py --kills 100 --seed 3

A process trains adapters and saves every few steps. It is killed, from its start to the middle of a save, and started
again with `resume`, until it has been killed as often as asked; then it may end. Its adapters, its optimiser's state
and its metrics must be those of the unbroken run, bit for bit; the exit status is 1 where they are not.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # the compilation cache speaks of every program it loads

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import rslora_jax as rslora
from rslora_jax import train
from rslora_jax.models.decoder import Decoder, DecoderConfig
from rslora_jax.store import checkpoint
from rslora_jax.train.bytelevel import ByteTokenizer

CONFIG = DecoderConfig(
    vocab_size=258, width=48, mlp_width=96, num_layers=3, num_heads=4, num_kv_heads=2, scan_layers=True
)
SUMS = [train.Example(f"{a}+{b}=", f"{a + b}") for a in range(12) for b in range(12)]


def attempt(folder: Path, steps: int, save_every: int, asked: Any) -> None:
    """Train in a folder, from the start or from what is there; `asked` counts the batches taken."""
    jax.config.update("jax_compilation_cache_dir", str(folder.parent / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    model = Decoder(CONFIG)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    config = rslora.LoraConfig(rank=6, alpha=10)
    lora = rslora.wrap(model.apply, params, jnp.zeros((1, 4), jnp.int32), config=config)
    rows = train.prepare(ByteTokenizer(), SUMS[::2], max_len=24)
    held = train.prepare(ByteTokenizer(), SUMS[1::16], max_len=24)
    batches = train.train_batches(rows, batch_size=4)

    class Counted:
        def __getitem__(self, n: int) -> Any:
            asked.value += 1
            return batches[n]

    train.fit(
        *(lora, params, lora.init(jax.random.key(1))),
        batches=Counted(),
        heldout=train.heldout_batches(held, batch_size=4),
        loss=train.token_loss(max(rows.places, held.places)),
        optimizer=optax.adamw(3e-3),
        steps=steps,
        folder=folder,
        eval_every=50,
        save_every=save_every,
        resume=bool(checkpoint.steps_in(folder)),
        show=False,
    )


def contents(folder: Path) -> tuple[Any, Any]:
    """Return (a checksum of every array of the last checkpoint, the metrics that time has no part in)."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timeless = ("step", "loss", "grad_norm", "tokens", "heldout_loss")
    lines = [{name: line.get(name) for name in timeless} for line in lines]
    return checkpoint.load_about(folder)["checksums"], lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="(20)")
    parser.add_argument("--steps", type=int, help="of the run (60 for each kill)")
    parser.add_argument("--save-every", type=int, default=3, help="steps (3)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    arguments = parser.parse_args()
    arguments.steps = arguments.steps or 60 * arguments.kills
    moments, console = random.Random(arguments.seed), Console()
    # A child is a fork of a server that has imported what it needs, and has no threads, as the bar here has.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["jax", "optax", "rich", "rslora_jax.train", "rslora_jax.models.decoder"])
    table = Table("kill", "after", "from step", "saved step", "in a save", title="killed by SIGKILL")

    with tempfile.TemporaryDirectory() as parent:
        whole, broken = Path(parent, "whole"), Path(parent, "broken")

        def start(folder: Path) -> tuple[Any, Any]:
            asked = processes.RawValue("i", 0)  # without a lock, which a killed child would keep
            of = (folder, arguments.steps, arguments.save_every, asked)
            child = processes.Process(target=attempt, args=of, daemon=True)
            child.start()
            return child, asked

        child, _ = start(whole)
        child.join()
        killed = 0
        for number in track(range(1, arguments.kills + 1), "killing", console=console, transient=True):
            before = checkpoint.steps_in(broken)
            child, asked = start(broken)
            # The first save of a process takes as long as many steps, and comes after a few.
            steps = moments.randint(2, arguments.steps // arguments.kills // 2) if number % 5 else 0
            delay = moments.uniform(0, 0.2 if steps else 6.0)
            while child.is_alive() and asked.value < steps:
                time.sleep(0.01)
            time.sleep(delay)
            if not child.is_alive():
                break
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            killed += 1
            saved = checkpoint.steps_in(broken)
            saving = any("tmp" in path.name for path in (broken / "checkpoints").glob("*"))
            at = [str(s[-1]) if s else "none" for s in (before, saved)]
            after = f"{steps} steps and {delay:.2f} s" if steps else f"{delay:.2f} s from its start"
            table.add_row(str(number), after, *at, "yes" if saving else "")
        child, _ = start(broken)
        child.join()
        console.print(table)
        if checkpoint.steps_in(broken)[-1:] != [arguments.steps]:
            console.print(f"the last attempt failed with exit status {child.exitcode}")
            return 1
        same_arrays, same_metrics = (a == b for a, b in zip(contents(whole), contents(broken), strict=True))
    saves = sum(cell == "yes" for cell in table.columns[-1].cells)

    def same(equal):
        return "the same, bit for bit" if equal else "NOT the same"

    console.print(
        f"survived {killed} kills, {saves} of them in a save: after {arguments.steps} steps adapters and optimiser are "
        f"{same(same_arrays)}, metrics are {same(same_metrics)}"
    )
    return 0 if same_arrays and same_metrics else 1


if __name__ == "__main__":
    sys.exit(main())
