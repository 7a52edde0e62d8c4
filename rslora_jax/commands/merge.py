"""`rslora merge`: write the model with its adapters added in, as a Hugging Face folder."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rslora_jax.commands.command import FOR_MODELS, Command
from rslora_jax.commands.flags import add_flag, shared
from rslora_jax.commands.output import model_name, whether_written, writing
from rslora_jax.commands.tables import print_table


def _add_flags(parser: argparse.ArgumentParser) -> None:
    dtypes = ("bfloat16", "float16", "float32", "nf4", "int8")
    shared(parser, "folder")
    shared(parser, "--out", required=True)
    shared(
        parser,
        "--dtype",
        default="bfloat16",
        text="dtype to write; nf4 and int8: 4 or 8 bits, as bitsandbytes has them",
        choices=dtypes,
    )
    shared(parser, "--step")
    shared(parser, "--model")
    add_flag(parser, "--max-shard-size", "5GB", "largest file of weights, such as 5GB or 500MB", metavar="SIZE")


def merge(a: argparse.Namespace) -> int:
    """Run `rslora merge`."""
    from rslora_jax.interop.adapter_folder import attach, load_base, open_adapters, parse_step, place_of_base
    from rslora_jax.interop.new_folder import check_free
    from rslora_jax.interop.shards import parse_size

    step, size, out = parse_step(a.step), parse_size(a.max_shard_size), Path(a.out)
    check_free(out)

    from rslora_jax.commands.progress import progress_line
    from rslora_jax.interop.load import folder_of
    from rslora_jax.interop.merged import write_merged
    from rslora_jax.interop.rounding import by_kind, meaning, together
    from rslora_jax.interop.untied import untie_adapters
    from rslora_jax.store.checkpoint import size_of

    opened = open_adapters(a.folder, step=step)
    model = place_of_base(opened, a.model)
    print(f"reading {opened.source} and {model_name(model)}", flush=True)
    base = load_base(opened, a.model, text=False)
    attached = attach(opened, base)
    whole = dataclasses.replace(attached.model, variables=attached.variables)
    base, lora, adapters = untie_adapters(whole, attached.lora, attached.adapters)
    if base.config != attached.model.config:
        print("the look-up of the token table is adapted apart from the head: the model gets a head of its own")
    with writing(out):
        roundings = write_merged(
            out,
            lora,
            base.variables,
            adapters,
            config=base.config,
            tokenizer=base.tokenizer,
            family=base.family,
            dtype=a.dtype,
            base=folder_of(model),
            changed=base.changed,
            own_tokenizer=opened.tokenizer,
            max_shard_size=size,
            progress=progress_line("merging"),
        )
    total = together("all", roundings)
    _print_roundings([*by_kind(roundings), total])
    print(meaning(total, a.dtype))
    if options := opened.settings.get("template_option"):
        print(f"trained with the template options {', '.join(options)}: give them to the chat template there too")
    files = len(list(out.glob("*.safetensors")))
    print(f"wrote {out}: {a.dtype}, {files} file{'s' * (files > 1)} of weights, {size_of(out) / 1e6:,.1f} MB in all")
    return 0


def _print_roundings(roundings: Sequence[Any]) -> None:
    """Print what rounding did, by kind of weight; the last line is the total."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="", show_footer=False)
    table.add_column("merged weights", no_wrap=True)
    for title in ("matrices", "update / weight", "rounding / update"):
        table.add_column(title, justify="right", no_wrap=True)
    for one in roundings:
        table.add_row(
            one.name, str(one.count), f"{one.update / one.weight:.2e}" if one.weight else "-", f"{one.relative:.2e}"
        )
    print_table(table)


COMMAND = Command(
    name="merge",
    summary="add adapters to their base and write a Hugging Face folder",
    description="Add adapters to their base, W + gamma A B, and write a folder that transformers, vLLM and others "
    "load. Sums are formed in float64 and rounded once; what rounding costs is shown.",
    examples=(
        (
            "rslora merge rslora-run --out merged",
            'The last checkpoint, in bfloat16; then AutoModelForCausalLM.from_pretrained("merged").',
        ),
        (
            "rslora merge rslora-run --out merged --step best --dtype float32",
            "The checkpoint with the least held-out loss, without loss by rounding.",
        ),
        (
            "rslora merge peft-adapter --model HuggingFaceTB/SmolLM2-135M --out merged",
            "A folder that PEFT saved; a tokenizer and a chat template that lie beside it are written too.",
        ),
        (
            "rslora merge my-run --out merged --model base.gguf --max-shard-size 2GB",
            "A run that does not say what its base was, or whose base has moved; in files of at most 2 GB.",
        ),
        (
            "rslora merge my-run --out merged --dtype nf4",
            "In 4 bits again, tables and norms in bfloat16: small, and with the error of rounding anew, which may be "
            "more than what was learned.",
        ),
    ),
    add_flags=_add_flags,
    run=merge,
    needs=FOR_MODELS,
    left=whether_written,
)
