"""What a base in few bits costs: memory, time, loss and perplexity of SmolLM2, in each form beside the arrays.

    python scripts/quantised.py --steps 4            # to try it out: five minutes
    python scripts/quantised.py                      # the table of docs/quantised: half an hour on 2 quiet cores
    python scripts/quantised.py --model my-llama --data mine.jsonl --forms float32,nf4

Each form is a run of `rslora train` in a process of its own, with the same seed, data and settings: the weights of the
file as float32 and as bfloat16 arrays, rounded anew to int8 and NF4 as they are read, and the file's own blocks. "peak"
is the most memory that the process held; "loss" the largest difference of a step's loss from those over float32 arrays.
"step" is measured apart, as a machine is not equally fast for half an hour: --turns steps of the same batch by each
form in turn, all in one process, their median, and its ratio to that over float32 arrays, with the least and largest
of the turns. In --out are table.md and a folder for each run; what is there is not done again.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

FORMS = {
    "float32": ["--dequantize"],
    "bfloat16": ["--dequantize", "--param-dtype", "bfloat16"],
    "int8": ["--quantize", "int8"],
    "nf4": ["--quantize", "nf4"],
    "own": [],
}
LOADED: dict[str, dict[str, Any]] = {  # the same as arguments of `load_model`
    "float32": {"dequantize": True},
    "bfloat16": {"dequantize": True, "param_dtype": "bfloat16"},
    "int8": {"quantize": "int8"},
    "nf4": {"quantize": "nf4"},
    "own": {},
}
_PEAK = "import resource, sys; from rslora_jax.cli import main; code = main(sys.argv[1:]); "
_PEAK += "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024); sys.exit(code)"


def run(form: str, a: argparse.Namespace) -> dict[str, Any]:
    """Train with a base in one form and return the figures of the run."""
    folder = a.out / form
    kept = folder / "figures.json"
    if kept.exists():
        return json.loads(kept.read_text())
    given = ["train", "--out", str(folder), "--steps", str(a.steps), "--seed", "0", "--rank", str(a.rank)]
    given += [*(["--data", a.data] if a.data else []), *(["--model", a.model] if a.model else []), *FORMS[form]]
    done = subprocess.run([sys.executable, "-c", _PEAK, *given], capture_output=True, text=True, env=os.environ)
    if done.returncode:
        sys.exit(f"the run in {form} failed:\n{done.stderr[-2000:]}")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    heldout = [record["heldout_loss"] for record in records if "heldout_loss" in record]
    figures = {
        "losses": [record["loss"] for record in steps],
        "before": heldout[0],
        "after": heldout[-1],
        "peak": int(done.stdout.rsplit("peak ", 1)[1]),
    }
    kept.write_text(json.dumps(figures))
    return figures


def base_bytes(form: str, a: argparse.Namespace) -> int:
    """Return the bytes of the base in memory, loaded in a process of its own."""
    code = "import jax; from rslora_jax.interop import load_model; "
    code += f"print(sum(x.nbytes for x in jax.tree.leaves(load_model({a.model!r}, **{LOADED[form]!r}).variables)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    return int(done.stdout.split()[-1])


def steps_in_turn(forms: list[str], a: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of each turn's step by form, all of one batch as the runs have them."""
    import jax

    import rslora_jax as rslora
    from rslora_jax import train
    from rslora_jax.commands.heldout import Asked, split
    from rslora_jax.interop import load_model

    one = {}
    for form in forms:
        model = load_model(a.model, remat="products", **LOADED[form])
        rows = train.prepare(model.tokenizer, split(Asked(a.data)).training[:64], max_len=256)
        batch = next(iter(train.train_batches(rows, batch_size=2, seed=0)))
        config = rslora.LoraConfig(rank=a.rank, alpha=16.0)
        lora = rslora.wrap(model.apply, model.variables, jax.ShapeDtypeStruct((1, 8), "int32"), config=config)
        optimizer = train.make_optimizer("adamw", schedule=1e-4)
        state = train.TrainState.create(lora.init(jax.random.key(0), model.variables), optimizer)
        one[form] = [train.make_step(lora, train.token_loss(rows.places), optimizer), state, model.variables, batch]
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    for turn in range(a.turns + 1):
        for form, (step, state, params, batch) in one.items():
            begun = time.perf_counter()
            one[form][1], metrics = step(state, params, batch)
            jax.block_until_ready(metrics)
            if turn:  # the first compiles
                seconds[form].append(time.perf_counter() - begun)
    return seconds


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return the figures of all runs as Markdown."""
    lines = ["| base | in memory | peak | step | loss | perplexity before | after |", "|---|--:|--:|---|--:|--:|--:|"]
    exact = found.get("float32")
    for form, of in found.items():
        far = (
            ""
            if exact is None
            else f"{max(abs(x - y) for x, y in zip(of['losses'], exact['losses'], strict=True)):.1e}"
        )
        before, after = (f"{math.exp(of[name]):.2f}" for name in ("before", "after"))
        size, peak = f"{of['bytes'] / 1e6:.1f} MB", f"{of['peak'] / 1e9:.2f} GB"
        lines.append(f"| {form} | {size} | {peak} | {pace(of, exact)} | {far} | {before} | {after} |")
    return "\n".join(lines) + "\n"


def pace(of: dict[str, Any], exact: dict[str, Any] | None) -> str:
    """Return the median of a form's steps, and its ratio to float32's with the least and the largest of a turn."""
    if "seconds" not in of:
        return ""
    step = f"{statistics.median(of['seconds']):.2f} s"
    if exact is None or of is exact:
        return step
    ratios = [x / y for x, y in zip(of["seconds"], exact["seconds"], strict=True)]
    return f"{step}, {statistics.median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f})"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="as of rslora train (default: SmolLM2 in the blocks of its file)")
    parser.add_argument("--data", help="as of rslora train (default: docstrings of Python)")
    parser.add_argument("--forms", default=",".join(FORMS), help="which, of %(default)s")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--turns", type=int, default=7, help="steps of each form that are timed (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("quantised"), help="folder (default: %(default)s)")
    a = parser.parse_args()
    unknown = set(a.forms.split(",")) - set(FORMS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))} is none of {', '.join(FORMS)}")
    return a


def main() -> None:
    a, found, began = parse(), {}, time.monotonic()
    a.out.mkdir(parents=True, exist_ok=True)
    forms = a.forms.split(",")
    for n, form in enumerate(forms, 1):
        found[form] = run(form, a) | {"bytes": base_bytes(form, a)}
        left = (time.monotonic() - began) / n * (len(forms) - n)
        print(
            f"{n} of {len(forms)}: {form}, {found[form]['peak'] / 1e9:.2f} GB at its peak; {left:.0f} s left",
            flush=True,
        )
        (a.out / "table.md").write_text(table(found))
    if a.turns:
        print(f"timing {a.turns} steps of each in turn", flush=True)
        for form, seconds in steps_in_turn(forms, a).items():
            found[form]["seconds"] = seconds
        (a.out / "table.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
