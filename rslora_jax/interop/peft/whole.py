"""Whole parameters, trained or replaced, as PEFT writes them: modules_to_save, and biases by its `bias`."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from rslora_jax.config import split_use
from rslora_jax.interop.names import Place
from rslora_jax.interop.peft.layout import weight_to_torch
from rslora_jax.interop.peft.replaced import split_layer
from rslora_jax.interop.peft.tied import Places, modules_of
from rslora_jax.pytrees import Params
from rslora_jax.sites import named_leaves
from rslora_jax.transform.uses import LOOKUP, PRODUCT
from rslora_jax.wrap import Adapters, Lora


@dataclasses.dataclass(frozen=True)
class Whole:
    """What PEFT has of whole parameters.

    Attributes:
      tensors: by their names in the file.
      trained: the names of those that are trained.
      modules: the modules_to_save.
      bias: "none", "all" or "lora_only".
      tie: whether a table and its head have one copy.
    """

    tensors: Mapping[str, np.ndarray]
    trained: set[str]
    modules: list[str]
    bias: str
    tie: bool


def whole_tensors(
    lora: Lora,
    adapters: Adapters,
    replaced: Mapping[str, Any],
    modules: Mapping[str, Iterable[str]],
    places: Places,
    params: Params,
) -> Whole:
    """Give what is trained whole, and what is replaced in the base, as PEFT names and lays it.

    Args:
      lora: from `wrap`.
      adapters: its adapters, with the values.
      replaced: other weights by path, as from `load_peft`.
      modules: the modules of the other adapters, by path.
      places: where the weights are.
      params: the base, for what PEFT saves along of a module of which a part is trained; None where it is not known.

    Raises:
      ValueError: PEFT has no form for it, or would save more than what is known.
    """
    adapted = {module for of in modules.values() for module in of}
    values = {path: adapters[path]["value"] for path, site in lora.sites.items() if site.kind == "trained"}
    names = {path: names_of_trained(lora, path, places) for path in values}
    arrays = {name: path for path in replaced for name in _replaced_names(path, places, adapted, lora.tied)}
    arrays |= {name: path for path in values for name in names[path]}
    trained = {name for own in names.values() for name in own}
    bias, alone = _bias(trained, arrays, places.found, adapted)
    saved: dict[str, set[str]] = {}
    for name in (name for name in arrays if name not in alone):
        module, _, leaf = name.rpartition(".")
        if module not in adapted:
            saved.setdefault(module, set()).add(leaf)
    arrays |= _rest(saved, places, params)
    leaves = dict(replaced) | values
    base = named_leaves(params) if params is not None else {}
    # The base layer of an adapted module is the one weight of both, in PEFT too.
    parts = {name: name.rpartition(".") for name in arrays}
    written = {name: f"{m}.base_layer.{leaf}" if m in adapted else name for name, (m, _, leaf) in parts.items()}
    tensors = {
        written[name]: _tensor(lora, places.found[name], path, leaves[path] if path in leaves else base[path])
        for name, path in arrays.items()
    }
    _check_no_more(saved, places)
    tie = any(lora.sites[path].tied for path in values)
    return Whole(tensors, {written[name] for name in trained}, sorted(saved), bias, tie)


def _tensor(lora: Lora, place: Place, path: str, whole: Any) -> np.ndarray:
    """Give a parameter, or its layer, as PyTorch has it."""
    weight = np.asarray(jax.device_get(whole))
    part = weight if split_layer(path)[1] is not None or place.layer is None else weight[place.layer]
    return weight_to_torch(place, part, lora.kinds.get(split_layer(path)[0]))


def _bias(
    trained: Collection[str], arrays: Collection[str], found: Mapping[str, Place], adapted: Collection[str]
) -> tuple[str, set[str]]:
    """Return PEFT's `bias`, and the biases that it then saves by it; the others go with their modules.

    Raises:
      ValueError: some biases of adapted modules are trained, and others are not.
    """
    every = {name for name in found if _is_bias(name)}
    biases = {name for name in trained if _is_bias(name)}
    of_adapted = {name for name in every if name.rpartition(".")[0] in adapted}
    with_more = {name.rpartition(".")[0] for name in arrays if name not in biases}
    alone = {name for name in biases if name.rpartition(".")[0] not in with_more - {*adapted}}
    if alone and alone != of_adapted and biases == every:
        return "all", alone
    if some := biases & of_adapted:
        if some != of_adapted:
            raise ValueError(
                f"{min(some)} is trained and {min(of_adapted - some)} is not: PEFT trains the biases of all adapted "
                "modules or of none; train them all, or merge the adapters into their base"
            )
        return "lora_only", of_adapted
    return "none", set()


def _is_bias(name: str) -> bool:
    return name == "bias" or name.endswith(".bias")


def _rest(saved: dict[str, set[str]], places: Places, params: Params) -> dict[str, str]:
    """Return the paths of what else the modules to save have, by name, and count it among what is saved."""
    rest = {}
    for name, place in places.found.items():
        module, _, leaf = name.rpartition(".")
        if module not in saved or leaf in saved[module]:
            continue
        if params is None:
            raise ValueError(
                f"PEFT saves whole modules, and of {module} its {leaf} is not trained: train it too, or give the base, "
                "save_peft(params=...)"
            )
        rest[name] = split_use(place.path)[0]
    for name in rest:
        saved[name.rpartition(".")[0]].add(name.rpartition(".")[2])
    return rest


def _check_no_more(saved: Mapping[str, Collection[str]], places: Places) -> None:
    for name in places.found:
        module, _, leaf = name.rpartition(".")
        if any(module.endswith(one) for one in saved) and leaf not in saved.get(module, ()):
            raise ValueError(f"PEFT's modules_to_save would take {name} too: replace it as well")


def names_of_trained(lora: Lora, path: str, places: Places) -> list[str]:
    """Return PEFT's names of a parameter that is trained whole: of a table that is the head too, both modules'."""
    site = lora.sites[path]
    names = [name for name, place in places.found.items() if place.path == path]
    if LOOKUP not in site.uses or site.stack_axes:
        return names
    (name,) = names
    return [f"{module}.weight" for module in modules_of(site, name.removesuffix(".weight"), places.heads, places.names)]


def _replaced_names(path: str, places: Places, adapted: Collection[str], tied: Collection[str]) -> list[str]:
    """Return the names of the weights in PEFT that a replaced one is: of a table that is the head too, both modules'.

    Raises:
      ValueError: the base has no such weight, or no module for one use of it.
    """
    weight, layer = split_layer(path)
    if layer is not None:
        return [name for name, place in places.found.items() if (place.path, place.layer) == (weight, layer)]
    whole, use = split_use(path)
    names = [name for name, place in places.found.items() if place.path == path]
    if use == LOOKUP and not names:
        names = [name for name, place in places.found.items() if place.path == whole]
    heads = [name for name, place in places.found.items() if place.path == f"{path}@{PRODUCT}"]
    if not names:
        raise ValueError(f"the base has no {path}, which is to be replaced")
    if path in tied and not heads:
        raise ValueError(
            f"{path} is multiplied as well as looked up, and PEFT has a copy for each: give the table of names the "
            f'head\'s, "{path}@{PRODUCT}": "lm_head.weight"'
        )
    both = names + heads
    return [name for name in both if name.rpartition(".")[0] in adapted] or both
