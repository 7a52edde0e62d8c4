"""The whole parameters that a PEFT adapter brings: its modules_to_save, the biases that its `bias` names, and the table
and head that PEFT saves along.

Those of which a whole parameter here is trained are adapters (`trained_paths`); what replaces a part of one, such as a
layer of a stack, or one use of a table that is the head too, or what PEFT saves without training it, replaces the base.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from rslora_jax.config import split_use
from rslora_jax.interop.names import Place
from rslora_jax.interop.peft.files import CONFIG_NAME, PREFIX
from rslora_jax.interop.peft.layout import is_table, weight_from_torch
from rslora_jax.interop.peft.settings import PeftSettings
from rslora_jax.interop.peft.tied import Places, ties_copies
from rslora_jax.shown import shown
from rslora_jax.transform.uses import LOOKUP


def _trained_names(settings: PeftSettings, places: Places, adapted: Collection[str]) -> set[str]:
    """Return the names of the parameters that PEFT trains whole: of modules_to_save, and biases."""

    def trains(name: str) -> bool:
        module, _, leaf = name.rpartition(".")
        of_bias = leaf == "bias" and (settings.bias == "all" or (settings.bias == "lora_only" and module in adapted))
        return of_bias or (settings.saves(module) and module not in adapted)

    return set(filter(trains, places.found))


# In the name of a weight as it was before training; and what stands there in that of the one that is used.
_ORIGINAL = ".original_module."
_AFTER = (".", ".modules_to_save.", ".token_adapter.base_layer.")


def trained_paths(settings: PeftSettings, places: Places, adapted: Collection[str]) -> list[str]:
    """Return the paths of the parameters that PEFT trains whole: in all layers, and in both uses of a tied table.

    Args:
      settings: what the adapter's configuration says.
      places: where a model's parameters are.
      adapted: the modules that it adapts.
    """
    names = _trained_names(settings, places, adapted)
    heads = {f"{table}.weight" for table in places.heads} if not ties_copies(settings) else set()
    layers: dict[str, list[int | None]] = {}
    for name, place in places.found.items():
        if name in names and not split_use(place.path)[1] and name not in heads:
            layers.setdefault(place.path, []).append(place.layer)
    return [path for path, of in layers.items() if None in of or len(of) == places.shapes[path][0]]


def replaced_weights(
    settings: PeftSettings,
    left: Mapping[str, np.ndarray],
    places: Places,
    adapted: Collection[str],
    tied: Collection[str],
    where: Path,
) -> dict[str, np.ndarray]:
    """Read the whole weights among the tensors that are left in a file.

    Args:
      settings: what the adapter's configuration says.
      left: the tensors by name, without PEFT's prefix.
      places: where a model's weights are.
      adapted: the modules that have adapters.
      tied: the paths of those that are both looked up and multiplied.
      where: the file, for errors.

    Returns:
      The weights by path; at "path@lookup" or "path@product" what PEFT has in place of one use alone, and at "path@2"
      what it has in place of the layer 2 of a stacked weight, where not all are replaced.
    """
    weights = _named_weights(settings, left, places, _trained_names(settings, places, adapted), where)
    found = dict(places.found)
    for table, head in places.heads.items():
        one, other = f"{table}.weight", f"{head}.weight"
        both = one in weights and other in weights
        if both and np.array_equal(weights[one], weights[other]):
            del weights[other]
        elif both or (settings.saves(table) != settings.saves(head) and not ties_copies(settings)):
            found[one] = found[one]._replace(path=f"{found[one].path}@{LOOKUP}")
        elif other in weights:
            weights[one] = weights.pop(other)
    for name in weights:
        if found[name].path in tied and not places.heads and settings.saves(name.rpartition(".")[0]):
            # PEFT copies the embedding alone, which leaves the head as it is.
            found[name] = found[name]._replace(path=f"{found[name].path}@{LOOKUP}")
    by_path: dict[str, dict[int | None, str]] = {}
    for name in weights:
        by_path.setdefault(found[name].path, {})[found[name].layer] = name
    replaced: dict[str, np.ndarray] = {}
    for path, layers in by_path.items():
        parts = {n: _one_layer(path, found[name], name, places, weights, where) for n, name in layers.items()}
        if None in parts:
            replaced[path] = parts[None]
        elif len(parts) == places.shapes[path][0]:
            replaced[path] = np.stack([parts[n] for n in sorted(parts)])  # type: ignore[type-var]
        else:
            replaced |= {f"{path}@{n}": part for n, part in parts.items()}
    return replaced


def _named_weights(
    settings: PeftSettings, left: Mapping[str, np.ndarray], places: Places, trained: Collection[str], where: Path
) -> dict[str, np.ndarray]:
    """Return the tensors by the names of their weights; a ValueError for one that has no place, or that is missing."""
    weights: dict[str, np.ndarray] = {}
    heads = {f"{head}.weight" for head in places.heads.values()}
    for name, tensor in left.items():
        # PEFT calls the weight of an adapted table base_layer, and saves a table that was resized under its own name. A
        # copy of such a table it saves three times: twice as it was trained, and once as it was, without use.
        # One of which rows are trained it saves whole too, as it was; and these rows as they were, again without use.
        originals = [name.replace(_ORIGINAL, of) for of in _AFTER if _ORIGINAL in name]
        if name.endswith(".trainable_tokens_original") or any(one in left for one in originals):
            continue
        plain = name.replace(".token_adapter.", ".").replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        module = plain.rpartition(".")[0]
        known = plain in places.found and (
            plain != name
            or plain in trained
            or settings.saves(module)
            or plain in heads
            or module.rpartition(".")[2] == "lm_head"
            or is_table(places.found[plain].path)
        )
        if not known:
            raise ValueError(f"{where} holds {shown(PREFIX + name)}, for which the model or {CONFIG_NAME} has no place")
        if plain in weights and not np.array_equal(weights[plain], tensor):
            raise ValueError(f"{where} holds {shown(PREFIX + name)} twice, with other numbers: save the adapter again")
        weights[plain] = tensor
    for name in trained:
        if name not in weights and not (settings.tie and name in heads):
            what = "modules_to_save" if settings.saves(name.rpartition(".")[0]) else "bias"
            raise ValueError(f"{where} lacks {PREFIX}{name}, which {what} names: save the adapter again")
    return weights


def _one_layer(
    path: str, place: Place, name: str, places: Places, weights: Mapping[str, np.ndarray], where: Path
) -> np.ndarray:
    """Give one layer's weight our shape."""
    shape = place.one(places.shapes.get(path, places.shapes[split_use(path)[0]]))
    part = weight_from_torch(place, shape, weights[name])
    if part is None:
        raise ValueError(
            f"{where}: {PREFIX}{name} has shape {weights[name].shape}, which does not fit {path} of shape {shape}"
        )
    return part


def split_layer(path: str) -> tuple[str, int | None]:
    """Split the number of a layer off the path of what is replaced.

    >>> split_layer("params/layers/w@2"), split_layer("params/table@lookup")
    (('params/layers/w', 2), ('params/table@lookup', None))
    """
    whole, _, layer = path.rpartition("@")
    return (whole, int(layer)) if layer.isdecimal() else (path, None)
