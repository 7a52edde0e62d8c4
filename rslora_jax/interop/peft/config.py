"""What a PEFT adapter's configuration means for a model: which of its weights it adapts, of which rank and scale."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from rslora_jax.config import LoraConfig
from rslora_jax.interop.decoder import DECODER
from rslora_jax.interop.names import Names, Place, file_names, places
from rslora_jax.interop.peft.files import PeftFolder, adapted_in, as_opened
from rslora_jax.interop.peft.settings import PeftSettings, read_settings
from rslora_jax.pytrees import Params
from rslora_jax.wrap import array_leaves

HEAD = "lm_head.weight"
_TABLE = "embed_tokens.weight"


def base_of(folder: str | Path | PeftFolder) -> str | None:
    """Return what an adapter's configuration calls its base: a folder or a name on the hub; None where it does not."""
    name = as_opened(folder).fields.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def places_of_modules(found: Mapping[str, Place], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """Return the places of modules that could have adapters, by their Hugging Face names: matrices and kernels."""
    matrices = {n: p for n, p in found.items() if len(shapes[p.path]) - (p.layer is not None) >= 2}
    return {n.removesuffix(".weight"): place for n, place in matrices.items() if n.endswith(".weight")}


def tied_table(names: Names, found: Mapping[str, Place]) -> str | None:
    """Return the module of the token table that also serves as the head: the table of names has a head, the model none.

    PEFT has two modules there, each with its own adapter; here they are one weight, with one.
    """
    if HEAD not in file_names(names) or HEAD in found:
        return None
    return next((n.removesuffix(".weight") for n in found if n.endswith(_TABLE)), None)


def adapted_modules(
    peft: PeftFolder, settings: PeftSettings, modules: Mapping[str, Place], table: str | None
) -> list[str]:
    """Return the modules that an adapter adapts, of those that the model has, in its order.

    Raises:
      ValueError: there is none, or it adapts one of the two uses of a tied table alone.
    """
    asked = adapted_in(peft) if settings.all_linear else None

    def adapts(module: str) -> bool:
        return settings.adapts(module) if asked is None else module in asked

    chosen = [module for module in modules if adapts(module)]
    if table is not None:
        head = HEAD.removesuffix(".weight")
        both = (adapts(table), adapts(head))
        if any(both) and not (all(both) or settings.tie):
            one, other = (table, head) if both[0] else (head, table)
            raise ValueError(
                f"{settings.where} adapts {one} and not {other}, which share one weight here: train the adapter with "
                "ensure_weight_tying, or with neither"
            )
        if settings.tie and any(both) and table not in chosen:
            chosen.append(table)
        if settings.saves(table) != settings.saves(head) and not settings.tie:
            raise ValueError(
                f"{settings.where} replaces one of {table} and {head}, which share one weight here: train the "
                "adapter with ensure_weight_tying"
            )
    if not chosen:
        raise ValueError(f"{settings.where} adapts no module of this model: its target_modules are {settings.targets}")
    return chosen


def read_config(folder: str | Path | PeftFolder, params: Params, names: Names = DECODER.names) -> LoraConfig:
    """Read a PEFT adapter's configuration as the `LoraConfig` that gives these parameters its adapters.

    Every adapted weight is named by its path, with its own rank and alpha where PEFT's patterns give it one. A weight
    that holds all layers has one rank and one scale here: those of the layer with the largest rank. `load_peft` fills
    smaller ranks up with zeros and takes the difference of the scales into B; a layer without an adapter gets zeros.

    Args:
      folder: with adapter_config.json, as PEFT saves it; or what `open_peft` read of it.
      params: the base's parameters, arrays or shapes.
      names: their Hugging Face names.

    Raises:
      ValueError: the configuration is damaged, asks for what this library does not compute, or does not fit the model.
    """
    peft = as_opened(folder)
    settings = read_settings(peft)
    shapes = {path: tuple(leaf.shape) for path, leaf in array_leaves(params).items()}
    found = places(names, shapes)
    modules = places_of_modules(found, shapes)
    own: dict[str, tuple[int, float]] = {}
    for module in adapted_modules(peft, settings, modules, tied_table(names, found)):
        path, pair = modules[module].path, settings.rank_and_alpha(module)
        own[path] = pair if path not in own or pair[0] > own[path][0] else own[path]
    return LoraConfig(
        rank=settings.r,
        alpha=settings.alpha,
        scaling=settings.scaling,
        targets=[_literal(path) for path in own],
        rank_pattern=[(_literal(path), rank) for path, (rank, _) in own.items() if rank != settings.r],
        alpha_pattern=[(_literal(path), alpha) for path, (_, alpha) in own.items() if alpha != settings.alpha],
        allow_large_rank=True,  # PEFT sets no bound
    )


def _literal(path: str) -> str:
    """Write a path as a glob that matches it.

    >>> _literal("params/w[0]")
    'params/w[[]0]'
    """
    return re.sub(r"[{}]", "?", re.sub(r"[*?\[]", r"[\g<0>]", path))
