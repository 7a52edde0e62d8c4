"""`rslora train --plan`: what a run would be."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rslora_jax.commands.devices import Placement
from rslora_jax.commands.progress import status_line


def show_plan(a: argparse.Namespace, lora: Any, first: Any, data: Any, optimizer: Any, placement: Placement) -> int:
    """Print what the run of these flags would be; nothing is written."""
    import jax

    from rslora_jax.store.folder import steps_in
    from rslora_jax.train import glance, plan

    with status_line() as say:
        found = plan(
            lora,
            first.base.variables,
            first.adapters,
            batches=data.batches,
            loss=data.loss,
            optimizer=optimizer,
            steps=a.steps,
            heldout=data.heldout,
            batch_sharding=placement.batch,
            accumulate=a.accumulate,
            dropout_key=jax.random.key(a.seed),
            on_nonfinite=a.on_nonfinite,
            eval_every=a.eval_every or None,
            steps_an_epoch=data.steps_an_epoch,
            done=steps_in(Path(a.out))[-1] if a.resume else 0,
            data=glance(data.rows, data.examples, first.base.tokenizer),
            say=say,
        )
    _print(found)
    return 0


def _print(found: Any) -> None:
    """Print a plan, with what is learnt in colour where there are colours."""
    from rich.text import Text

    from rslora_jax.terminal import bar_console
    from rslora_jax.train.plan_text import plan_text

    console = bar_console(highlight=False, soft_wrap=True)
    if console.color_system is None or console.no_color:
        print(plan_text(found))
        return

    def coloured(text: str) -> str:
        return f"\x1b[32m{text}\x1b[0m"

    # All else in it is printable, so that no data can steer the terminal.
    console.print(Text.from_ansi(plan_text(found, mark=coloured, width=console.width)))


def settle_parts(a: argparse.Namespace, lora: Any, first: Any, data: Any, optimizer: Any, placement: Placement) -> None:
    """Put the fewest parts of a batch with which a step fits the device in place of `--accumulate auto`."""
    import jax

    from rslora_jax.train import parts_that_fit

    if a.accumulate != "auto":
        return
    with status_line() as say:
        a.accumulate = parts_that_fit(
            lora,
            first.base.variables,
            first.adapters,
            batches=data.batches,
            loss=data.loss,
            optimizer=optimizer,
            batch_sharding=placement.batch,
            dropout_key=jax.random.key(a.seed),
            on_nonfinite=a.on_nonfinite,
            say=say,
        )
    print(f"--accumulate auto: each batch of {a.batch_size} is taken in {a.accumulate}", flush=True)
