"""How the adapters of `rslora train` start: new, from others, as `--start` says, or where a run was left."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rslora_jax.commands.devices import Placement

_BATCHES = 8  # of the training data, for starts that look at some


class Begun(NamedTuple):
    """Adapters that training starts with, the base that they belong to, and the start that changed this, if one did."""

    base: Any
    adapters: Any
    start: Any = None


def check_start(a: argparse.Namespace) -> None:
    """Raise a ValueError for a start that there is not, or that does not go with the base."""
    from rslora_jax.starts.named import named

    if not a.start:
        return
    found, options = named(a.start)
    if found.rounds and not a.quantize:
        raise ValueError(
            f"--start {a.start} makes up for what --quantize loses: give --quantize nf4, int8 or float8 too"
        )
    if found.rounds and options.get("steps", 1) > 1:
        raise ValueError(
            f"--start {a.start}: after more turns than one the base is not what --quantize {a.quantize} makes of its "
            "files, so a run could not read it again: take --start loftq, or `starts.loftq` in a program"
        )


def read_dense(a: argparse.Namespace) -> bool:
    """Say whether the base is to be read in arrays, as it is the start that quantises it."""
    from rslora_jax.starts.named import named

    return bool(a.start) and not a.resume and named(a.start)[0].rounds


def share_ranks(a: argparse.Namespace, lora: Any, variables: Any, data: Any, placement: Placement) -> Any:
    """Give the base wrapped with the ranks that a start shares out, as eva:2 does; with --resume, those of the run."""
    import jax

    from rslora_jax.config import LoraConfig
    from rslora_jax.starts.named import named
    from rslora_jax.starts.shares import eva_config
    from rslora_jax.store import checkpoint
    from rslora_jax.wrap import wrap

    rho = named(a.start)[1].get("rho") if a.start else None
    if rho is None:
        return lora
    if a.resume:
        config = LoraConfig.from_dict(checkpoint.load_about(a.out)["config"])
    else:
        print("sharing the ranks out over the layers", flush=True)
        config = eva_config(lora, variables, rho=rho, **_looked_at(a, data, placement, "sharing out ranks"))
    tokens = jax.ShapeDtypeStruct((1, 8), "int32")
    return wrap(lora.fn, variables, tokens, config=config)


def begin(a: argparse.Namespace, lora: Any, base: Any, found: Any, data: Any, placement: Placement, rows: Any) -> Begun:
    """Give the adapters that training starts with, where they are to lie, and their base.

    Args:
      a: the flags.
      lora: the base, wrapped.
      base: the model.
      found: adapters to start from; None where they are new.
      data: the run's batches and loss.
      placement: where things lie.
      rows: which rows are trained, of new tokens.
    """
    import jax

    from rslora_jax.interop.enlarged import first_rows
    from rslora_jax.parallel import sharding
    from rslora_jax.starts.named import named
    from rslora_jax.starts.stream import changed

    variables, key, start = base.variables, jax.random.key(a.seed), None
    changes = bool(a.start) and named(a.start)[0].changes
    if found:
        adapters = jax.tree.map(jax.numpy.asarray, found.adapters)
    elif a.resume and changes:
        start = _kept(a, lora, variables)
        variables, adapters = changed(lora, variables, start.adapters), start.adapters
    elif a.start and not a.resume:
        variables, adapters, start = _start(a, lora, base, key, data, placement, changes)
    else:
        adapters = lora.init(key, variables)
    adapters = first_rows(base, rows, adapters) if rows else adapters
    if placement.mesh is not None:
        where = sharding.adapter_shardings(lora.sites, variables, split_rank=a.split_rank)
        adapters = jax.device_put(adapters, where)
    base = base if variables is base.variables else dataclasses.replace(base, variables=variables)
    return Begun(base, adapters, dataclasses.replace(start, adapters=adapters) if start else None)


def _kept(a: argparse.Namespace, lora: Any, variables: Any) -> Any:
    """Give the start that the run in the folder began with."""
    from rslora_jax.parallel import sharding
    from rslora_jax.store.start import load_start

    return load_start(Path(a.out), shardings=sharding.adapter_shardings(lora.sites, variables))


def _start(
    a: argparse.Namespace, lora: Any, base: Any, key: Any, data: Any, placement: Placement, changes: bool
) -> tuple[Any, Any, Any]:
    """Give the changed base, the adapters as `--start` has them, and what a run's folder is to keep of it."""
    from rslora_jax.interop.enlarged import of_file
    from rslora_jax.starts.named import begin
    from rslora_jax.store.checksum import checksums
    from rslora_jax.store.start import Start

    print(f"starting the adapters as {a.start}", flush=True)
    words = checksums(of_file(base)) if changes else {}
    how = _looked_at(a, data, placement, f"starting as {a.start}")
    how |= {"format": a.quantize} if read_dense(a) else {}
    variables, adapters = begin(a.start, lora, base.variables, key, **how)
    return variables, adapters, Start(a.start, adapters, words) if changes else None


def _looked_at(a: argparse.Namespace, data: Any, placement: Placement, what: str) -> dict[str, Any]:
    """Give the batches that a start looks at, with their loss, and the bar that shows how far it is."""
    from rslora_jax.commands.progress import progress_line
    from rslora_jax.train.batch_stream import lay_out

    batches = [data.batches[n] for n in range(_BATCHES)]
    if a.start.startswith("eva"):
        batches = [batch._replace(tokens_BxT=_without_padding(batch)) for batch in batches]
    laid = [lay_out(batch, placement.batch) for batch in batches]
    return {"loss": data.loss, "batches": laid, "progress": progress_line(what)}


def _without_padding(batch: Any) -> np.ndarray:
    """Give the tokens of a batch with those of each row again where it has none.

    What is looked at is what weights meet, loss or not: of padding, which is always the same, it would be too much.
    """
    tokens = np.array(batch.tokens_BxT)
    for row, there in zip(tokens, batch.segment_ids_BxT > 0, strict=True):
        if there.any():
            row[~there] = np.resize(row[there], np.count_nonzero(~there))
    return tokens
