"""`rslora inspect`: how large adapters are beside their weights, and how much of their rank they use."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXAMPLES = """\
examples:
  rslora inspect rslora-run
      The last checkpoint beside its base: a table by module, rslora-run/spectrum.png and rslora-run/spectrum.csv.
  rslora inspect rslora-run/checkpoints/20 --all
      One checkpoint, a line for each matrix.
  rslora inspect my-run --step best --model base.gguf --out pictures
      A run that does not say what its base was, or whose base has moved.

  Effective rank is exp of the entropy of the singular values of A B (Roy and Vetterli, 2007): 1 where one direction
  does all, the rank where all are as strong. The last column counts singular values above 1 % of the largest.
"""


def add(commands: Any) -> None:
    """Add the command and its flags."""
    inspect = commands.add_parser(
        "inspect",
        help="show how large adapters are and how much of their rank they use",
        description="Show the norms of gamma A B beside those of the weights, and the effective rank of A B, for every "
        "adapted matrix; as a table, a picture and a CSV file.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inspect.add_argument("folder", metavar="FOLDER", help="of a run, of one of its checkpoints, or of PEFT")
    inspect.add_argument("--step", metavar="last|best|N", help="which checkpoint (default: the last)")
    base = "the base (default: what the run was started with)"
    inspect.add_argument("--model", metavar="MODEL", help=base)
    inspect.add_argument("--no-base", action="store_true", help="do not read the base: absolute norms, in seconds")
    inspect.add_argument("--all", action="store_true", help="a line for each matrix")
    inspect.add_argument("--out", metavar="FOLDER", help="where spectrum.png and .csv go (default: the run's folder)")
    inspect.set_defaults(run=run)


def run(arguments: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Run the command."""
    try:
        return inspect(arguments)
    except KeyboardInterrupt:
        print("rslora: interrupted", file=sys.stderr)
        return 130


def inspect(a: argparse.Namespace) -> int:
    """Run `rslora inspect`."""
    from rslora_jax.interop.adapter_folder import attach, load_base, open_adapters, parse_step

    step = parse_step(a.step)
    if a.no_base and a.model:
        raise ValueError("--no-base and --model say opposite things: give one of them")

    from absl import logging

    logging.set_verbosity(logging.ERROR)  # grain and orbax warn through it of what no user here can act on
    from rslora_jax.analysis import heatmap, spectrum
    from rslora_jax.sites import named_leaves
    from rslora_jax.train.report import progress_line

    opened = open_adapters(a.folder, step=step)
    out = Path(a.out) if a.out else home(opened.source)
    known = not a.no_base and (a.model is not None or "model" in opened.settings)
    print(f"reading {opened.source}{f' and {base_name(a.model, opened.settings)}' if known else ''}", flush=True)
    found: dict[str, Any] = {"shapes": {path: s for path in opened.adapters if (s := opened.shape(path)) is not None}}
    config, adapters = opened.config, opened.adapters
    if known:
        lora, variables, adapters, _ = attach(opened, load_base(opened, a.model))
        config, found = lora.config, {"sites": lora.sites, "weights": named_leaves(variables)}
    if config is None:
        raise ValueError(f"{opened.source} is of PEFT, and is read beside its base: say with --model where that is")
    matrices = spectrum.measure(config, adapters, progress=progress_line("measuring"), **found)
    about = describe(config)
    print(about)
    show(*heatmap.summarise(matrices, every=a.all))
    print(total(matrices))
    if not known:
        why = "--no-base" if a.no_base else f"{opened.source} does not tell its base, which --model would"
        print(f"norms are absolute ({why})")
    try:
        out.mkdir(parents=True, exist_ok=True)
        heatmap.write_csv(matrices, out / "spectrum.csv.tmp")
        heatmap.draw(matrices, out / "spectrum.tmp.png", f"{home(opened.source).name}, {named(opened.source)}{about}")
        (out / "spectrum.csv.tmp").replace(out / "spectrum.csv")
        (out / "spectrum.tmp.png").replace(out / "spectrum.png")
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error.strerror or error}") from error
    print(f"wrote {shlex.quote(str(out / 'spectrum.png'))} and {shlex.quote(str(out / 'spectrum.csv'))}")
    return 0


def base_name(model: str | None, settings: Any) -> str:
    """Say which base is read."""
    return model or settings.get("model") or "SmolLM2"


def home(source: Path) -> Path:
    """Return the folder of the run that a checkpoint is of."""
    return source.parent.parent if source.parent.name == "checkpoints" else source


def named(source: Path) -> str:
    """Say which checkpoint it is."""
    return f"step {source.name}: " if source.parent.name == "checkpoints" else ""


def describe(config: Any) -> str:
    """Say in a line what the adapters are."""
    targets = config.targets if isinstance(config.targets, str) else ", ".join(config.targets)
    more = "".join(
        f", {name} of its own for {', '.join(pattern for pattern, _ in patterns)}"
        for name, patterns in (("rank", config.rank_pattern), ("alpha", config.alpha_pattern))
        if patterns
    )
    rule = {"rslora": "alpha/sqrt(r)", "lora": "alpha/r", "constant": "alpha"}[config.scaling]
    return f"rank {config.rank}, alpha {config.alpha:g}, gamma = {rule}, on {targets}{more}"


def total(matrices: Sequence[Any]) -> str:
    """Say the sizes of all updates together."""
    import math

    update = math.hypot(*(m.update_frobenius for m in matrices))
    if not update:
        return f"{len(matrices)} matrices; every update is zero, as before the first step"
    said = f"{len(matrices)} matrices; ‖γAB‖ of all together is {update:.3g}"
    if matrices[0].weight_frobenius is None:
        return said
    weight = math.hypot(*(m.weight_frobenius for m in matrices))
    return f"{said}, {update / weight:.2e} of ‖W‖"


def show(head: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="")
    for n, title in enumerate(head):
        table.add_column(title, justify="right" if n else "left", no_wrap=n == 0)
    for line in lines:
        table.add_row(*line)
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=200)).print(table)
