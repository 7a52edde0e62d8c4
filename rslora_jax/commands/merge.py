"""`rslora merge`: write the model with its adapters added in, as a Hugging Face folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXAMPLES = """\
examples:
  rslora merge rslora-run --out merged
      The last checkpoint, in bfloat16; then AutoModelForCausalLM.from_pretrained("merged").
  rslora merge rslora-run --out merged --step best --dtype float32
      The checkpoint with the least held-out loss, without loss by rounding.
  rslora merge my-run --out merged --model base.gguf --max-shard-size 2GB
      A run that does not say what its base was, or whose base has moved; in files of at most 2 GB.
"""


def add(commands: Any) -> None:
    """Add the command and its flags."""
    merge = commands.add_parser(
        "merge",
        help="add adapters to their base and write a Hugging Face folder",
        description="Add adapters to their base, W + gamma A B, and write a folder that transformers, vLLM and others "
        "load. Sums are formed in float64 and rounded once; what rounding costs is shown.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    merge.add_argument("folder", metavar="FOLDER", help="of a run, of one of its checkpoints, or of PEFT")
    merge.add_argument("--out", required=True, metavar="FOLDER", help="new folder to write")
    dtypes = ("bfloat16", "float16", "float32")
    merge.add_argument("--dtype", default="bfloat16", choices=dtypes, help="dtype to write (default bfloat16)")
    merge.add_argument("--step", metavar="last|best|N", help="which checkpoint (default: the last)")
    merge.add_argument("--model", metavar="MODEL", help="the base (default: what the run was started with)")
    size = "largest file of weights, such as 5GB or 500MB (default 5GB)"
    merge.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help=size)
    merge.set_defaults(run=run)


def run(arguments: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Run the command."""
    try:
        return merge(arguments)
    except KeyboardInterrupt:
        print("rslora: interrupted; nothing was written", file=sys.stderr)
        return 130


def merge(a: argparse.Namespace) -> int:
    """Run `rslora merge`."""
    from rslora_jax.interop.adapter_folder import attach, load_base, open_adapters, parse_step
    from rslora_jax.interop.new_folder import check_free
    from rslora_jax.interop.shards import parse_size

    step, size, out = parse_step(a.step), parse_size(a.max_shard_size), Path(a.out)
    check_free(out)

    from absl import logging

    logging.set_verbosity(logging.ERROR)  # grain and orbax warn through it of what no user here can act on
    from rslora_jax.interop.load import folder_of
    from rslora_jax.interop.merged import write_merged
    from rslora_jax.interop.rounding import by_kind, meaning, together
    from rslora_jax.store.checkpoint import size_of
    from rslora_jax.train.report import progress_line

    opened = open_adapters(a.folder, step=step)
    model = a.model or opened.settings.get("model")
    print(f"reading {opened.source} and {model or 'SmolLM2'}", flush=True)
    base = load_base(opened, a.model)
    lora, variables, adapters, _ = attach(opened, base)
    try:
        roundings = write_merged(
            out,
            lora,
            variables,
            adapters,
            config=base.config,
            tokenizer=base.tokenizer,
            family=base.family,
            dtype=a.dtype,
            base=folder_of(model),
            max_shard_size=size,
            progress=progress_line("merging"),
        )
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error.strerror or error}") from error
    total = together("all", roundings)
    show([*by_kind(roundings), total])
    print(meaning(total, a.dtype))
    files = len(list(out.glob("*.safetensors")))
    print(f"wrote {out}: {a.dtype}, {files} file{'s' * (files > 1)} of weights, {size_of(out) / 1e6:,.1f} MB in all")
    return 0


def show(roundings: Sequence[Any]) -> None:
    """Print what rounding did, by kind of weight; the last line is the total."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="", show_footer=False)
    table.add_column("merged weights", no_wrap=True)
    for title in ("matrices", "update / weight", "rounding / update"):
        table.add_column(title, justify="right", no_wrap=True)
    for one in roundings:
        table.add_row(
            one.name, str(one.count), f"{one.update / one.weight:.2e}" if one.weight else "-", f"{one.relative:.2e}"
        )
    console = Console(highlight=False, soft_wrap=False)
    console.print(table) if console.is_terminal else Console(highlight=False, width=200).print(table)
