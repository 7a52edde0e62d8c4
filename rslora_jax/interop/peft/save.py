"""Write adapters as PEFT has them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rslora_jax.interop.decoder import DECODER
from rslora_jax.interop.hub import split_revision
from rslora_jax.interop.kept_tokenizer import copy_tokenizer
from rslora_jax.interop.names import Names, Place
from rslora_jax.interop.new_folder import written_whole
from rslora_jax.interop.peft import vllm
from rslora_jax.interop.peft.config import places_of_modules
from rslora_jax.interop.peft.files import CONFIG_NAME, PREFIX, write_tensors
from rslora_jax.interop.peft.layout import peft_names, refit, shared_with_head, site_modules, to_peft
from rslora_jax.interop.peft.patterns import exact_patterns
from rslora_jax.interop.peft.rows import row_tensors
from rslora_jax.interop.peft.scales import Scales, one_scale, own_scales
from rslora_jax.interop.peft.settings import ends_with
from rslora_jax.interop.peft.whole import whole_tensors
from rslora_jax.interop.shards import DTYPES
from rslora_jax.methods.dora import DoRA
from rslora_jax.methods.method import method_of, of_layer
from rslora_jax.pytrees import Params
from rslora_jax.wrap import Adapters, Lora

# Fields that every version of PEFT has known for long.
_FIELDS: Mapping[str, Any] = {
    "auto_mapping": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "peft_type": "LORA",
}


def save_peft(
    folder: str | Path,
    lora: Lora,
    adapters: Adapters,
    names: Names = DECODER.names,
    *,
    base_model: str | None = None,
    tokenizer: str | Path | None = None,
    task_type: str | None = "CAUSAL_LM",
    server: str | None = None,
    use_rslora: bool | None = None,
    dtype: str = "float32",
    replaced: Mapping[str, Any] | None = None,
    params: Params = None,
) -> None:
    """Write adapters as a folder that PEFT loads, whole or not at all.

    The factors are written as they are, and what is trained whole as modules_to_save or by `bias`. Where `scaling` is
    "constant" or a function, the same scale is written as LoRA's alpha / r, with an alpha to suit; so it is where
    `use_rslora` is False: many readers take alpha / r whatever the file says. Those who serve adapters know one rank
    and one scale: for them smaller ranks are filled up with zeros and what differs in scale is taken into B (multiplied
    in float64, rounded once to `dtype`).

    Args:
      folder: to be made; it must not hold anything.
      lora: from `wrap`.
      adapters: its adapters.
      names: the Hugging Face names of the base's parameters, and which are stored transposed.
      base_model: what PEFT is to load as the base: a folder, or a name on Hugging Face, with @ and a revision behind it
        where one is meant.
      tokenizer: a folder whose tokenizer is copied along, where the adapters were trained with one of their own.
      task_type: PEFT's; None where the base is no language model of transformers.
      server: keep to what "vllm", "sglang" or "gguf" (llama.cpp's converter) serves; `vllm.check_vllm` says with which
        --max-lora-rank.
      use_rslora: whether the scale is written as alpha / sqrt(r), or as alpha / r; by default as the run has it, and as
        alpha / r for a server.
      dtype: "float32", "bfloat16" or "float16".
      replaced: weights by path that were replaced in the base, as from `load_peft`.
      params: the base, where of a module a part alone is trained whole, such as its bias: PEFT saves all of it.

    Raises:
      ValueError: an adapter has no form in PEFT, or none in the server, or is not finite in `dtype`; it is named.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known: use {', '.join(DTYPES)}")
    if server is not None:
        vllm.check_options(server, use_rslora)
    replaced = replaced or {}
    places, modules = site_modules(lora, names)
    lora.check({path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in lora.shapes.items()}, adapters)
    if server is not None:
        vllm.check_sites(lora, modules, replaced, server)
    plan = one_scale(lora, use_rslora=bool(use_rslora)) if server else own_scales(lora, use_rslora=use_rslora)
    tensors = _factor_tensors(lora, adapters, modules, plan, dtype)
    whole = whole_tensors(lora, adapters, replaced, modules, places, params)
    tensors |= {n: _rounded(n, array, dtype) if n in whole.trained else array for n, array in whole.tensors.items()}
    rows, indices = row_tensors(lora, adapters, places)
    tensors |= {n: _rounded(n, array, dtype) for n, array in rows.items()}
    name, revision = (None, None) if base_model is None else split_revision(base_model)
    config = {
        **_FIELDS,
        "base_model_name_or_path": name,
        "revision": revision,
        "task_type": task_type,
        **_described(lora, modules, plan, places_of_modules(places.found, places.shapes)),
        "modules_to_save": whole.modules or None,
        "bias": whole.bias,
    }
    if indices:
        config["trainable_token_indices"] = indices
    if whole.tie or any(lora.sites[path].tied and not lora.sites[path].use for path in modules):
        config["ensure_weight_tying"] = True  # a version of PEFT without this field reads both
    with written_whole(Path(folder)) as out:
        write_tensors(out, {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()})
        (out / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if tokenizer is not None:
            copy_tokenizer(Path(tokenizer), out)
        if server == "vllm":
            vllm.check_vllm(out)
        elif server is not None:
            vllm.check_server(out, server)


def _factor_tensors(
    lora: Lora,
    adapters: Adapters,
    modules: Mapping[str, Mapping[str, int | None]],
    plan: Scales,
    dtype: str,
) -> dict[str, np.ndarray]:
    """Give the factors of every module as PEFT names and lays them; a table that is the head too has them twice."""
    tensors: dict[str, np.ndarray] = {}
    for path in modules:
        site = lora.sites[path]
        names = peft_names(site)
        own = {name: np.asarray(jax.device_get(array)) for name, array in adapters[path].items()}
        shared = site.tied and not site.use  # of a table and its head, which has the same turned
        for module, layer in [*modules[path].items()][: 1 if shared else None]:
            rank, _, factor = plan.of(path, layer)
            one = refit(site, own if layer is None else of_layer(site, own, layer), rank, factor)
            for name, tensor in to_peft(site, one).items():
                tensors[f"{module}.{names[name]}"] = _rounded(f"{module}.{names[name]}", tensor, dtype)
        if shared:
            table, head = modules[path]
            for name, of in shared_with_head(site).items():
                tensors[f"{head}.{name}"] = tensors[f"{table}.{of}"].T
    return tensors


def _described(
    lora: Lora,
    modules: Mapping[str, Mapping[str, int | None]],
    plan: Scales,
    everything: Mapping[str, Place],
) -> dict[str, Any]:
    """Give the fields of the config that say what is adapted, of which rank and at which scale."""
    adapted = {module: plan.of(path, layer) for path, of in modules.items() for module, layer in of.items()}
    return {
        "r": plan.rank,
        "lora_alpha": _number(plan.alpha),
        "use_rslora": plan.scaling == "rslora",
        "target_modules": _target_names(adapted, everything),
        "rank_pattern": exact_patterns({m: rank for m, (rank, _, _) in adapted.items()}, plan.rank),
        "use_dora": isinstance(method_of(lora.config.method), DoRA),
        "lora_dropout": lora.config.dropout,
        "alpha_pattern": exact_patterns(
            {m: _number(alpha) for m, (_, alpha, _) in adapted.items()}, _number(plan.alpha)
        ),
    }


def _number(value: float) -> float | int:
    """Write a whole number as one: PEFT means alpha to be an integer."""
    return int(value) if float(value).is_integer() else float(value)


def _rounded(name: str, tensor: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        out = tensor.astype(jnp.dtype(dtype))
    if not np.isfinite(out.astype(np.float32)).all():
        raise ValueError(f"{name} has values that are not finite in {dtype}: check the run, or give another dtype")
    return out


def _target_names(adapted: Collection[str], everything: Mapping[str, Place]) -> list[str]:
    """Return PEFT's target_modules: last parts of names where they say it all, else whole names."""
    last = sorted({module.rpartition(".")[2] for module in adapted})
    alike = {module for module in everything if ends_with(module, last)}
    return last if alike == set(adapted) else sorted(adapted)
