"""`rslora eval`: the base and any number of runs side by side on held-out data."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rslora_jax.commands.flags import add_flag

EXAMPLES = """\
examples:
  rslora eval my-run
      Perplexity of the base and of the run on the data that the run held out.
  rslora eval lora-run rslora-run --step best --json scores.json
      Two runs beside the base. Runs of one rank and the same targets share what is compiled.
  rslora eval my-run --data test.jsonl --all --exact-match
      All of a file, and how many answers are right: the number after "####", as in GSM8K.
"""


def add(commands: Any) -> None:
    """Add the command and its flags."""
    evaluate = commands.add_parser(
        "eval",
        help="score the base and runs on held-out data, side by side",
        description="Score a base model and runs on it, side by side, on data that none of them was trained on.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    evaluate.add_argument(
        "folders", nargs="*", metavar="FOLDER", help="folders of runs or of PEFT (default: the base model alone)"
    )
    what = evaluate.add_argument_group("models")
    add_flag(what, "--model", None, "the base, where it is not where the first run found it", metavar="FILE")
    add_flag(what, "--step", None, "checkpoint of each run (default: the last)", metavar="last|best|N")
    dtype = "dtype to compute in (default: the first run's, or float32)"
    add_flag(what, "--dtype", None, dtype, choices=("float32", "bfloat16"))
    data = evaluate.add_argument_group("data")
    source = "a .jsonl, .parquet or .txt file (default: the first run's, or docstrings of Python)"
    add_flag(data, "--data", None, source, metavar="FILE")
    data.add_argument("--all", action="store_true", help="all of the file, not only what `rslora train` holds out")
    most = "at most so many examples, spread evenly (default 32; with --all, all)"
    add_flag(data, "--heldout", None, most, metavar="N", type=int)
    longest = "tokens in a row, as in training (default: the first run's, or 256)"
    add_flag(data, "--max-len", None, longest, metavar="N", type=int)
    add_flag(data, "--batch-size", 8, "rows or prompts that are taken together", metavar="N")
    answers = evaluate.add_argument_group("answers")
    exact = "let each model answer, and count the right answers: the number after ####, or the whole text"
    answers.add_argument("--exact-match", action="store_true", help=exact)
    add_flag(answers, "--max-new", 256, "most tokens of an answer", metavar="N")
    add_flag(evaluate.add_argument_group("output"), "--json", None, "write the scores as JSON too", metavar="FILE")
    evaluate.set_defaults(run=run)


def run(arguments: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Run the command."""
    try:
        return evaluate(arguments)
    except KeyboardInterrupt:
        print("\nrslora: interrupted", file=sys.stderr)
        return 130


def evaluate(a: argparse.Namespace) -> int:
    """Run `rslora eval`."""
    from rslora_jax.commands import runs
    from rslora_jax.commands.generate import tell, write_whole
    from rslora_jax.train import batches, report, score

    for flag in ("heldout", "max_len", "batch_size", "max_new"):
        if getattr(a, flag) is not None and not getattr(a, flag) > 0:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(a, flag)} is not above 0")
    if a.json and not Path(a.json).absolute().parent.is_dir():
        raise ValueError(f"{Path(a.json).parent} is no folder: make it before --json {a.json}")
    # Before the model, which takes seconds to read: the data may be wrong.
    given = chosen(a, {}) if a.data else None
    tell("reading the model")
    options = {"model": a.model, "step": a.step, "dtype": a.dtype, "to_write": a.exact_match}
    loaded = runs.load(a.folders, **options)
    source = a.data or loaded.settings.get("data")
    examples = given or chosen(a, loaded.settings)
    max_len = min(a.max_len or loaded.settings.get("max_len", 256), loaded.config.max_len)
    progress = report.progress_line("tokenising")
    rows = batches.prepare(loaded.tokenizer, examples, max_len=max_len, progress=progress)
    print(f"{'all' if a.all else 'held out'} of {source or 'the docstrings of Python'}: {rows.statistics}", flush=True)

    found: list[dict[str, Any]] = []
    first: Any = None
    for its in (None, *loaded.runs):
        name = its.name if its else "base"
        apply, variables = runs.program(loaded, its)
        progress = report.progress_line(f"scoring {name}")
        lost = score.losses(apply, variables, rows, batch_size=min(a.batch_size, len(rows.rows)), progress=progress)
        first = first or lost
        record = {"model": name, **(about(its) if its else {}), **scores(lost, first)}
        if a.exact_match:
            record |= exact_match(apply, variables, loaded, examples, a, name)
        found.append(record)
    show(found)
    if a.json:
        stated = {"data": source, "all": a.all, "examples": len(examples), "max_len": max_len, "models": found}
        write_whole(a.json, json.dumps(plain(stated), indent=1) + "\n")
        tell(f"wrote {a.json}")
    return 0


def chosen(a: argparse.Namespace, settings: Mapping[str, Any]) -> list[Any]:
    """Give the examples to score."""
    from rslora_jax.commands.data import examples, spread
    from rslora_jax.train import docstring_pairs, read_examples

    source = a.data or settings.get("data")
    if not a.all:
        # As many as in training, so that the figure is training's own.
        held = examples(source, a.heldout or settings.get("heldout") or 32)[1]
        if not held:
            raise ValueError(f"{source} is one example, of which none is held out: score it with --all")
        return held
    everything = read_examples(source) if source else [*docstring_pairs("train"), *docstring_pairs("heldout")]
    return spread(everything, a.heldout or len(everything))


def about(run: Any) -> dict[str, Any]:
    """Say in JSON values which adapters a run's are."""
    config = run.config
    scaling = config.scaling if isinstance(config.scaling, str) else "a function"
    return {"step": run.step, "rank": config.rank, "alpha": config.alpha, "scaling": scaling}


def scores(lost: Any, base: Any) -> dict[str, Any]:
    """Say in JSON values what a model lost, and how much more than the base."""
    change = lost.minus(base)
    return {
        "tokens": int(lost.tokens_E.sum()),
        "loss": lost.mean,
        "loss_error": lost.error,
        "perplexity": lost.perplexity,
        "perplexity_error": lost.perplexity_error,
        "loss_change": change.mean,
        "loss_change_error": change.error,
    }


def exact_match(
    apply: Any, variables: Any, loaded: Any, examples: Sequence[Any], a: argparse.Namespace, name: str
) -> dict[str, Any]:
    """Let a model answer the examples, and count the right answers."""
    from rslora_jax.commands.prompts import batches
    from rslora_jax.models.generation import generate
    from rslora_jax.train import report, samples, score

    tokenizer, config = loaded.tokenizer, loaded.config
    if all(example.prompt == "" for example in examples):
        raise ValueError("--exact-match needs questions, and these examples are plain text: leave it out")
    asked = [example for example in examples if example.prompt != ""]
    prompts = [samples.prompt_ids(tokenizer, example) for example in asked]
    bucket, answers = -(-max(map(len, prompts)) // 64) * 64, list[str]()
    progress = report.progress_line(f"answers of {name}")
    for batch, real in batches(prompts, a.batch_size):
        options = {"max_new": a.max_new, "eos_id": tokenizer.stop_ids, "bucket": bucket}
        outs = generate(apply, variables, batch, config, **options)
        answers += [tokenizer.decode(out, skip_special=True) for out in outs[:real]]
        progress(len(answers), len(asked))
    found = score.matches(answers, [example.completion for example in asked])
    return {
        "right": found.right,
        "asked": found.examples,
        "exact_match": found.rate,
        "exact_match_error": found.error,
        "answers": answers,
    }


def show(found: Sequence[Mapping[str, Any]]) -> None:
    """Print the scores as a table."""
    from rich.console import Console
    from rich.table import Table

    one = found[0]
    note = f"{one['tokens']:,} tokens with loss; ± is one standard error over examples, of the change a paired one"
    table = Table(caption=note, caption_justify="left")
    table.add_column("model", overflow="fold")
    columns = ["step", "rank", "perplexity", "loss", "change of loss", *(["right"] if "right" in one else [])]
    for column in columns:
        table.add_column(column, justify="right")
    for record in found:
        based = "step" not in record
        cells = [
            record["model"],
            "" if based or record["step"] is None else str(record["step"]),
            "" if based else str(record["rank"]),
            with_error(record["perplexity"], record["perplexity_error"], 2),
            with_error(record["loss"], record["loss_error"], 4),
            "" if based else with_error(record["loss_change"], record["loss_change_error"], 4, sign="+"),
        ]
        if "right" in record:
            rate = with_error(100 * record["exact_match"], 100 * record["exact_match_error"], 1)
            cells.append(f"{record['right']}/{record['asked']} = {rate} %")
        table.add_row(*cells)
    console = Console(highlight=False)
    # Where nobody looks, a table is not cut to a terminal's width.
    wide = console if console.is_terminal else Console(highlight=False, width=160)
    wide.print(table)


def with_error(value: float, error: float, digits: int, sign: str = "") -> str:
    """Write a number and its standard error, where there is one.

    >>> with_error(2.5, 0.25, 1), with_error(-0.5, math.nan, 2, sign="+")
    ('2.5 ± 0.2', '-0.50')
    """
    shown = f"{value:{sign}.{digits}f}"
    return shown if math.isnan(error) else f"{shown} ± {error:.{digits}f}"


def plain(value: Any) -> Any:
    """Give a value with null for numbers that JSON has no name for."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
