"""`rslora inspect`: how large adapters are beside their weights, and how much of their rank they use."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rslora_jax.commands.command import FOR_MODELS, Command
from rslora_jax.commands.flags import shared
from rslora_jax.commands.output import model_name, writing
from rslora_jax.commands.tables import print_table


def _add_flags(parser: argparse.ArgumentParser) -> None:
    shared(parser, "folder")
    shared(parser, "--step")
    shared(parser, "--model")
    parser.add_argument("--no-base", action="store_true", help="do not read the base: absolute norms, in seconds")
    parser.add_argument("--all", action="store_true", help="a line for each matrix")
    shared(parser, "--out", text="where spectrum.png and .csv go (default: the run's folder)")


def inspect(a: argparse.Namespace) -> int:
    """Run `rslora inspect`."""
    from rslora_jax.analysis import heatmap
    from rslora_jax.interop.adapter_folder import open_adapters, parse_step, place_of_base
    from rslora_jax.store.folder import check_writable

    step = parse_step(a.step)
    if a.no_base and a.model:
        raise ValueError("--no-base and --model say opposite things: give one of them")
    if a.out:
        check_writable(a.out)
    opened = open_adapters(a.folder, step=step)
    out = Path(a.out) if a.out else _home(opened.source)
    check_writable(out)
    told = a.model is not None or "model" in opened.settings or opened.named is not None
    with_base = told and not a.no_base
    base = f" and {model_name(place_of_base(opened, a.model))}" if with_base else ""
    print(f"reading {opened.source}{base}", flush=True)
    config, matrices, left = _measure(opened, a.model, with_base)
    about = _about(config) + _began(opened.settings) + _held(opened.base)
    print(about)
    if left:
        print(f"trained whole or by rows, and so without a spectrum: {', '.join(left)}")
    if not matrices:
        return 0
    _print_matrices(*heatmap.summarise(matrices, every=a.all))
    print(_total(matrices))
    if not with_base:
        why = "--no-base" if a.no_base else f"{opened.source} does not tell its base, which --model would"
        print(f"norms are absolute ({why})")
    title = f"{_home(opened.source).name}, {_checkpoint_name(opened.source)}{about}"
    drafts = {out / "spectrum.csv.tmp": out / "spectrum.csv", out / "spectrum.tmp.png": out / "spectrum.png"}
    csv, png = drafts
    with writing(out, *drafts):
        out.mkdir(parents=True, exist_ok=True)
        heatmap.write_csv(matrices, csv)
        heatmap.draw(matrices, png, title)
        for draft, whole in drafts.items():
            draft.replace(whole)
    print(f"wrote {shlex.quote(str(out / 'spectrum.png'))} and {shlex.quote(str(out / 'spectrum.csv'))}")
    return 0


def _measure(opened: Any, model: str | None, with_base: bool) -> tuple[Any, Sequence[Any], Sequence[str]]:
    """Return the adapters' config, the sizes and spectrum of each matrix, beside the base's where it is read, and what
    has none.
    """
    from rslora_jax.analysis import spectrum
    from rslora_jax.commands.progress import progress_line
    from rslora_jax.interop.adapter_folder import attach, load_base
    from rslora_jax.sites import named_leaves
    from rslora_jax.trained import trained_whole

    found: dict[str, Any] = {"shapes": {path: s for path in opened.adapters if (s := opened.shape(path)) is not None}}
    config, adapters = opened.config, opened.adapters
    if with_base:
        lora, variables, adapters, *_ = attach(opened, load_base(opened, model, text=False))
        config, found = lora.config, {"sites": lora.sites, "weights": named_leaves(variables)}
    if config is None:
        raise ValueError(f"{opened.source} is of PEFT, and is read beside its base: say with --model where that is")
    matrices = spectrum.measure(config, adapters, progress=progress_line("measuring"), **found)
    return config, matrices, trained_whole(config, adapters)


def _home(source: Path) -> Path:
    """Return the folder of the run that a checkpoint is of."""
    return source.parent.parent if source.parent.name == "checkpoints" else source


def _checkpoint_name(source: Path) -> str:
    """Say which checkpoint it is."""
    return f"step {source.name}: " if source.parent.name == "checkpoints" else ""


def _about(config: Any) -> str:
    """Say in a line what the adapters are."""
    targets = config.targets if isinstance(config.targets, str) else ", ".join(config.targets)
    more = "".join(
        f", {name} of its own for {', '.join(pattern for pattern, _ in patterns)}"
        for name, patterns in (("rank", config.rank_pattern), ("alpha", config.alpha_pattern))
        if patterns
    )
    rule = {"rslora": "alpha/sqrt(r)", "lora": "alpha/r", "constant": "alpha"}[config.scaling]
    return f"rank {config.rank}, alpha {config.alpha:g}, gamma = {rule}, on {targets}{more}"


def _began(settings: Any) -> str:
    """Say how a run's adapters started, where that was in a way of its own."""
    from rslora_jax.starts.named import named

    if not (start := settings.get("start")):
        return ""
    changed = ", as adapters of the original base: of twice the rank in training" if named(start)[0].changes else ""
    return f", started as {start}{changed}"


def _held(base: Mapping[str, str]) -> str:
    """Say in which format a run's base was, where that is not of arrays."""
    from rslora_jax.interop.held import formats, said_of

    return f", trained on a base {said_of(base)}" if formats(base) else ""


def _total(matrices: Sequence[Any]) -> str:
    """Say the sizes of all updates together."""
    update = math.hypot(*(m.update_frobenius for m in matrices))
    if not update:
        return f"{len(matrices)} matrices; every update is zero, as before the first step"
    said = f"{len(matrices)} matrices; ‖γAB‖ of all together is {update:.3g}"
    if matrices[0].weight_frobenius is None:
        return said
    weight = math.hypot(*(m.weight_frobenius for m in matrices))
    return f"{said}, {update / weight:.2e} of ‖W‖"


def _print_matrices(head: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="")
    for n, title in enumerate(head):
        table.add_column(title, justify="right" if n else "left", no_wrap=n == 0)
    for line in lines:
        table.add_row(*line)
    print_table(table)


COMMAND = Command(
    name="inspect",
    summary="show how large adapters are and how much of their rank they use",
    description="Show the norms of gamma A B beside those of the weights, and the effective rank of A B, for every "
    "adapted matrix; as a table, a picture and a CSV file.",
    examples=(
        (
            "rslora inspect rslora-run",
            "The last checkpoint beside its base: a table by module, rslora-run/spectrum.png and "
            "rslora-run/spectrum.csv.",
        ),
        ("rslora inspect rslora-run/checkpoints/20 --all", "One checkpoint, a line for each matrix."),
        (
            "rslora inspect my-run --step best --model base.gguf --out pictures",
            "A run that does not say what its base was, or whose base has moved.",
        ),
    ),
    note="Effective rank is exp of the entropy of the singular values of A B (Roy and Vetterli, 2007): 1 where one "
    "direction does all, the rank where all are as strong. The last column counts singular values above 1 % of the "
    "largest.",
    add_flags=_add_flags,
    run=inspect,
    needs=(*FOR_MODELS, "matplotlib"),
)
