"""Read a PEFT adapter's configuration: which modules of the model it adapts, of which rank, at which scale."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rslora_jax import scaling
from rslora_jax.config import LoraConfig
from rslora_jax.interop.names import LLAMA, Names, Place, places
from rslora_jax.interop.peft.files import adapted_in, read_json
from rslora_jax.wrap import array_leaves

CONFIG_NAME = "adapter_config.json"
HEAD = "lm_head.weight"
TABLE = "embed_tokens.weight"

# What is read; the rest of PEFT's fields is either without effect on what the adapter computes, or refused.
READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "fan_in_fan_out",
    "init_lora_weights",
    "ensure_weight_tying",
}
HARMLESS = {
    # where it came from and how it is loaded
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "peft_version",
    "runtime_config",
    # training only
    "lora_dropout",
    # how the factors began, where that leaves the base as it was (`INITS`)
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    # details of what is refused where it is asked for
    "megatron_core",
    "qalora_group_size",
}
# What a field may hold beside null, false and empty; others are refused, whether this version knows them or not.
NEUTRAL = {"bias": "none"}
INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftSettings:
    """What an adapter_config.json says, checked. `scaling` is "rslora" or "lora"; the rest as in PEFT."""

    where: Path
    r: int
    alpha: float
    scaling: str
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    targets: str | Sequence[str]
    exclude: str | Sequence[str]
    layers: Sequence[int]
    layers_pattern: Sequence[str]
    to_save: Sequence[str]
    transposed: bool
    tie: bool

    def adapts(self, module: str) -> bool:
        """Say whether PEFT would adapt a module, by its name in the base; not for "all-linear"."""
        if isinstance(self.exclude, str):
            if self.exclude and re.fullmatch(self.exclude, module):
                return False
        elif ends_with(module, self.exclude):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.to_save):
            return False
        if isinstance(self.targets, str):
            return bool(re.fullmatch(self.targets, module))
        if module in self.targets:
            return True
        return ends_with(module, self.targets) and (not self.layers or self._layer(module) in self.layers)

    def saves(self, module: str) -> bool:
        """Say whether the adapter replaces a module as a whole, or one that holds it; "norm" is also "layernorm"."""
        parts = module.split(".")
        holders = [".".join(parts[: n + 1]) for n in range(len(parts))]
        return any(holder.endswith(name) for holder in holders for name in self.to_save)

    def rank_and_alpha(self, module: str) -> tuple[int, float]:
        """Return a module's own: of the first pattern that matches the end of its name, from a dot on."""
        return of_module(self.rank_pattern, module, self.r), of_module(self.alpha_pattern, module, self.alpha)

    def gamma(self, module: str) -> float:
        """Return the factor on a module's product B A."""
        return scaling.gamma(*self.rank_and_alpha(module), self.scaling)

    @property
    def all_linear(self) -> bool:
        return isinstance(self.targets, str) and self.targets.lower() == "all-linear"

    def _layer(self, module: str) -> int | None:
        patterns = [rf"(?:^|.*?\.){p}\.(?P<number>\d+)\." for p in self.layers_pattern]
        for pattern in patterns or [r".*?\.[^.]*\.(?P<number>\d+)\."]:
            if found := re.match(pattern, module):
                return int(found["number"])
        return None


def ends_with(module: str, names: Sequence[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def of_module(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return patterns.get(module, default)


def read_settings(folder: str | Path) -> PeftSettings:
    """Read and check adapter_config.json.

    Raises:
      ValueError: it cannot be read, or a field asks for what this library does not compute; the field is named.
    """
    where = Path(folder) / CONFIG_NAME
    fields = read_json(where)
    if fields.get("peft_type") != "LORA":
        raise ValueError(f"{where} has peft_type {fields.get('peft_type')!r}: only 'LORA' is read")
    for name, value in fields.items():
        if name in READ | HARMLESS or not value or NEUTRAL.get(name) == value:
            continue
        raise ValueError(
            f"{where} has {name}={json.dumps(value)[:80]}, which this version does not compute: "
            "merge the adapter into its base with PEFT, and load that model"
        )
    init = fields.get("init_lora_weights")
    init = init.lower() if isinstance(init, str) else init
    if init not in INITS or type(init) in (int, float):
        raise ValueError(
            f"{where} has init_lora_weights={init!r}, which changes the base's own weights: convert the adapter to a "
            "plain one with PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
        )

    def wrong(name: str, wanted: str) -> ValueError:
        return ValueError(f"{where} has {name}={json.dumps(fields.get(name))[:80]}, which is not {wanted}")

    def get(name: str, kinds: Any, default: Any, wanted: str) -> Any:
        value = fields.get(name)
        if value is None:
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise wrong(name, wanted)
        return value

    def listed(name: str, kind: Any, wanted: str) -> Any:
        value = get(name, (kind, list), [], wanted)
        if isinstance(value, list) and not all(isinstance(v, kind) and not isinstance(v, bool) for v in value):
            raise wrong(name, wanted)
        return value

    def pattern(name: str, kinds: Any) -> dict[str, Any]:
        value = get(name, dict, {}, "an object of patterns")
        if not all(isinstance(v, kinds) and not isinstance(v, bool) for v in value.values()):
            raise wrong(name, "an object of patterns and numbers")
        check_patterns(name, value)
        return value

    def check_patterns(name: str, patterns: Any) -> None:
        for one in patterns:
            try:
                re.compile(rf"({one})$")
            except re.error as error:
                raise ValueError(f"{where} has {name} {one!r}, which is no regular expression: {error}") from error

    for name in ("r", "lora_alpha", "target_modules"):
        if fields.get(name) is None:
            raise ValueError(f"{where} lacks {name}: save the adapter again with PEFT")
    rank_pattern, alpha_pattern = pattern("rank_pattern", int), pattern("alpha_pattern", (int, float))
    r, alpha = get("r", int, 0, "a whole number"), get("lora_alpha", (int, float), 0, "a number")
    for rank in (r, *rank_pattern.values()):
        if rank < 1:
            raise ValueError(f"{where} has rank {rank}: an adapter needs a rank of 1 or more")
    for number in (alpha, *alpha_pattern.values()):
        if not 0 < number < math.inf:
            raise ValueError(f"{where} has lora_alpha {number}: it is to be a positive number")
    one_or_more: Any = lambda value: [value] if isinstance(value, (str, int)) else value
    settings = PeftSettings(
        where=where,
        r=r,
        alpha=alpha,
        scaling="rslora" if get("use_rslora", bool, False, "true or false") else "lora",
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        targets=listed("target_modules", str, "a list of names, or a regular expression"),
        exclude=listed("exclude_modules", str, "a list of names, or a regular expression"),
        layers=one_or_more(listed("layers_to_transform", int, "a list of numbers")),
        layers_pattern=one_or_more(listed("layers_pattern", str, "a list of names")),
        to_save=one_or_more(listed("modules_to_save", str, "a list of names")),
        transposed=get("fan_in_fan_out", bool, False, "true or false"),
        tie=get("ensure_weight_tying", bool, False, "true or false"),
    )
    for name, value in (("target_modules", settings.targets), ("exclude_modules", settings.exclude)):
        check_patterns(name, [value] if isinstance(value, str) and not settings.all_linear else [])
    check_patterns("layers_pattern", settings.layers_pattern)
    check_patterns("modules_to_save", settings.to_save)
    if settings.to_save and settings.transposed:
        raise ValueError(f"{where} has both modules_to_save and fan_in_fan_out: the layout of its weights is unknown")
    return settings


def base_of(folder: str | Path) -> str | None:
    """Return what an adapter's configuration calls its base: a folder or a name on the hub; None where it does not."""
    name = read_json(Path(folder) / CONFIG_NAME).get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def modules_of(found: Mapping[str, Place], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """Return the places of modules that could have adapters, by their Hugging Face names: matrices and kernels."""
    matrices = {n: p for n, p in found.items() if len(shapes[p.path]) - (p.layer is not None) >= 2}
    return {n.removesuffix(".weight"): place for n, place in matrices.items() if n.endswith(".weight")}


def tied_table(names: Names, found: Mapping[str, Place]) -> str | None:
    """Return the module of the token table that also serves as the head: the table of names has a head, the model none.

    PEFT has two modules there, each with its own adapter; here they are one weight, with one.
    """
    if HEAD not in names.values() or HEAD in found:
        return None
    return next((n.removesuffix(".weight") for n in found if n.endswith(TABLE)), None)


def adapted_modules(settings: PeftSettings, modules: Mapping[str, Place], table: str | None) -> list[str]:
    """Return the modules that an adapter adapts, of those that the model has, in its order.

    Raises:
      ValueError: there is none, or it adapts one of the two uses of a tied table alone.
    """
    asked = adapted_in(settings.where.parent) if settings.all_linear else None
    adapts = (lambda module: module in asked) if asked is not None else settings.adapts
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


def read_config(folder: str | Path, params: Any, names: Names = LLAMA) -> LoraConfig:
    """Read a PEFT adapter's configuration as the `LoraConfig` that gives these parameters its adapters.

    Every adapted weight is named by its path, with its own rank and alpha where PEFT's patterns give it one. A weight
    that holds all layers has one rank and one scale here: those of the layer with the largest rank. `load_peft` fills
    smaller ranks up with zeros and takes the difference of the scales into B; a layer without an adapter gets zeros.

    Args:
      folder: with adapter_config.json, as PEFT saves it.
      params: the base's parameters, arrays or shapes.
      names: their Hugging Face names.

    Raises:
      ValueError: the configuration is damaged, asks for what this library does not compute, or does not fit the model.
    """
    settings = read_settings(folder)
    shapes = {path: tuple(leaf.shape) for path, leaf in array_leaves(params).items()}
    found = places(names, shapes)
    modules = modules_of(found, shapes)
    own: dict[str, tuple[int, float]] = {}
    for module in adapted_modules(settings, modules, tied_table(names, found)):
        path, pair = modules[module].path, settings.rank_and_alpha(module)
        own[path] = pair if path not in own or pair[0] > own[path][0] else own[path]
    return LoraConfig(
        rank=settings.r,
        alpha=settings.alpha,
        scaling=settings.scaling,
        targets=[literal(path) for path in own],
        rank_pattern=[(literal(path), rank) for path, (rank, _) in own.items() if rank != settings.r],
        alpha_pattern=[(literal(path), alpha) for path, (_, alpha) in own.items() if alpha != settings.alpha],
        allow_large_rank=True,  # PEFT sets no bound
    )


def literal(path: str) -> str:
    """Write a path as a glob that matches it.

    >>> literal("params/w[0]")
    'params/w[[]0]'
    """
    return re.sub(r"[{}]", "?", re.sub(r"[*?\[]", r"[\g<0>]", path))
