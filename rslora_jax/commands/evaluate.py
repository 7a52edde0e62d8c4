"""`rslora eval`: the base and any number of runs side by side on held-out data."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rslora_jax.commands.command import FOR_MODELS, Command
from rslora_jax.commands.flags import add_flag, check_new_file, shared
from rslora_jax.commands.output import tell, write_text_whole
from rslora_jax.commands.tables import print_table


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", nargs="*", metavar="FOLDER", help="folders of runs or of PEFT (default: the base model alone)"
    )
    what = parser.add_argument_group("models")
    shared(what, "--model", text="the base, where it is not where the first run found it")
    shared(what, "--step", text="checkpoint of each run (default: the last)")
    shared(what, "--dtype", text="dtype to compute in (default: the first run's, or float32)")
    data = parser.add_argument_group("data")
    shared(
        data, "--data", text="a file or folder of examples, as in training (default: the first run's, or docstrings)"
    )
    shared(data, "--columns")
    data.add_argument("--all", action="store_true", help="all of it, with what the runs have learnt from")
    most = "at most so many examples, spread evenly (default: as many as the first run; of --data all)"
    shared(data, "--heldout", default=None, text=most, type=int)
    longest = "tokens in a row, as in training (default: the first run's, or 256)"
    shared(data, "--max-len", default=None, text=longest, type=int)
    shared(data, "--template-option")
    shared(data, "--batch-size")
    answers = parser.add_argument_group("answers")
    exact = "let each model answer, and count the right answers: the number after ####, or the whole text"
    answers.add_argument("--exact-match", action="store_true", help=exact)
    shared(answers, "--max-new")
    add_flag(parser.add_argument_group("output"), "--json", None, "write the scores as JSON too", metavar="FILE")


def evaluate(a: argparse.Namespace) -> int:
    """Run `rslora eval`."""
    from rslora_jax.commands import runs
    from rslora_jax.commands.heldout import all_of
    from rslora_jax.commands.progress import progress_line
    from rslora_jax.commands.sources import shown_data
    from rslora_jax.train import batches

    check_new_file("--json", a.json)
    # Before the model, which takes seconds to read: the data may be wrong.
    given = all_of(a.data, a.columns) if a.data else None
    tell("reading the model")
    options = {"to_write": a.exact_match, "template_options": a.template_option}
    loaded = runs.load_runs(a.folders, model=a.model, step=a.step, dtype=a.dtype, **options)
    started = [one.settings for one in loaded.runs]
    source, examples = _chosen(a, given, started)
    max_len = min(a.max_len or loaded.settings.get("max_len", 256), loaded.config.max_len)
    rows = batches.prepare(loaded.tokenizer, examples, max_len=max_len, progress=progress_line("tokenising"))
    is_all = a.all or (given is not None and len(examples) == len(given))
    print(f"{'all' if is_all else 'held out'} of {shown_data(source)}: {rows.statistics}", flush=True)
    found = _scored(a, loaded, rows, examples)
    _print_scores(found)
    if a.json:
        stated = {"data": source, "all": is_all, "examples": len(examples), "max_len": max_len, "models": found}
        write_text_whole(a.json, json.dumps(_plain(stated), indent=1) + "\n")
        tell(f"wrote {a.json}")
    return 0


def _scored(a: argparse.Namespace, loaded: Any, rows: Any, examples: Sequence[Any]) -> list[dict[str, Any]]:
    """Score the base and each run; a record of JSON values for each."""
    from rslora_jax.commands import runs
    from rslora_jax.commands.progress import progress_line
    from rslora_jax.train import score

    found: list[dict[str, Any]] = []
    first: Any = None
    for its in (None, *loaded.runs):
        name = its.name if its else "base"
        apply, variables = runs.program(loaded, its)
        progress = progress_line(f"scoring {name}")
        lost = score.losses(apply, variables, rows, batch_size=min(a.batch_size, len(rows.rows)), progress=progress)
        first = first or lost
        record = {"model": name, **(_about(its) if its else {}), **_scores(lost, first)}
        if a.exact_match:
            record |= _exact_match(apply, variables, loaded, examples, a, name)
        found.append(record)
    return found


def _chosen(
    a: argparse.Namespace, given: Sequence[Any] | None, started: Sequence[Mapping[str, Any]]
) -> tuple[Any, list[Any]]:
    """Give the file to score and its examples; `given` are those of --data, `started` is what runs were started with.

    What a run has learnt from is left out: of their own data, and of --data where that is theirs.
    """
    from rslora_jax.commands.heldout import all_of, spread, to_score

    first = started[0] if started else {}
    source = a.data or first.get("eval_data") or first.get("data")
    if given is None and (a.all or source):
        skipped = list[str]() if first.get("skip_bad") else None
        given = all_of(source, a.columns or first.get("columns"), skipped)
    if a.all and given is not None:
        return source, spread(list(given), a.heldout or len(given))
    return source, to_score(source, given, started, a.heldout)


def _about(run: Any) -> dict[str, Any]:
    """Say in JSON values which adapters a run's are."""
    config = run.config
    scaling = config.scaling if isinstance(config.scaling, str) else "a function"
    return {"step": run.step, "rank": config.rank, "alpha": config.alpha, "scaling": scaling}


def _scores(lost: Any, base: Any) -> dict[str, Any]:
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


def _exact_match(
    apply: Any, variables: Any, loaded: Any, examples: Sequence[Any], a: argparse.Namespace, name: str
) -> dict[str, Any]:
    """Let a model answer the examples, and count the right answers."""
    from rslora_jax.commands.progress import progress_line
    from rslora_jax.commands.prompts import batches
    from rslora_jax.models.generation import generate
    from rslora_jax.train import samples, score

    tokenizer, config = loaded.tokenizer, loaded.config
    if all(example.prompt == "" for example in examples):
        raise ValueError("--exact-match needs questions, and these examples are plain text: leave it out")
    asked = [example for example in examples if example.prompt != ""]
    prompts = [samples.prompt_of_example(tokenizer, example) for example in asked]
    bucket, answers = -(-max(map(len, prompts)) // 64) * 64, list[str]()
    progress = progress_line(f"answers of {name}")
    for batch, real in batches(prompts, a.batch_size):
        options = {"max_new": a.max_new, "eos_id": tokenizer.stop_ids, "bucket": bucket}
        outs = generate(apply, variables, batch, config, **options)
        answers += [tokenizer.decode(out, skip_special=True) for out in outs[:real]]
        progress(len(answers), len(asked))
    found = score.count_matches(answers, [example.completion for example in asked])
    return {
        "right": found.right,
        "asked": found.examples,
        "exact_match": found.rate,
        "exact_match_error": found.error,
        "answers": answers,
    }


def _print_scores(found: Sequence[Mapping[str, Any]]) -> None:
    """Print the scores as a table."""
    from rich.table import Table

    one = found[0]
    note = f"{one['tokens']:,} tokens with loss; ± is one standard error over examples, of the change a paired one"
    table = Table(caption=note, caption_justify="left")
    table.add_column("model")
    columns = ["step", "rank", "perplexity", "loss", "change of loss", *(["right"] if "right" in one else [])]
    for column in columns:
        table.add_column(column, justify="right")
    for record in found:
        based = "step" not in record
        cells = [
            record["model"],
            "" if based or record["step"] is None else str(record["step"]),
            "" if based else str(record["rank"]),
            _with_error(record["perplexity"], record["perplexity_error"], 2),
            _with_error(record["loss"], record["loss_error"], 4),
            "" if based else _with_error(record["loss_change"], record["loss_change_error"], 4, sign="+"),
        ]
        if "right" in record:
            rate = _with_error(100 * record["exact_match"], 100 * record["exact_match_error"], 1)
            cells.append(f"{record['right']}/{record['asked']} = {rate} %")
        table.add_row(*cells)
    print_table(table)


def _with_error(value: float, error: float, digits: int, sign: str = "") -> str:
    """Write a number and its standard error, where there is one.

    >>> _with_error(2.5, 0.25, 1), _with_error(-0.5, math.nan, 2, sign="+")
    ('2.5 ± 0.2', '-0.50')
    """
    shown = f"{value:{sign}.{digits}f}"
    return shown if math.isnan(error) else f"{shown} ± {error:.{digits}f}"


def _plain(value: Any) -> Any:
    """Give a value with null for numbers that JSON has no name for."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


COMMAND = Command(
    name="eval",
    summary="score the base and runs on held-out data, side by side",
    description="Score a base model and runs on it, side by side, on data that none of them was trained on.",
    examples=(
        ("rslora eval my-run", "Perplexity of the base and of the run on the data that the run held out."),
        (
            "rslora eval lora-run rslora-run --step best --json scores.json",
            "Two runs beside the base. Runs of one rank and the same targets share what is compiled.",
        ),
        (
            "rslora eval my-run --data test.jsonl --exact-match",
            'Another file, and how many answers are right: the number after "####", as in GSM8K.',
        ),
    ),
    add_flags=_add_flags,
    run=evaluate,
    needs=FOR_MODELS,
)
