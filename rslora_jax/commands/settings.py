"""What the flags of `rslora train` are where they are not given: those of a file, of the run that is resumed."""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rslora_jax.commands import config_file
from rslora_jax.commands.sources import rewritten, shown_data
from rslora_jax.commands.train_flags import STEPS
from rslora_jax.interop.held import held_as

OF_A_CALL = ("config", "set", "resume", "override", "plan")  # flags of one call of the command, and not of a run
_PATHS, _NAMES = ("cache", "adapters"), ("data", "eval_data", "model")
# Flags that decide nothing of what is learnt; --steps does by its schedule, and is what a run is gone on with by.
_FREE = (
    *("out", "model", "cache", "steps", "epochs", "patience", "on_nonfinite", "remat", "attention", "mesh"),
    *("split_rank", "distributed", "eval_every", "save_every", "keep", "tensorboard"),
)
_OF_THE_ADAPTERS = (
    *("rank", "alpha", "scaling", "targets", "exclude", "rank_pattern", "alpha_pattern", "trained", "new_tokens"),
    *("method", "start", "dropout", "init", "allow_large_rank"),
    *("adapters", "param_dtype", "quantize", "dequantize"),
)
# What of a run `fit` is to let differ for a flag; for all others that decide, the data and what is held out.
_OF_FIT: Mapping[str, tuple[str, ...]] = {
    "accumulate": ("accumulate",),
    "heldout": ("heldout", "data"),
    "seed": ("data",),
    "dtype": (),
    **dict.fromkeys(
        (
            "steps",
            "learning_rate",
            "lora_plus",
            "freeze",
            "schedule",
            "warmup",
            "clip",
            "optimizer",
            "optimizer_option",
            "moments",
        ),
        ("optimizer",),
    ),
}


def file_settings(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """Return the settings of the file --config, and those of --set, which go before them."""
    flags = {name: value for name, value in vars(arguments).items() if name not in OF_A_CALL}
    of_file = config_file.read(arguments.config, flags) if arguments.config else {}
    return {**of_file, **config_file.given(arguments.set, flags)}


def resumed_settings(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """Return the settings of the run that --resume goes on with; a file that is given too goes before them."""
    return {**_saved_settings(arguments.out), **file_settings(arguments)} if arguments.resume else {}


def _saved_settings(out: str) -> dict[str, Any]:
    """Return what the run in a folder was started with.

    Raises:
      ValueError: the folder has no run to go on with.
    """
    from rslora_jax.store import checkpoint

    checkpoint.check_folder(out, resume=True)
    settings = {name: value for name, value in _settings_of(checkpoint.load_about(out)).items() if name != "examples"}
    settings.pop("epochs", None)  # --steps says how many those were
    if "imported" in settings:
        raise ValueError(
            f"{out} was imported and has no training to resume: start from it in another folder, with "
            f"rslora train --adapters {shlex.quote(out)} --out FOLDER"
        )
    return settings


def _settings_of(about: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a run was started with; of one that does not tell how its base was held, its checksums do."""
    return {**held_as(about["base"]), **about["settings"]}


def check_course(arguments: argparse.Namespace) -> None:
    """Compare the flags of a run that is resumed with those that it was started with.

    Raises:
      ValueError: one that decides what is learnt differs and is not in --override; or no step is left to do.
    """
    from rslora_jax.store import checkpoint

    overridden = _overridden(arguments)
    about = checkpoint.load_about(arguments.out)
    here, saved = _absolute(vars(arguments)), _settings_of(about)
    decide = [name for name in here if name in saved and name not in (*_FREE, *OF_A_CALL, "examples")]
    if "examples" in saved:
        # The examples are compared, wherever they lie and whatever their keys are called.
        decide = [name for name in decide if name not in ("data", "eval_data", "columns", "skip_bad")]
    differing = [name for name in decide if here[name] != saved[name]]
    for name in differing:
        said = f"{_said(name, here[name])} here, {_said(name, saved[name], flag=False)} was saved"
        if name in _OF_THE_ADAPTERS:
            raise ValueError(
                f"{said}: leave it out to go on with the run in {arguments.out}, or start another one in another folder"
            )
        if name not in overridden:
            raise ValueError(_refused(said, name, arguments))
    if arguments.epochs is None:
        _check_steps(arguments)


def _check_steps(arguments: argparse.Namespace) -> None:
    """Raise a ValueError where a run that is resumed has no step left to do."""
    from rslora_jax.store import checkpoint

    step = checkpoint.load_about(arguments.out).get("data", {}).get("batch", 0)
    if step >= arguments.steps:
        raise ValueError(f"{arguments.out} is already at step {step}: ask for more than {step} --steps to go on")


def check_length(arguments: argparse.Namespace) -> None:
    """Raise a ValueError where both --epochs and --steps say how long a new run is."""
    if arguments.epochs is not None and arguments.steps != STEPS and not arguments.resume:
        both = f"--epochs {arguments.epochs:g} and --steps {arguments.steps}"
        raise ValueError(f"{both} both say how long the run is: leave one of them out")


def settle_steps(arguments: argparse.Namespace, steps_an_epoch: float) -> None:
    """Make --steps of --epochs, where these are asked for."""
    if arguments.epochs is None:
        return
    arguments.steps = math.ceil(arguments.epochs * steps_an_epoch)
    print(f"{arguments.epochs:g} epochs are {arguments.steps:,} steps", flush=True)
    if arguments.resume:
        _check_steps(arguments)


def check_examples(arguments: argparse.Namespace, examples: Mapping[str, Any]) -> None:
    """Compare the examples of a run that is resumed (`examples_to_save`) with those that it was started with.

    Raises:
      ValueError: they differ, and --override does not say that they may.
    """
    from rslora_jax.store import checkpoint

    saved = checkpoint.load_about(arguments.out)["settings"]
    before, overridden = saved.get("examples", examples), _overridden(arguments)
    may = {"data", "eval_data", "heldout", "columns", "skip_bad"} & overridden
    differing = [kind for kind in ("training", "heldout") if before[kind] != examples[kind] and not may]
    mixed = [of.get("mixed") for of in (before, examples)]
    if mixed[0] != mixed[1] and not may:
        said = f"{shown_data(arguments.data)} mixes its files by other shares than when the run was saved"
        raise ValueError(_refused(said, "data", arguments))
    if differing:
        here, there = _absolute(vars(arguments))["data"], saved["data"]
        what = f"--data {shown_data(arguments.data)}" if arguments.data else "the library of this Python"
        where = f"than {shown_data(there)}" if here != there else "than when the run was saved"
        kind = "holds other examples" if "training" in differing else "holds out other examples"
        raise ValueError(_refused(f"{what} {kind} {where}", "data", arguments))


def of_fit(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Return what of the run's course `train.fit` is to let differ."""
    from rslora_jax.store import checkpoint

    if not arguments.resume:
        return ()
    stretched = checkpoint.load_about(arguments.out)["settings"].get("steps") != arguments.steps
    names = [*_overridden(arguments), *(["steps"] if stretched else [])]
    return tuple({one for name in names for one in _OF_FIT.get(name, ("data", "heldout"))})


def _overridden(arguments: argparse.Namespace) -> set[str]:
    """Return the flags that --override names.

    Raises:
      ValueError: it names none that can be changed, or no run is resumed.
    """
    names = {text.lstrip("-").replace("-", "_") for text in arguments.override}
    if names and not arguments.resume:
        raise ValueError("--override is for --resume: a new run takes what it is given")
    for name in sorted(names):
        flag = name.replace("_", "-")
        if name not in vars(arguments) or name in OF_A_CALL:
            close = difflib.get_close_matches(name, vars(arguments), n=1)
            hint = f"; did you mean {close[0].replace('_', '-')}?" if close else ""
            raise ValueError(f"--override {flag} names no flag of `rslora train`{hint}")
        if name in _OF_THE_ADAPTERS:
            raise ValueError(f"--override {flag}: the adapters are made with --{flag}, so start another run with it")
    return names


def _said(name: str, value: Any, *, flag: bool = True) -> str:
    """Write a flag and its value.

    >>> _said("batch_size", 4), _said("optimizer_option", ["b1=0.5"], flag=False), _said("data", None)
    ('--batch-size 4', 'b1=0.5', 'no --data')
    """
    text = " ".join(value) if isinstance(value, list) else value
    absent = value is None or value == [] or value is False
    if not flag:
        return "none" if absent else str(text)
    if absent or value is True:
        return f"{'no ' * absent}--{name.replace('_', '-')}"
    return f"--{name.replace('_', '-')} {text}"


def _refused(said: str, name: str, arguments: argparse.Namespace) -> str:
    flag = name.replace("_", "-")
    return (
        f"{said}: leave it as it was to go on with the run in {arguments.out}, or change it on purpose with "
        f"--override {flag}"
    )


def rule_of(arguments: argparse.Namespace) -> int:
    """Return by which rule examples are held out (`heldout.Asked`): a run that is resumed keeps its own."""
    from rslora_jax.store import checkpoint

    if not arguments.resume:
        return 2
    return int(checkpoint.load_about(arguments.out)["settings"].get("examples", {}).get("rule", 1))


def examples_to_save(
    training: Sequence[Any], heldout: Sequence[Any], rule: int = 2, mixed: Sequence[float] = ()
) -> dict[str, Any]:
    """Return a checksum of the examples of each kind, in their order: of the files' content and of how it was split.

    `mixed` are the weights of files that are mixed by such.

    >>> from rslora_jax.train import Example
    >>> one, two = [Example("1+1=", "2", origin="a:1")], [Example("1+1=", "2", origin="b:7")]
    >>> examples_to_save(one, []) == examples_to_save(two, []), examples_to_save(one, two) == examples_to_save(two, [])
    (True, False)
    """
    return {"training": _digest(training), "heldout": _digest(heldout), "rule": rule} | (
        {"mixed": list(mixed)} if mixed else {}
    )


def _digest(examples: Sequence[Any]) -> str:
    from rslora_jax.train.examples import as_plain

    every = hashlib.sha256()
    for example in examples:
        every.update(json.dumps(as_plain(example)).encode() + b"\n")
    return every.hexdigest()


def settings_to_save(arguments: argparse.Namespace, config: Any) -> dict[str, Any]:
    """Return the flags of a run, with its adapters' own rank, alpha and scaling, as plain JSON values.

    Paths are absolute, so that a run can be resumed from another folder.
    """
    kept = {name: value for name, value in vars(arguments).items() if name not in (*OF_A_CALL, "out")}
    return _absolute(kept | {name: getattr(config, name) for name in ("rank", "alpha", "scaling", "dropout")})


def _absolute(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return flags with absolute paths."""

    def one(path: str) -> str:
        return str(Path(path).absolute()) if Path(path).exists() else path

    # A model and data may be names on the hub, which are no paths.
    named = {name: rewritten(flags[name], one) for name in _NAMES}
    return {**flags, **named, **{name: str(Path(flags[name]).absolute()) for name in _PATHS if flags[name]}}
