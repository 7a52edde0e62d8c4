"""The families of models that are known, and which of them a file is of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rslora_jax.interop.decoder import DECODER
from rslora_jax.interop.family import Family
from rslora_jax.shown import quoted

FAMILIES: tuple[Family, ...] = (DECODER,)


def family_of_config(path: Path, about: Mapping[str, Any]) -> Family:
    """Give the family of a config.json.

    Raises:
      ValueError: none reads its model_type.
    """
    kind = about.get("model_type")
    for family in FAMILIES:
        if isinstance(kind, str) and kind in family.model_types:
            return family
    known = ", ".join(kind for family in FAMILIES for kind in family.model_types)
    raise ValueError(f"{path} has model_type {quoted(kind, 40)}: only {known} are read")


def family_of_gguf(path: Path, metadata: Mapping[str, Any]) -> Family:
    """Give the family of a GGUF file.

    Raises:
      ValueError: none reads its architecture.
    """
    kind = metadata.get("general.architecture")
    for family in FAMILIES:
        if family.gguf is not None and kind in family.gguf.architectures:
            return family
    known = ", ".join(kind for family in FAMILIES if family.gguf is not None for kind in family.gguf.architectures)
    raise ValueError(f"{path} is of architecture {quoted(kind, 40)}: only {known} are read")
