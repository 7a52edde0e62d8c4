"""Open a folder of adapters, and load the base that they belong to."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rslora_jax import checkpoint
from rslora_jax.checksum import checksums
from rslora_jax.config import LoraConfig
from rslora_jax.wrap import Adapters

Step = int | Literal["last", "best"]


@dataclasses.dataclass(frozen=True)
class Opened:
    """Adapters from a folder, and what the folder tells of their base.

    Attributes:
      source: the folder that was read.
      config: their config.
      adapters: the adapters, as numpy arrays.
      base: dtype, shape and checksum of each of the base's arrays (`checksum.checksums`); empty where unknown.
      settings: what the run was started with; empty where unknown.
    """

    source: Path
    config: LoraConfig
    adapters: Adapters
    base: Mapping[str, str] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def shape(self, path: str) -> tuple[int, ...] | None:
        """Return the shape of a weight of the base, where the folder tells it."""
        found = re.match(r"\w+\[([\d,]*)\]", self.base.get(path, ""))
        return tuple(int(n) for n in found[1].split(",") if n) if found else None


def open_adapters(folder: str | Path, *, step: Step | None = None) -> Opened:
    """Open the folder of a run, or of one of its checkpoints (`run/checkpoints/<step>`).

    Args:
      folder: where the adapters are.
      step: which checkpoint of a run, the last where none is named.

    Raises:
      ValueError: the folder holds no adapters, not that checkpoint, or a damaged one.
    """
    folder = Path(folder).absolute()
    if folder.parent.name == "checkpoints" and folder.name.isdigit():
        if step is not None:
            raise ValueError(f"{folder} is one checkpoint: ask for a step of its run, {folder.parent.parent}")
        folder, step = folder.parent.parent, int(folder.name)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give that of a run, or of one of its checkpoints")
    where = checkpoint.find(folder, step or "last")
    about = checkpoint.read_about(where)
    config, adapters = checkpoint.load_adapters(folder, step=int(where.name))
    return Opened(where, config, adapters, about["base"], about["settings"])


def load_base(opened: Opened, model: str | Path | None = None) -> Any:
    """Load the base in the layout and the dtype in which the adapters were trained on it, and check that it is it.

    Args:
      opened: from `open_adapters`.
      model: what `load_model` takes; by default what the run was started with.

    Returns:
      (config, variables, tokenizer), as `load_model` does.

    Raises:
      ValueError: the folder does not tell its base and `model` is not given, or the base is another one.
    """
    from rslora_jax.interop.load import load_model

    if model is None and "model" not in opened.settings:
        raise ValueError(f"{opened.source} does not tell on which model it was trained: say so with --model")
    # Looped layers have a path each, stacked ones share it.
    looped = any(re.search(r"(^|/)layers_\d+/", path) for path in opened.adapters)
    dtypes = {opened.base[path].partition("[")[0] for path in opened.adapters if path in opened.base}
    loaded = load_model(
        opened.settings["model"] if model is None else model,
        scan_layers=not looped,
        param_dtype=dtypes.pop() if len(dtypes) == 1 else "float32",
    )
    if opened.base:
        checkpoint.check_same(opened.source, {"base": opened.base}, {"base": checksums(loaded.variables)})
    return loaded


def parse_step(text: str | None) -> Step | None:
    """Read the flag --step.

    >>> parse_step("best"), parse_step("40")
    ('best', 40)
    """
    if text is None or text in ("last", "best"):
        return text  # type: ignore[return-value]
    if not text.isdigit():
        raise ValueError(f"--step {text} is neither last, best nor the number of a step")
    return int(text)
