"""`rslora export`: write a run's adapters for PEFT or vLLM."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from rslora_jax.commands.command import Command
from rslora_jax.commands.flags import add_flag, shared
from rslora_jax.commands.output import model_name, whether_written


def _add_flags(parser: argparse.ArgumentParser) -> None:
    shared(parser, "folder")
    shared(parser, "--out", required=True, text="folder to make")
    target = "who is to read it: vllm gets one rank and one scale"
    add_flag(parser, "--for", "peft", target, dest="target", choices=("peft", "vllm"))
    shared(parser, "--step")
    dtypes = ("float32", "bfloat16", "float16")
    shared(parser, "--dtype", default="float32", text="dtype to write", choices=dtypes)
    shared(parser, "--model")
    name = "what the folder is to call its base: a name on Hugging Face or a folder (default: the run's model)"
    add_flag(parser, "--base-model", None, name, metavar="NAME")


def export_peft(a: argparse.Namespace) -> int:
    """Run `rslora export`."""
    from rslora_jax.interop import peft
    from rslora_jax.interop.adapter_folder import attach, load_base, open_adapters, parse_step
    from rslora_jax.interop.new_folder import check_free

    check_free(a.out)
    opened = open_adapters(a.folder, step=parse_step(a.step))
    model = a.model or opened.settings.get("model")
    print(f"reading {model_name(model)}", flush=True)
    base = load_base(opened, a.model)
    lora, _, adapters, base, replaced = attach(opened, base)
    name = a.base_model or _name_for_peft(model)
    options = {"base_model": name, "for_vllm": a.target == "vllm", "dtype": a.dtype, "replaced": replaced}
    peft.save_peft(a.out, lora, adapters, base.family.names, **options)
    print(f"wrote {a.out}: {lora.num_parameters:,} numbers in {len(lora.sites)} adapters, for {name or 'its base'}")
    if a.target == "vllm":
        rank, out = peft.check_vllm(a.out), shlex.quote(f"{Path(a.out).name}={Path(a.out).absolute()}")
        serve = shlex.quote(name) if name else "BASE"
        print(f"vllm serve {serve} --enable-lora --max-lora-rank {rank} --lora-modules {out}")
    return 0


def _name_for_peft(model: str | None) -> str | None:
    """Say what PEFT calls a model; a GGUF file is nothing that it loads.

    >>> _name_for_peft("smollm2"), _name_for_peft("my.gguf")
    ('HuggingFaceTB/SmolLM2-135M-Instruct', None)
    """
    if model in (None, "smollm2"):
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    return None if model.endswith(".gguf") else model


COMMAND = Command(
    name="export",
    summary="write a run's adapters for PEFT or vLLM",
    description="Write the adapters of a run as a folder that PEFT or vLLM loads beside the base.",
    examples=(
        ("rslora export my-run --out my-adapter", 'For PEFT: PeftModel.from_pretrained(base, "my-adapter").'),
        (
            "rslora export my-run --step best --for vllm --dtype bfloat16 --out my-adapter",
            "One rank and one scale, as vLLM needs them; the command to serve it is printed.",
        ),
    ),
    add_flags=_add_flags,
    run=export_peft,
    left=whether_written,
)
