"""What the flags of `rslora train` are where they are not given: those of a file, of the run that is resumed."""

from __future__ import annotations

import argparse
import difflib
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_OF_A_CALL = ("config", "resume")  # flags of one call of the command, and not of a run
_PATHS = ("data", "model", "cache", "adapters")


def file_settings(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """Return the settings of the file --config."""
    return _read_settings(arguments.config, vars(arguments)) if arguments.config else {}


def resumed_settings(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """Return the settings of the run that --resume goes on with."""
    return _saved_settings(arguments.out) if arguments.resume else {}


def _read_settings(path: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Read flags from a TOML file, by their names with or without the leading dashes.

    Args:
      path: where the file is.
      flags: every flag and its value where it is not given, which tells of what kind it is.

    Raises:
      ValueError: the file cannot be read, or has a key that is no flag or a value of another kind; it is named.
    """
    try:
        found = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} cannot be read as TOML: {error}") from error
    settings = {}
    for key, value in found.items():
        name = key.lstrip("-").replace("-", "_")
        if name not in flags or name in _OF_A_CALL:
            close = difflib.get_close_matches(name, flags, n=1)
            hint = f"; did you mean {close[0].replace('_', '-')}?" if close else "; `rslora train --help` lists them"
            raise ValueError(f"{path} has {key}, which is no flag of `rslora train`{hint}")
        default = flags[name]
        kinds = (int, float) if isinstance(default, float) else type(default) if default is not None else str
        if not isinstance(value, kinds) or (isinstance(value, bool) and not isinstance(default, bool)):
            raise ValueError(f"{path}: {key} = {value!r} is not of the kind that --{key} takes")
        settings[name] = float(value) if isinstance(default, float) else value
    return settings


def _saved_settings(out: str) -> dict[str, Any]:
    """Return what the run in a folder was started with.

    Raises:
      ValueError: the folder has no run to go on with.
    """
    from rslora_jax.store import checkpoint

    checkpoint.check_folder(out, resume=True)
    settings = checkpoint.load_about(out)["settings"]
    if "imported" in settings:
        raise ValueError(
            f"{out} was imported and has no training to resume: start from it in another folder, with "
            f"rslora train --adapters {shlex.quote(out)} --out FOLDER"
        )
    return dict(settings)


def settings_to_save(arguments: argparse.Namespace, config: Any) -> dict[str, Any]:
    """Return the flags of a run, with its adapters' own rank, alpha and scaling, as plain JSON values.

    Paths are absolute, so that a run can be resumed from another folder.
    """
    kept = {name: value for name, value in vars(arguments).items() if name not in (*_OF_A_CALL, "out")}
    kept |= {name: getattr(config, name) for name in ("rank", "alpha", "scaling")}
    # A model may be a name on the hub, which is no path.
    paths = [name for name in _PATHS if kept[name] and (name != "model" or Path(kept["model"]).exists())]
    return kept | {name: str(Path(kept[name]).absolute()) for name in paths}
