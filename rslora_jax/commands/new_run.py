"""The folder of a run that no training has made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rslora_jax.commands.output import writing


def write_run(
    out: str, config: Any, variables: Any, adapters: Any, settings: Mapping[str, Any], tokenizer: Path | None
) -> None:
    """Write adapters as the folder of a run at step 0, whole or not at all.

    Args:
      out: the folder, which is to be free.
      config: the adapters' config.
      variables: their base.
      adapters: the adapters.
      settings: what the run is to have been started with.
      tokenizer: the folder of a tokenizer that belongs to the adapters.

    Raises:
      ValueError: the folder cannot be written.
    """
    import numpy as np

    from rslora_jax.interop.kept_tokenizer import keep_tokenizer
    from rslora_jax.interop.new_folder import written_whole
    from rslora_jax.shown import reason_of
    from rslora_jax.store import checkpoint

    with writing(out), written_whole(out) as folder, checkpoint.open_checkpoints(folder) as saved:
        nothing = {"step": np.int32(0)}  # no optimiser's state: there is none to go on with
        try:
            checkpoint.save(saved, 0, adapters, nothing, checkpoint.describe(config, variables, settings))
            saved.manager.wait_until_finished()
        except Exception as error:  # what orbax, tensorstore or the system raise
            raise ValueError(f"{out} cannot be written: {reason_of(error)}") from error
        keep_tokenizer(tokenizer, folder)


def settings_of(config: Any, model: str | None, param_dtype: str, **more: Any) -> dict[str, Any]:
    """Return the settings of a run on a base that was read from `model`."""
    where = str(Path(model).absolute()) if model and Path(model).exists() else model
    known = {"model": where, "param_dtype": param_dtype, "dtype": "float32"}
    return {**more, **known, "rank": config.rank, "alpha": config.alpha, "scaling": config.scaling}
