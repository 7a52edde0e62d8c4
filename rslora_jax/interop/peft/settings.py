"""What a PEFT adapter's adapter_config.json says, checked, and what PEFT's rules make of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rslora_jax import scaling
from rslora_jax.confined import Exceeded
from rslora_jax.interop.peft.files import CONFIG_NAME, PeftFolder
from rslora_jax.interop.peft.matching import Matcher
from rslora_jax.shown import in_json, quoted, shown

# What is read; the rest of PEFT's fields is either without effect on what the adapter computes, or refused.
_READ = {
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
    "use_dora",
    "lora_dropout",
    "bias",
    "trainable_token_indices",
}
_HARMLESS = {
    # where it came from and how it is loaded
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "peft_version",
    "runtime_config",
    # how the factors began, where that leaves the base as it was (`_INITS`)
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    # details of what is refused where it is asked for
    "megatron_core",
    "qalora_group_size",
    # how it is trained: the forward pass is LoRA's
    "velora_config",
}
_LARGEST = 2**31 - 1  # of ranks and alphas, beyond which nothing could be computed
_BIASES = ("none", "all", "lora_only")
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


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
    dora: bool
    dropout: float
    bias: str
    rows: Sequence[int] | Mapping[str, Sequence[int]]
    matcher: Matcher = dataclasses.field(repr=False, compare=False)

    def adapts(self, module: str) -> bool:
        """Say whether PEFT would adapt a module, by its name in the base; not for "all-linear"."""
        if isinstance(self.exclude, str):
            if self.exclude and self.matcher.first("fullmatch", (self.exclude,), module):
                return False
        elif ends_with(module, self.exclude):
            return False
        if self.matcher.first("match", tuple(rf"(^|.*\.){name}($|\..*)" for name in self.to_save), module):
            return False
        if isinstance(self.targets, str):
            return self.targeted(module)
        if module in self.targets:
            return True
        return ends_with(module, self.targets) and (not self.layers or self._layer(module) in self.layers)

    def targeted(self, module: str) -> bool:
        """Say whether the regular expression that is given for targets matches a module's name."""
        return bool(self.matcher.first("fullmatch", (str(self.targets),), module))

    def saves(self, module: str) -> bool:
        """Say whether the adapter replaces a module as a whole, or one that holds it; "norm" is also "layernorm"."""
        parts = module.split(".")
        holders = [".".join(parts[: n + 1]) for n in range(len(parts))]
        return any(holder.endswith(name) for holder in holders for name in self.to_save)

    def rank_and_alpha(self, module: str) -> tuple[int, float]:
        """Return a module's own: of the first pattern that matches the end of its name, from a dot on."""
        rank, alpha = self._own(self.rank_pattern, module, self.r), self._own(self.alpha_pattern, module, self.alpha)
        return rank, alpha

    def gamma(self, module: str) -> float:
        """Return the factor on a module's product B A."""
        return scaling.gamma(*self.rank_and_alpha(module), self.scaling)

    @property
    def all_linear(self) -> bool:
        """Whether every linear layer is adapted, which is then told by the weights' file alone."""
        return isinstance(self.targets, str) and self.targets.lower() == "all-linear"

    def _layer(self, module: str) -> int | None:
        patterns = tuple(rf"(?:^|.*?\.){p}\.(?P<number>\d+)\." for p in self.layers_pattern)
        found = self.matcher.first("match", patterns or (r".*?\.[^.]*\.(?P<number>\d+)\.",), module)
        return int(found[1]) if found and found[1] else None

    def _own(self, patterns: Mapping[str, Any], module: str, default: Any) -> Any:
        found = self.matcher.first("match", tuple(rf"(.*\.)?({pattern})$" for pattern in patterns), module)
        return patterns.get(module, default) if found is None else [*patterns.values()][found[0]]


def ends_with(module: str, names: Sequence[str]) -> bool:
    """Say whether a module's name is one of these, or ends with one after a dot."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def read_settings(peft: PeftFolder) -> PeftSettings:
    """Check the content of an adapter_config.json.

    Raises:
      ValueError: a field is damaged or asks for what this library does not compute; it is named.
    """
    fields = _Fields(peft.folder / CONFIG_NAME, peft.fields)
    _check_known(fields)
    for name in ("r", "lora_alpha", "target_modules"):
        if fields.of.get(name) is None:
            raise ValueError(f"{fields.where} lacks {name}: save the adapter again with PEFT")
    settings = PeftSettings(
        where=fields.where,
        r=fields.get("r", int, 0, "a whole number"),
        alpha=fields.get("lora_alpha", (int, float), 0, "a number"),
        scaling="rslora" if fields.get("use_rslora", bool, False, "true or false") else "lora",
        rank_pattern=fields.pattern("rank_pattern", int),
        alpha_pattern=fields.pattern("alpha_pattern", (int, float)),
        targets=fields.listed("target_modules", str, "a list of names, or a regular expression"),
        exclude=fields.listed("exclude_modules", str, "a list of names, or a regular expression"),
        layers=_several(fields.listed("layers_to_transform", int, "a list of numbers")),
        layers_pattern=_several(fields.listed("layers_pattern", str, "a list of names")),
        to_save=_several(fields.listed("modules_to_save", str, "a list of names")),
        transposed=fields.get("fan_in_fan_out", bool, False, "true or false"),
        tie=fields.get("ensure_weight_tying", bool, False, "true or false"),
        dora=fields.get("use_dora", bool, False, "true or false"),
        dropout=fields.get("lora_dropout", (int, float), 0.0, "a number"),
        bias=fields.get("bias", str, "none", "a word"),
        rows=fields.rows("trainable_token_indices"),
        matcher=Matcher(fields.where),
    )
    _check_values(fields, settings)
    return settings


@dataclasses.dataclass(frozen=True)
class _Fields:
    """The fields of a file, each given only where it is of the kind it is to be."""

    where: Path
    of: Mapping[str, Any]

    def get(self, name: str, kinds: Any, default: Any, wanted: str) -> Any:
        value = self.of.get(name)
        if value is None:
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise self.wrong(name, wanted)
        return value

    def listed(self, name: str, kind: Any, wanted: str) -> Any:
        value = self.get(name, (kind, list), [], wanted)
        if isinstance(value, list) and not all(isinstance(v, kind) and not isinstance(v, bool) for v in value):
            raise self.wrong(name, wanted)
        return value

    def pattern(self, name: str, kinds: Any) -> dict[str, Any]:
        value = self.get(name, dict, {}, "an object of patterns")
        if not all(isinstance(v, kinds) and not isinstance(v, bool) for v in value.values()):
            raise self.wrong(name, "an object of patterns and numbers")
        return value

    def rows(self, name: str) -> Any:
        value = self.get(name, (list, dict), [], "a list of numbers, or an object of such")
        for ids in value.values() if isinstance(value, dict) else [value]:
            if not isinstance(ids, list) or not all(type(n) is int and 0 <= n <= _LARGEST for n in ids):
                raise self.wrong(name, "a list of numbers, or an object of such")
            if len(set(ids)) < len(ids) or (isinstance(value, dict) and not ids):
                raise self.wrong(name, "of different numbers")
        return value

    def wrong(self, name: str, wanted: str) -> ValueError:
        return ValueError(f"{self.where} has {name}={in_json(self.of.get(name))}, which is not {wanted}")


def _check_known(fields: _Fields) -> None:
    """Refuse what this library does not compute."""
    where = fields.where
    if fields.of.get("peft_type") != "LORA":
        raise ValueError(f"{where} has peft_type {quoted(fields.of.get('peft_type'))}: only 'LORA' is read")
    for name, value in fields.of.items():
        if name in _READ | _HARMLESS or not value:  # whether this version knows it or not
            continue
        raise ValueError(
            f"{where} has {shown(name)}={in_json(value, 40)}, which this version does not compute: "
            "merge the adapter into its base with PEFT, and load that model"
        )
    init = fields.of.get("init_lora_weights")
    init = init.lower() if isinstance(init, str) else init
    if init not in _INITS or type(init) in (int, float):
        raise ValueError(
            f"{where} has init_lora_weights={quoted(init, 30)}, which changes the base's own weights: convert the "
            "adapter to a plain one with PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
        )


def _check_values(fields: _Fields, settings: PeftSettings) -> None:
    """Refuse ranks, scales and patterns that make no sense."""
    where = fields.where
    for rank in (settings.r, *settings.rank_pattern.values()):
        if not 1 <= rank <= _LARGEST:
            raise ValueError(f"{where} has rank {quoted(rank)}: an adapter needs a rank of 1 or more")
    for number in (settings.alpha, *settings.alpha_pattern.values()):
        if not 0 < number <= _LARGEST:
            raise ValueError(f"{where} has lora_alpha {quoted(number)}: it is to be a positive number")
    if not 0 <= settings.dropout < 1:
        raise ValueError(f"{where} has lora_dropout {quoted(settings.dropout)}: it is to be from 0 to below 1")
    if settings.bias not in _BIASES:
        raise ValueError(f"{where} has bias {quoted(settings.bias)}: it is to be one of {', '.join(_BIASES)}")
    patterns: dict[str, Iterable[str]] = {
        "rank_pattern": settings.rank_pattern,
        "alpha_pattern": settings.alpha_pattern,
        "target_modules": [settings.targets] if isinstance(settings.targets, str) else [],
        "exclude_modules": [settings.exclude] if isinstance(settings.exclude, str) else [],
        "layers_pattern": settings.layers_pattern,
        "modules_to_save": settings.to_save,
    }
    for name, several in patterns.items():
        for one in several:
            try:
                settings.matcher.first("match", (rf"({one})$",), "")
            except Exceeded:
                raise
            except ValueError as error:
                why = str(error.__cause__)
                raise ValueError(f"{where} has {name} {shown(one)}, which is no regular expression: {why}") from error


def _several(value: Any) -> Any:
    return [value] if isinstance(value, (str, int)) else value
