"""Names of modules where patterns are expected, as PEFT's users have them: "q_proj" for every weight of a q_proj."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from rslora_jax.config import LoraConfig, matches_adapter


def with_globs(config: LoraConfig, paths: Iterable[str]) -> LoraConfig:
    """Return a config whose bare names of modules are globs over paths.

    A name is of a module, with dots for the modules around it ("attn.q_proj"), where no parameter has it for its whole
    path: PEFT's `target_modules` are such names, and match the ends of modules' paths.

    Args:
      config: its targets, exclude, trained, trained_rows, rank_pattern and alpha_pattern are looked at.
      paths: those of all parameters.

    >>> paths = ["params/layers_0/attn/q_proj/kernel", "params/layers_0/attn/q_proj/bias", "params/head/kernel"]
    >>> with_globs(LoraConfig(targets=["q_proj", "*/head/*"], rank_pattern={"head": 3}), paths).targets
    ('*/q_proj/{bias,kernel}', '*/head/*')
    """
    paths = list(paths)

    def glob(pattern: str) -> str:
        return _glob_of(pattern, paths)

    def many(patterns: Any) -> Any:
        return glob(patterns) if isinstance(patterns, str) else tuple(map(glob, patterns))

    def of_pairs(pairs: Any) -> Any:
        return tuple((glob(pattern), value) for pattern, value in pairs)

    names = {name: many(getattr(config, name)) for name in ("targets", "exclude", "trained")}
    pairs = {name: of_pairs(getattr(config, name)) for name in ("trained_rows", "rank_pattern", "alpha_pattern")}
    changed = {name: value for name, value in {**names, **pairs}.items() if value != getattr(config, name)}
    return dataclasses.replace(config, **changed) if changed else config


def _glob_of(pattern: str, paths: Iterable[str]) -> str:
    """Return the glob over paths for the name of a module; what is no such name as it is.

    >>> _glob_of("attn.q_proj", ["attn/q_proj/w", "layers/0/attn/q_proj/w", "layers/0/attn/q_proj_2/w"])
    '{*/,}attn/q_proj/w'
    """
    paths = list(paths)
    if re.search(r"[*?\[\]{}/@]", pattern) or any(matches_adapter(path, pattern) for path in paths):
        return pattern
    name = pattern.split(".")
    before, behind = set[bool](), set[str]()
    for parts in (path.split("/") for path in paths):
        for whole, leaf in ((parts, ""), (parts[:-1], parts[-1])):
            if whole[-len(name) :] == name:
                before.add(len(whole) > len(name))
                behind.add(leaf)
    if not behind:
        return pattern
    start = "*/" if before == {True} else "{*/,}" if True in before else ""
    ends = sorted(f"/{leaf}" if leaf else "" for leaf in behind)
    if "" in ends:
        end = "" if len(ends) == 1 else f"{{{','.join(ends)}}}"
    else:
        leaves = ",".join(leaf[1:] for leaf in ends)
        end = f"/{leaves}" if len(ends) == 1 else f"/{{{leaves}}}"
    return start + "/".join(name) + end
