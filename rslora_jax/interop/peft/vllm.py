"""What vLLM and others serve of an adapter: one rank, one scale, nothing but the factors of modules that they know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rslora_jax.interop.peft.files import CONFIG_NAME, FACTOR, PREFIX, WEIGHTS_NAME, PeftFolder, as_opened
from rslora_jax.interop.peft.settings import read_settings
from rslora_jax.methods.dora import DoRA
from rslora_jax.methods.method import method_of
from rslora_jax.shown import shown
from rslora_jax.wrap import Lora

# Who serves an adapter at one scale, and what their names are.
SERVERS: Mapping[str, str] = {"vllm": "vLLM", "sglang": "SGLang", "gguf": "llama.cpp"}

# What --max-lora-rank takes.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Fields of adapter_config.json that say of more than the factors of matrices, all of one rank.
_NOT_SERVED = ("modules_to_save", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias")
_ALSO_NOT = ("bias", "trainable_token_indices")
# Modules of Llama-family models.
_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")


def check_vllm(folder: str | Path) -> int:
    """Return the --max-lora-rank that vLLM needs to serve an adapter's folder; its default is 16.

    Raises:
      ValueError: vLLM would refuse the adapter, or serve it at another scale than it was trained with; says why.
    """
    peft = as_opened(folder)
    needed = _max_lora_rank(read_settings(peft).r)
    check_server(peft, "vllm")
    return needed


def check_server(folder: str | Path | PeftFolder, server: str) -> None:
    """Check that one of `SERVERS` serves an adapter's folder at the scale that it was trained with.

    SGLang (its issue 40835) and llama.cpp's converter take lora_alpha / r for the scale, whatever use_rslora says.

    Raises:
      ValueError: it would refuse the adapter, or serve it at another scale; says why.
    """
    peft, who = as_opened(folder), SERVERS[server]
    where, fields, settings = peft.folder / CONFIG_NAME, peft.fields, read_settings(peft)
    for name in (*_NOT_SERVED, *_ALSO_NOT):
        if fields.get(name) not in (None, False, [], {}, "none"):
            raise ValueError(f"{where} has {name}, which {who} does not serve: export it with --for {server}")
    if not isinstance(fields.get("use_rslora"), bool):
        raise ValueError(f"{where} does not say use_rslora, and readers differ on what that means: export it again")
    if settings.scaling == "rslora" and server != "vllm":
        raise ValueError(f"{where} has use_rslora, and {who} takes no account of it: export it with --for {server}")
    _check_factors(peft, settings.r, who)


def _check_factors(peft: PeftFolder, rank: int, who: str) -> None:
    """Check that all tensors are factors of this rank, of modules that are known."""
    path = peft.folder / WEIGHTS_NAME
    ranks: dict[str, dict[str, int]] = {}
    for name, tensor in peft.tensors.items():
        found = FACTOR.fullmatch(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
        if found is None:
            raise ValueError(f"{path} holds {shown(name)}, which is no factor of an adapter: {who} would refuse it")
        _check_module(found[1], who)
        factor = found[2] or found[3]
        if tensor.ndim != 2:
            raise ValueError(f"{path}: {shown(name)} has shape {tensor.shape}, and {who} serves matrices alone")
        ranks.setdefault(found[1], {})[factor] = tensor.shape[0 if factor == "A" else 1]
    for module, of in ranks.items():
        if of != {"A": rank, "B": rank}:
            raise ValueError(f"{path}: {shown(module)} has ranks {of}, where {CONFIG_NAME} says {rank}")


def _max_lora_rank(rank: int) -> int:
    """Return the least --max-lora-rank for a rank.

    >>> _max_lora_rank(24)
    32
    """
    for largest in _RANKS:
        if rank <= largest:
            return largest
    raise ValueError(
        f"rank {rank} is above {_RANKS[-1]}, the largest that vLLM serves: merge the adapter into its base"
    )


def _check_module(module: str, who: str) -> None:
    if module.rpartition(".")[2] not in _MODULES:
        raise ValueError(f"{who} has no adapter for {shown(module)}: exclude it, or merge the adapter into its base")


def check_options(server: str, use_rslora: bool | None) -> None:
    """Raise a ValueError for a server that is not known, or that would not see `use_rslora`."""
    if server not in SERVERS:
        raise ValueError(f"server={server!r} is not known: use {', '.join(SERVERS)}")
    if use_rslora and server != "vllm":
        raise ValueError(
            f"{SERVERS[server]} takes alpha / r whatever use_rslora says: leave it out, and that gives the same scale"
        )


def check_sites(lora: Lora, modules: Mapping[str, Iterable[str]], replaced: Any, server: str) -> None:
    """Raise a ValueError where a model's adapters cannot be written for one of `SERVERS`."""
    who = SERVERS[server]
    if isinstance(method_of(lora.config.method), DoRA):
        raise ValueError(f"{who} serves no DoRA: merge the adapter into its base, `rslora merge`")
    if whole := [path for path, site in lora.sites.items() if not site.scaled]:
        what = "that is trained whole" if lora.sites[whole[0]].kind == "trained" else "of which rows are trained"
        raise ValueError(f"{who} serves no weight {what} ({whole[0]}): merge the adapter into its base")
    if replaced:
        raise ValueError(
            f"{who} serves no weights that were replaced ({min(replaced)}): merge the adapter into its base"
        )
    if tied := [site.path for site in lora.sites.values() if site.tied]:
        raise ValueError(
            f"{tied[0]} is of a table that is also the head, and how {who} would serve its adapter depends on its "
            "version: merge the adapter into its base"
        )
    for of in modules.values():
        for module in of:
            _check_module(module, who)
