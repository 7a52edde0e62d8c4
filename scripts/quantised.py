"""What a base in few bits costs: memory, time, loss and perplexity of SmolLM2, in each form beside the arrays.

    python scripts/quantised.py --steps 4            # to try it out: five minutes
    python scripts/quantised.py                      # the table of docs/quantised: half an hour on 2 quiet cores
    python scripts/quantised.py --model my-llama --data mine.jsonl --forms float32,nf4

Each form is a run of `rslora train` in a process of its own, with the same seed, data and settings: the weights of the
file as float32 and as bfloat16 arrays, rounded anew to int8 and NF4 as they are read, and the file's own blocks. "peak"
is the most memory that the process held; "step" the median of its steps without the first, which compiles, and its
ratio to that of float32 arrays; "loss" the largest difference of a step's loss from theirs. In --out are table.md and a
folder for each run; a run that is there is not done again.
"""

import argparse
import json
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
        "step": statistics.median(record["seconds"] for record in steps[1:]),
        "before": heldout[0],
        "after": heldout[-1],
        "peak": int(done.stdout.rsplit("peak ", 1)[1]),
    }
    kept.write_text(json.dumps(figures))
    return figures


def base_bytes(form: str, a: argparse.Namespace) -> int:
    """Return the bytes of the base in memory, loaded in a process of its own."""
    options = {"float32": "dequantize=True", "bfloat16": "dequantize=True, param_dtype='bfloat16'", "own": ""}
    how = options.get(form, f"quantize={form!r}")
    code = "import jax; from rslora_jax.interop import load_model; "
    code += f"print(sum(x.nbytes for x in jax.tree.leaves(load_model({a.model!r}, {how}).variables)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    return int(done.stdout.split()[-1])


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return the figures of all runs as Markdown."""
    lines = ["| base | in memory | peak | step | loss | perplexity before | after |", "|---|--:|--:|--:|--:|--:|--:|"]
    exact = found.get("float32")
    for form, of in found.items():
        far = (
            ""
            if exact is None
            else f"{max(abs(x - y) for x, y in zip(of['losses'], exact['losses'], strict=True)):.1e}"
        )
        times = "" if exact is None else f", {of['step'] / exact['step']:.2f}"
        before, after = (f"{2.718281828 ** of[name]:.2f}" for name in ("before", "after"))
        size, peak = f"{of['bytes'] / 1e6:.1f} MB", f"{of['peak'] / 1e9:.2f} GB"
        lines.append(f"| {form} | {size} | {peak} | {of['step']:.2f} s{times} | {far} | {before} | {after} |")
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="as of rslora train (default: SmolLM2 in the blocks of its file)")
    parser.add_argument("--data", help="as of rslora train (default: docstrings of Python)")
    parser.add_argument("--forms", default=",".join(FORMS), help="which, of %(default)s")
    parser.add_argument("--steps", type=int, default=20)
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
        print(f"{n} of {len(forms)}: {form}, {found[form]['step']:.2f} s a step; {left:.0f} s left", flush=True)
        (a.out / "table.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
