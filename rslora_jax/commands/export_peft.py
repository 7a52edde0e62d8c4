"""`rslora export`: write a run's adapters for PEFT or vLLM."""

from __future__ import annotations

import argparse
import re
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
    command.add_argument("folder", metavar="RUN", help="folder of a run, as `rslora train --out` made it")
    command.add_argument("--out", required=True, help="folder to make", metavar="FOLDER")
    target = "who is to read it: vllm gets one rank and one scale (default peft)"
    command.add_argument("--for", dest="target", default="peft", choices=("peft", "vllm"), help=target)
    command.add_argument("--step", default="last", help="checkpoint: last, best or a number (default last)")
    dtypes = ("float32", "bfloat16", "float16")
    command.add_argument("--dtype", default="float32", choices=dtypes, help="dtype to write (default float32)")
    command.add_argument("--model", help="where the base is now (default: where the run had it)", metavar="MODEL")
    name = "what the folder is to call its base: a name on Hugging Face or a folder (default: the run's model)"
    command.add_argument("--base-model", help=name, metavar="NAME")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Run `rslora export`."""
    import jax
    from absl import logging

    import rslora_jax as rslora
    from rslora_jax import checkpoint
    from rslora_jax.interop import peft
    from rslora_jax.interop.load import load_model
    from rslora_jax.interop.whole import check_free
    from rslora_jax.models.llama import Llama

    logging.set_verbosity(logging.ERROR)
    a = arguments
    check_free(a.out)
    if a.step not in ("last", "best") and not a.step.isdecimal():
        raise ValueError(f"--step {a.step} is neither last, best nor a number")
    step = int(a.step) if a.step.isdecimal() else a.step
    config, adapters = checkpoint.load_adapters(a.folder, step=step)
    settings = checkpoint.load_about(a.folder)["settings"]
    where = a.model or settings.get("model")
    print(f"reading {where or 'SmolLM2'}", flush=True)
    model_config, variables, _ = load_model(
        where,
        scan_layers=not any(re.search(r"(^|/)layers_\d+/", path) for path in adapters),
        param_dtype=settings.get("param_dtype", "float32"),
    )
    checkpoint.load_adapters(a.folder, params=variables, step=step)  # it must be the base they were trained on
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
    lora = rslora.wrap(Llama(model_config).apply, shapes, jax.ShapeDtypeStruct((1, 8), "int32"), config=config)
    base = a.base_model or base_name(where)
    peft.save_peft(a.out, lora, adapters, base_model=base, for_vllm=a.target == "vllm", dtype=a.dtype)
    print(f"wrote {a.out}: {lora.num_parameters:,} numbers in {len(lora.sites)} adapters, for {base or 'its base'}")
    if a.target == "vllm":
        rank, out = peft.check_vllm(a.out), shlex.quote(f"{Path(a.out).name}={Path(a.out).absolute()}")
        serve = shlex.quote(base) if base else "BASE"
        print(f"vllm serve {serve} --enable-lora --max-lora-rank {rank} --lora-modules {out}")
    return 0


def base_name(model: str | None) -> str | None:
    """Say what PEFT calls a model; a GGUF file is nothing that it loads.

    >>> base_name(None), base_name("my.gguf")
    ('HuggingFaceTB/SmolLM2-135M-Instruct', None)
    """
    if model is None:
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    return None if model.endswith(".gguf") else model
