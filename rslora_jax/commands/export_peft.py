"""`rslora export`: write a run's adapters for PEFT, vLLM, SGLang or llama.cpp."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from rslora_jax.commands.command import FOR_MODELS, Command
from rslora_jax.commands.flags import add_flag, shared
from rslora_jax.commands.output import model_name, whether_written, writing


def _add_flags(parser: argparse.ArgumentParser) -> None:
    shared(parser, "folder")
    shared(parser, "--out", required=True, text="folder to make")
    target = "who is to read it: vllm, sglang and gguf (llama.cpp's converter) get one rank and one scale, alpha / r"
    add_flag(parser, "--for", "peft", target, dest="target", choices=("peft", "vllm", "sglang", "gguf"))
    formula = (
        "write the scale as alpha / sqrt(r), or as alpha / r with an alpha that gives the same (default: as the run"
    )
    formula += " has it; for others than peft false, as many of them take alpha / r whatever is said)"
    add_flag(parser, "--use-rslora", None, formula, choices=("true", "false"))
    shared(parser, "--step")
    dtypes = ("float32", "bfloat16", "float16")
    shared(parser, "--dtype", default="float32", text="dtype to write", choices=dtypes)
    shared(parser, "--model")
    name = "what the folder is to call its base: a name on Hugging Face or a folder (default: the run's model)"
    add_flag(parser, "--base-model", None, name, metavar="NAME")


def export_peft(a: argparse.Namespace) -> int:
    """Run `rslora export`."""
    from rslora_jax.interop import peft
    from rslora_jax.interop.adapter_folder import attach, load_base, open_adapters, parse_step, place_of_base
    from rslora_jax.interop.held import formats, said_of
    from rslora_jax.interop.new_folder import check_free

    check_free(a.out)
    server = None if a.target == "peft" else a.target
    formula = None if a.use_rslora is None else a.use_rslora == "true"
    if server:
        peft.check_options(server, formula)
    opened = open_adapters(a.folder, step=parse_step(a.step))
    model = place_of_base(opened, a.model)
    print(f"reading {model_name(model)}", flush=True)
    base = load_base(opened, a.model, text=False)
    lora, variables, adapters, base, replaced = attach(opened, base)
    name = a.base_model or name_for_peft(model)
    options = {"base_model": name, "server": server, "use_rslora": formula, "dtype": a.dtype, "replaced": replaced}
    options |= {"tokenizer": opened.tokenizer, "params": variables}
    with writing(a.out):
        peft.save_peft(a.out, lora, adapters, base.family.names, **options)
    print(f"wrote {a.out}: {lora.num_parameters:,} numbers in {len(lora.sites)} adapters, for {name or 'its base'}")
    if formats(opened.base):
        held = said_of(opened.base)
        print(
            f"it was trained on a base held {held}: over other copies of it answers differ by what rounding that cost"
        )
    if base.rows is not None:
        rows = base.config.vocab_size
        print(f"it has rows for new tokens: before PEFT loads it, base.resize_token_embeddings({rows})")
    if server:
        print(_how_to_serve(server, Path(a.out), name))
    return 0


def _how_to_serve(server: str, out: Path, name: str | None) -> str:
    """Give the command by which a server takes the adapter that was written."""
    from rslora_jax.interop import peft
    from rslora_jax.interop.hub import split_revision

    place, revision = split_revision(name or "BASE")
    base, at = shlex.quote(place), shlex.quote(str(out.absolute()))
    of = f" --revision {shlex.quote(revision)}" if revision else ""
    pair = shlex.quote(f"{out.name}={out.absolute()}")
    if server == "vllm":
        return f"vllm serve {base}{of} --enable-lora --max-lora-rank {peft.check_vllm(out)} --lora-modules {pair}"
    if server == "sglang":
        return f"python -m sglang.launch_server --model-path {base}{of} --enable-lora --lora-paths {pair}"
    where = "--base" if name is None or Path(name).is_dir() else "--base-model-id"
    return f"python convert_lora_to_gguf.py {where} {base} {at}"


def name_for_peft(model: str | None) -> str | None:
    """Say what PEFT calls a model; a GGUF file is nothing that it loads.

    >>> name_for_peft("smollm2"), name_for_peft("my.gguf")
    ('HuggingFaceTB/SmolLM2-135M-Instruct', None)
    """
    from rslora_jax.interop.adapter_folder import SMOLLM2

    if model in (None, "smollm2"):
        return SMOLLM2
    return None if model.endswith(".gguf") else model


COMMAND = Command(
    name="export",
    summary="write a run's adapters for PEFT, vLLM, SGLang or llama.cpp",
    description="Write the adapters of a run as a folder that PEFT, vLLM, SGLang or llama.cpp's converter to GGUF "
    "loads beside the base.",
    examples=(
        ("rslora export my-run --out my-adapter", 'For PEFT: PeftModel.from_pretrained(base, "my-adapter").'),
        (
            "rslora export my-run --step best --for vllm --dtype bfloat16 --out my-adapter",
            "One rank and one scale, as vLLM needs them; the command to serve it is printed.",
        ),
        (
            "rslora export my-run --for gguf --out my-adapter",
            "For llama.cpp's convert_lora_to_gguf.py, which takes alpha / r whatever the file says.",
        ),
        (
            "rslora export my-run --use-rslora false --out my-adapter",
            "The same logits in PEFT, and the right scale in readers that take alpha / r whatever the file says.",
        ),
    ),
    add_flags=_add_flags,
    run=export_peft,
    needs=FOR_MODELS,
    left=whether_written,
)
