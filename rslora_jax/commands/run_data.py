"""The data of `rslora train`: chosen, tokenised, laid out in batches, and what of them is cut or left out."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rslora_jax.commands import settings
from rslora_jax.commands.devices import Placement
from rslora_jax.commands.heldout import Asked, Split, said, split
from rslora_jax.commands.sources import sources_of

_SHOWN = 3  # of the examples that are cut or left out
SKIPPED = "skipped.txt"


class Chosen(NamedTuple):
    """Hold the examples of a run, what is recorded of them, and what was left out, where that may be."""

    split: Split
    record: Mapping[str, Any]
    skipped: list[str] | None


class Data(NamedTuple):
    """The data of a run as batches, and its loss on them."""

    batches: Any
    heldout: Any  # None where nothing is held out
    loss: Any
    steps_an_epoch: float
    rows: Any
    examples: Sequence[Any]  # of which the rows are
    shown: list[Any]  # held-out examples to be answered


def choose(a: argparse.Namespace) -> Chosen:
    """Read the examples of a run and say which are learnt from and which are held out.

    Raises:
      ValueError: they cannot be had, or are others than those of the run that is resumed.
    """
    asked = Asked(a.data, a.heldout, a.eval_data, settings.rule_of(a), a.columns)
    skipped = list[str]() if a.skip_bad else None
    found = split(asked, skipped)
    if asked[:3] != (None, None, None):
        print(said(asked, found), flush=True)
    mixed = [source.weight for source in sources_of(a.data) if source.weight is not None]
    record = settings.examples_to_save(found.training, found.heldout, asked.rule, mixed)
    if a.resume:
        settings.check_examples(a, record)
    return Chosen(found, record, skipped)


def prepare(a: argparse.Namespace, base: Any, chosen: Chosen, placement: Placement) -> Data:
    """Tokenise the examples of a run and lay them out in batches."""
    from rslora_jax.commands.progress import progress_line
    from rslora_jax.train import batches, loss

    how: dict[str, Any] = {"max_len": min(a.max_len, base.config.max_len), "cache": a.cache, "skipped": chosen.skipped}

    def rows_of(examples: Sequence[Any], what: str) -> Any:
        rows = batches.prepare(base.tokenizer, examples, progress=progress_line("tokenising"), **how)
        print(f"{what}: {rows.statistics}", flush=True)
        for line in _cut_lines(rows, examples):
            print(line, flush=True)
        return rows

    sources, parts = sources_of(a.data), chosen.split.parts
    names = [f"training data {source.path}" for source in sources] if len(parts) > 1 else ["training data"]
    found = [rows_of(part, name) for part, name in zip(parts, names, strict=True)]
    rows, mixed = found[0], []
    if len(found) > 1:
        rows = batches.joined(found, [len(part) for part in parts])
        mixed = [(len(one.rows), source.weight or 1.0) for one, source in zip(found, sources, strict=True)]
        _say_shares(a, sources, mixed)
    of_heldout, places, shown = None, rows.places, list[Any]()
    if held_out := chosen.split.heldout:
        held = rows_of(held_out, "held-out data")
        of_heldout = batches.heldout_batches(held, batch_size=a.batch_size, share=placement.share)
        places, shown = max(places, held.places), [held_out[n] for n in sorted({*held.owners})[:2]]
    _tell_skipped(a, chosen.skipped)
    how = {"batch_size": a.batch_size, "seed": a.seed, "share": placement.share, "mixed": mixed}
    examples = chosen.split.training
    of_tokens = loss.token_loss(places, chunk=loss.CHUNK_ON_MESH if placement.mesh else None)
    return Data(
        batches.train_batches(rows, **how), of_heldout, of_tokens, len(rows.rows) / a.batch_size, rows, examples, shown
    )


def _cut_lines(rows: Any, examples: Sequence[Any]) -> list[str]:
    """Say of the first few examples that do not fit a row where they are and how much of them is cut.

    >>> from rslora_jax.train import Example, prepare
    >>> from rslora_jax.train.bytelevel import ByteTokenizer
    >>> long = [Example("a" * 9, "b", origin="mine.jsonl:7")]
    >>> _cut_lines(prepare(ByteTokenizer(), long, max_len=5), long)
    ['  cut: mine.jsonl:7, 5 of 9 tokens of its prompt']
    """
    found = [(owner, one) for owner, one in zip(rows.owners, rows.sequences, strict=True) if sum(one.cut)]
    lines = []
    for owner, one in found[:_SHOWN]:
        # The completion is what is learnt at the end; all before it is the prompt, with its earlier answers.
        learnt = one.is_learnt_N[::-1]
        kept = len(learnt) if learnt.all() else int(learnt.argmin())
        sizes = (len(learnt) - kept, kept)
        lost = [
            f"{cut:,} of {size + cut:,} tokens of its {what}"
            for cut, size, what in zip(one.cut, sizes, ("prompt", "completion"), strict=True)
            if cut
        ]
        lines.append(f"  cut: {examples[owner].origin or f'example {owner + 1}'}, {' and '.join(lost)}")
    return [*lines, f"  and {len(found) - _SHOWN:,} more"] if len(found) > _SHOWN else lines


def _say_shares(a: argparse.Namespace, sources: Sequence[Any], mixed: Sequence[tuple[int, float]]) -> None:
    """Say of each file how much of what is learnt from is its own."""
    total = sum(weight for _, weight in mixed)
    for source, (count, weight) in zip(sources, mixed, strict=True):
        steps = count / (a.batch_size * weight / total)
        share = f"{source.path}: {weight / total:.1%} of all rows"
        print(f"{share}; its own {count:,} are gone through in {steps:,.1f} steps", flush=True)


def _tell_skipped(a: argparse.Namespace, skipped: Sequence[str] | None) -> None:
    """Say which examples were left out, the first few here and all of them in a file of the run's folder."""
    from rslora_jax.parallel import processes

    if not skipped:
        return
    path = Path(a.out, SKIPPED)

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{text}\n" for text in skipped), encoding="utf-8")

    if not a.plan:
        processes.first_decides(write)
    where = "" if a.plan else f", all of them in {path}"
    print(f"left out {len(skipped):,} bad examples{where}:")
    for text in skipped[:_SHOWN]:
        print(f"  {text}")
    if len(skipped) > _SHOWN:
        print(f"  and {len(skipped) - _SHOWN:,} more", flush=True)
