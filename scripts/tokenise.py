"""Measure how fast a data set becomes tokens: in one process, in worker processes, and from the cache.

    python scripts/tokenise.py [--examples 20000] [--workers 2] [--repeats 3]

The data are the built-in docstring pairs, repeated, with a number in each, so that no two are alike; the tokenizer is
SmolLM2's. Each run tokenises all of them, a worker's start included. The ways run in turn; medians and the spread
are printed, with the processors' time of all processes, which other programs on the machine change little. The tokens
of all ways are compared.
"""

import argparse
import dataclasses
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np

from rslora_jax import train
from rslora_jax.interop.gguf import find_smollm2, load_gguf
from rslora_jax.train.encode import Tokens
from rslora_jax.train.tokens import tokenise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    tokenizer = load_gguf(find_smollm2(), scan_layers=True).tokenizer
    pairs = itertools.islice(itertools.cycle(train.docstring_pairs("train")), arguments.examples)
    examples = [dataclasses.replace(pair, prompt=f"# {n}\n{pair.prompt}") for n, pair in enumerate(pairs)]
    characters = sum(len(example.prompt) + len(example.completion) for example in examples)
    print(f"{len(examples):,} examples, {characters:,} characters")

    with tempfile.TemporaryDirectory() as folder:
        ways: dict[str, Callable[[], Tokens]] = {
            "1 process": lambda: tokenise(tokenizer, examples, workers=1),
            f"{arguments.workers} workers": lambda: tokenise(tokenizer, examples, workers=arguments.workers),
            "cache": lambda: tokenise(tokenizer, examples, cache=folder),
        }
        expected = ways["cache"]()  # fills the cache
        times: dict[str, list[float]] = {name: [] for name in ways}
        busy: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.repeats):
            for name, run in ways.items():
                begun, busy_before = time.perf_counter(), sum(os.times()[:4])
                tokens = run()
                times[name].append(time.perf_counter() - begun)
                busy[name].append(sum(os.times()[:4]) - busy_before)
                for array, wanted in zip(tokens, expected, strict=True):
                    np.testing.assert_array_equal(array, wanted)
    count = len(expected.ids_N)
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        print(
            f"{name:10} {count / middle:12,.0f} tokens/s: {count:,} tokens in {middle:.2f} s "
            f"(from {min(seconds):.2f} to {max(seconds):.2f}), {statistics.median(busy[name]):.2f} s of processor"
        )


if __name__ == "__main__":
    main()
