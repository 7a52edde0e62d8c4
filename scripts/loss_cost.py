"""Measure cross-entropy with its gradients: memory and time of its forms by length, from hidden states to the loss.

    python scripts/loss_cost.py                                   # Llama 3.1 8B's head, 4,096 to 16,384 tokens: a GPU
    python scripts/loss_cost.py --width 576 --vocabulary 49152 --dtype float32 --lengths 512,2048     # SmolLM2's

One row, a frozen head, the value and the gradient of the hidden states. "chunks" is the loss of `train.token_loss`,
with logits of some tokens at a time, and "all" the same with those of all tokens at once. Each takes its turn in every
repeat; medians. Memory is the compiled program's temporaries. How far the gradients differ is shown.
"""

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rslora_jax.train import token_loss
from rslora_jax.train.batches import Batch


def gradient(form: str, hidden: Any, head: Any, batch: Batch) -> tuple[Any, int]:
    """Return (a function that gives value and gradient, the bytes of the program's temporaries)."""
    length = hidden.shape[1]
    loss = token_loss(length, chunk=None if form == "chunks" else length)

    def value(hidden: Any, head: Any) -> Any:
        def run(x: Any, *_: Any, method: str) -> Any:
            return hidden if method == "hidden" else (x @ head).astype(jnp.float32)

        return loss(run, batch)[0]

    program = jax.jit(jax.value_and_grad(value)).lower(hidden, head).compile()
    return lambda: jax.block_until_ready(program(hidden, head)), program.memory_analysis().temp_size_in_bytes


def measure(length: int, a: argparse.Namespace) -> None:
    """Print the lines of a length."""
    keys = jax.random.split(jax.random.key(length), 3)
    hidden = jax.random.normal(keys[0], (1, length, a.width), a.dtype)
    head = (jax.random.normal(keys[1], (a.width, a.vocabulary), jnp.float32) / a.width**0.5).astype(a.dtype)
    tokens = jax.random.randint(keys[2], (1, length), 0, a.vocabulary)
    batch = Batch(tokens, tokens, jnp.ones((1, length)), tokens, tokens + 1)
    found: dict[str, tuple[Any, int]] = {}
    for form in ("chunks", "all"):
        try:
            found[form] = gradient(form, hidden, head, batch)
            found[form][0]()
        except jax.errors.JaxRuntimeError as error:  # all logits have no room
            found.pop(form, None)
            print(f"{length:>6}  {form:<8}{str(error).splitlines()[0][:80]}")
    times: dict[str, list[float]] = {form: [] for form in found}
    for _ in range(a.repeats):
        for form, (run, _) in found.items():
            begun = time.perf_counter()
            run()
            times[form].append(1e3 * (time.perf_counter() - begun))
    for form, (_, size) in found.items():
        took = times[form]
        shown = f"{statistics.median(took):.1f} ({min(took):.1f}, {max(took):.1f})"
        print(f"{length:>6}  {form:<8}{size / 1e6:>10.1f} MB{shown:>28}", flush=True)
    if len(found) == 2:
        one, other = (np.asarray(run()[1], np.float32) for run, _ in found.values())
        print(f"        gradients differ by {np.abs(one - other).max() / np.abs(other).max():.1e} of the largest")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="4096,8192,16384", help="tokens (%(default)s)")
    for name, default in (("width", 4096), ("vocabulary", 128256), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default, help="(%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="(%(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    a = parse(argv)
    print(f"width {a.width}, vocabulary {a.vocabulary}, {a.dtype}, {jax.devices()[0].device_kind}")
    print(f"{'tokens':>6}  {'form':<8}{'temporaries':>13}{'ms (least, most)':>28}")
    for length in map(int, a.lengths.split(",")):
        measure(length, a)


if __name__ == "__main__":
    main()
