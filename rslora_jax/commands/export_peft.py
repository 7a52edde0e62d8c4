"""`rslora export`: write a run's adapters for PEFT or vLLM."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXAMPLES = """\
examples:
  rslora export my-run --out my-adapter
      For PEFT: PeftModel.from_pretrained(base, "my-adapter").
  rslora export my-run --step best --for vllm --dtype bfloat16 --out my-adapter
      One rank and one scale, as vLLM needs them; the command to serve it is printed.
"""


def add(commands: Any) -> None:
    """Add the command and its flags."""
    command = commands.add_parser(
        "export",
        help="write a run's adapters for PEFT or vLLM",
        description="Write the adapters of a run as a folder that PEFT or vLLM loads beside the base.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("folder", metavar="FOLDER", help="of a run, of one of its checkpoints, or of PEFT")
    command.add_argument("--out", required=True, help="folder to make", metavar="FOLDER")
    target = "who is to read it: vllm gets one rank and one scale (default peft)"
    command.add_argument("--for", dest="target", default="peft", choices=("peft", "vllm"), help=target)
    command.add_argument("--step", metavar="last|best|N", help="which checkpoint (default: the last)")
    dtypes = ("float32", "bfloat16", "float16")
    command.add_argument("--dtype", default="float32", choices=dtypes, help="dtype to write (default float32)")
    command.add_argument("--model", help="where the base is now (default: where the run had it)", metavar="MODEL")
    name = "what the folder is to call its base: a name on Hugging Face or a folder (default: the run's model)"
    command.add_argument("--base-model", help=name, metavar="NAME")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Run `rslora export`."""
    from absl import logging

    from rslora_jax.interop import peft
    from rslora_jax.interop.adapter_folder import attach, load_base, open_adapters, parse_step
    from rslora_jax.interop.new_folder import check_free

    logging.set_verbosity(logging.ERROR)
    a = arguments
    check_free(a.out)
    opened = open_adapters(a.folder, step=parse_step(a.step))
    where = a.model or opened.settings.get("model")
    print(f"reading {where or 'SmolLM2'}", flush=True)
    base_model = load_base(opened, a.model)
    lora, _, adapters, replaced = attach(opened, base_model)
    base = a.base_model or base_name(where)
    options = {"base_model": base, "for_vllm": a.target == "vllm", "dtype": a.dtype, "replaced": replaced}
    peft.save_peft(a.out, lora, adapters, base_model.family.names, **options)
    print(f"wrote {a.out}: {lora.num_parameters:,} numbers in {len(lora.sites)} adapters, for {base or 'its base'}")
    if a.target == "vllm":
        rank, out = peft.check_vllm(a.out), shlex.quote(f"{Path(a.out).name}={Path(a.out).absolute()}")
        serve = shlex.quote(base) if base else "BASE"
        print(f"vllm serve {serve} --enable-lora --max-lora-rank {rank} --lora-modules {out}")
    return 0


def base_name(model: str | None) -> str | None:
    """Say what PEFT calls a model; a GGUF file is nothing that it loads.

    >>> base_name("smollm2"), base_name("my.gguf")
    ('HuggingFaceTB/SmolLM2-135M-Instruct', None)
    """
    if model in (None, "smollm2"):
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    return None if model.endswith(".gguf") else model
