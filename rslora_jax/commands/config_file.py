"""Files of flags for `rslora train`: TOML or YAML, with tables or without."""

from __future__ import annotations

import argparse
import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rslora_jax.commands.habits import our_name
from rslora_jax.commands.train_flags import add_flags
from rslora_jax.shown import quoted, reason_of, shown

_NUMBERS = ("heldout", "epochs")  # flags that are numbers where they are given, and none by default


def read(path: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Read flags from a file, by their names with or without the leading dashes, as the command line takes them.

    A table that has no flag's name holds flags too, so that they can be grouped.

    Args:
      path: where the file is; YAML by .yaml or .yml, else TOML.
      flags: every flag that may stand in it, and its value where it is not given.

    Raises:
      ValueError: the file cannot be read, or has a key that is no flag or a value that its flag does not take.
    """
    kind = "YAML" if Path(path).suffix in (".yaml", ".yml") else "TOML"
    try:
        text = Path(path).read_text(encoding="utf-8")
        found = _of_yaml(text) if kind == "YAML" else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as {kind}: {reason_of(error)}") from error
    return _settings(path, found, flags)


def given(texts: Sequence[str], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Read flags of texts NAME=VALUE, the value as TOML has it or as it stands.

    Raises:
      ValueError: one is not of that form, no flag, or a value that its flag does not take.

    >>> given(["rank=8", "model=my-model"], {"rank": 32, "model": None})
    {'rank': 8, 'model': 'my-model'}
    """
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text} has no value: write it as --set rank=8")
        try:
            found[name] = tomllib.loads(f"x = {value}")["x"]
        except ValueError:
            found[name] = value
    return _settings("--set", found, flags)


def _of_yaml(text: str) -> dict[str, Any]:
    import yaml  # Flax asks for it

    def number(value: Any) -> Any:
        """Read 2e-4 as a number, which YAML 1.1 takes for a text."""
        if isinstance(value, dict):
            return {key: number(one) for key, one in value.items()}
        is_number = isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value)
        return float(value) if is_number else value

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError("it holds no names with values")
    return number(found)


def _settings(path: str, found: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values by flag of what a file holds."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    add_flags(parser)
    settings: dict[str, Any] = {}
    for key, value in _flat(found, flags).items():
        name = our_name(key).replace("-", "_")
        if name not in flags:
            close = difflib.get_close_matches(name, flags, n=1)
            hint = f"; did you mean {close[0].replace('_', '-')}?" if close else "; `rslora train --help` lists them"
            raise ValueError(f"{path} has {shown(key)}, which is no flag of `rslora train`{hint}")
        flag = f"--{name.replace('_', '-')}"
        words = _words(flag, value, 0 if flags[name] is None and name in _NUMBERS else flags[name])
        if words is None:
            raise ValueError(f"{path}: {shown(key)} = {quoted(value)} is not of the kind that {flag} takes")
        try:
            settings[name] = getattr(parser.parse_args(words), name)
        except argparse.ArgumentError as error:
            raise ValueError(f"{path}: {shown(key)} = {quoted(value)}: {reason_of(error)}") from error
    return settings


def _flat(found: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a file holds with the content of its tables beside the rest, but for a table that is a flag's value.

    >>> _flat({"adapters": {"rank": 8}, "rank-pattern": {"*/mlp/*": 4}}, {"rank": 32, "rank_pattern": []})
    {'rank': 8, 'rank-pattern': {'*/mlp/*': 4}}
    """
    flat: dict[str, Any] = {}
    for key, value in found.items():
        is_group = isinstance(value, dict) and our_name(key).replace("-", "_") not in flags
        for name, one in (_flat(value, flags) if is_group else {key: value}).items():
            if name in flat:
                raise ValueError(f"{shown(name)} stands in two places: keep one of them")
            flat[name] = one
    return flat


def _words(flag: str, value: Any, default: Any) -> list[str] | None:
    """Write a value of a file as the words of a command line; None where it is not of the kind of the flag's default.

    A table is what is given as NAME=VALUE on the command line.

    >>> _words("--rank", 3, 32), _words("--resume", True, False), _words("--prompt", ["a", "b"], [])
    (['--rank=3'], ['--resume'], ['--prompt=a', '--prompt=b'])
    >>> _words("--rank-pattern", {"*/mlp/*": 8}, [])
    ['--rank-pattern=*/mlp/*=8']
    """
    if isinstance(default, bool) or isinstance(value, bool):
        return ([flag] if value else []) if isinstance(default, bool) and isinstance(value, bool) else None
    if flag == "--data" and isinstance(value, dict | list):  # of which a command line takes several
        value = [f"{name}={one}" for name, one in value.items()] if isinstance(value, dict) else value
        return [f"{flag}={one}" for one in value] if value and all(isinstance(one, str) for one in value) else None
    if isinstance(value, list) and isinstance(default, str):  # of --targets
        return [f"{flag}={one}" for one in value] if value and all(isinstance(one, str) for one in value) else None
    if isinstance(default, list):
        value = [value] if isinstance(value, str) else value
        if isinstance(value, dict):
            value = [f"{name}={one}" for name, one in value.items() if isinstance(one, (str, int, float))] or value
        is_list = isinstance(value, list) and all(isinstance(one, str) for one in value)
        return [f"{flag}={one}" for one in value] if is_list else None
    kinds = (int, float) if isinstance(default, (int, float)) and value != "auto" else str
    return [f"{flag}={value}"] if isinstance(value, kinds) else None
