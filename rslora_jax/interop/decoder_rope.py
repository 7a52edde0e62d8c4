"""How a config.json asks for rotary embedding: its `rope_scaling`, or the `rope_parameters` of transformers 5."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rslora_jax.models import rope
from rslora_jax.models.rope import RopeScaling
from rslora_jax.shown import quoted, reason_of

_LARGEST = 1e30  # of any number
_ORIGINAL = "original_max_position_embeddings"
_YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
# What each kind is described by, beside what all may have; nothing else is passed over.
_KINDS: dict[str, tuple[str, ...]] = {
    "default": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
    "linear": ("factor",),
    "dynamic": ("factor", _ORIGINAL),
    "yarn": ("factor", _ORIGINAL, *_YARN),
    "longrope": ("factor", _ORIGINAL, "attention_factor", "short_factor", "long_factor"),
    "llama3": ("factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"),
}
_ALL = ("rope_theta", "rope_type", "type", "partial_rotary_factor")
_LAYERS = ("full_attention", "sliding_attention")


class Rope(NamedTuple):
    """What a configuration says: the base, how it is stretched, and the base where there is a window, if it says so."""

    base: float
    scaling: RopeScaling | None
    window_base: float | None


def read_rope(path: Path, found: Mapping[str, Any], *, head_dim: int, max_len: int, base: float) -> Rope:
    """Read how rotary embedding is computed, as transformers does; where its versions 4 and 5 differ, refuse.

    Args:
      path: of the config.json, for errors.
      found: its content.
      head_dim: the size of a head.
      max_len: its max_position_embeddings.
      base: `rope_theta`, where the file has none.

    Raises:
      ValueError: a kind or a field is not known, or a number is missing or makes no sense.
    """
    new, old = ({} if found.get(name) is None else found[name] for name in ("rope_parameters", "rope_scaling"))
    if not isinstance(new, dict) or not isinstance(old, dict) or (new and old and new != old):
        raise ValueError(
            f"{path} has rope_parameters={quoted(new, 40)} and rope_scaling={quoted(old, 40)}: one table "
            "of the two is read"
        )
    base = found.get("rope_theta", base)
    if found.get("model_type") == "gemma3_text" and set(new) & set(_LAYERS):
        whole, near = (new.get(name) or {} for name in _LAYERS)
        if set(new) - set(_LAYERS) or not isinstance(whole, dict) or not isinstance(near, dict):
            raise ValueError(f"{path} has rope_parameters={quoted(new, 40)}: only {' and '.join(_LAYERS)} are read")
        if near.get("rope_type", "default") != "default" or set(near) - {"rope_type", "rope_theta"}:
            raise ValueError(
                f"{path} has rope parameters {quoted(near, 40)} for windows: only 'default' is computed there"
            )
        window = _number(path, "rope_theta", near["rope_theta"]) if "rope_theta" in near else None
        return Rope(*_one(path, whole, found, head_dim, max_len, base, is_new=True), window)
    return Rope(*_one(path, new or old, found, head_dim, max_len, base, is_new=bool(new)), None)


def _one(
    path: Path, about: Mapping[str, Any], found: Mapping[str, Any], head_dim: int, max_len: int, base: Any, is_new: bool
) -> tuple[float, RopeScaling | None]:
    about = {name: value for name, value in about.items() if value is not None}
    kind = about.get("rope_type", about.get("type", "default"))
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"{path} has rope_type {quoted(kind, 40)}: only {', '.join(_KINDS)} are computed here")
    known = {*_ALL, *_KINDS[kind]}
    if not set(about) <= known:
        raise ValueError(
            f"{path} has rope parameters {quoted(about, 40)}: only {', '.join(sorted(known))} are known "
            f"for {quoted(kind, 40)}"
        )
    if about.get("partial_rotary_factor", 1) != 1:
        raise ValueError(
            f"{path} has partial_rotary_factor={quoted(about['partial_rotary_factor'])}: only 1 is computed here"
        )
    base = _number(path, "rope_theta", about.get("rope_theta", base))
    if kind == "default":
        return base, None

    def number(name: str, default: Any = None) -> float:
        return _number(path, name, about.get(name, default))

    original, factor = _lengths(path, about, found, kind, max_len, is_new)
    try:
        return base, _scaling(kind, about, number, head_dim=head_dim, base=base, factor=factor, original=original)
    except (ValueError, OverflowError, ZeroDivisionError) as error:
        text = (
            str(error)
            if str(path) in str(error)
            else f"{path} has rope parameters {quoted(about, 40)}: {reason_of(error)}"
        )
        raise ValueError(text) from error


def _lengths(
    path: Path, about: Mapping[str, Any], found: Mapping[str, Any], kind: str, max_len: int, is_new: bool
) -> tuple[int, float]:
    """Give the positions that the model was first trained on, and the factor."""
    own, outer = about.get(_ORIGINAL), found.get(_ORIGINAL)
    for value in (own, outer):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{path} has {_ORIGINAL}={quoted(value, 40)}: a whole number above 0 is expected")
    factor = _number(path, "factor", about["factor"]) if "factor" in about else None
    if kind == "dynamic":  # no version looks at another length than this
        readings = [(max_len, factor)] if own in (None, max_len) else []
    else:
        five = outer or own or max_len
        readings = [(five, max_len / five if factor is None and kind in ("yarn", "longrope") else factor)]
        if not is_new:  # version 4 is the one that wrote it
            ratio = kind == "longrope" and outer is not None
            four = (max_len if outer is None else outer) if kind == "longrope" else own or max_len
            readings.append((four, max_len / four if ratio else factor))
            if kind == "longrope" and "attention_factor" in about:  # then the factor does nothing
                readings = [(length, factor or 1.0) for length, _ in readings]
    if len(set(readings)) != 1:
        raise ValueError(
            f"{path} has {_ORIGINAL}={quoted(own, 40)} among its rope parameters, and {quoted(outer, 40)} beside "
            f"them, with max_position_embeddings={max_len} and factor={quoted(factor, 40)}: versions of transformers "
            "read this differently, so write the one that is meant in both places"
        )
    if kind == "llama3" and own is None:
        raise ValueError(f"{path} lacks {_ORIGINAL} among its rope parameters: a number above 0 is expected")
    return readings[0][0], _number(path, "factor", readings[0][1])


def _scaling(
    kind: str,
    about: Mapping[str, Any],
    number: Callable[..., float],
    *,
    head_dim: int,
    base: float,
    factor: float,
    original: int,
) -> RopeScaling:
    if kind == "linear":
        return rope.linear(head_dim, factor)
    if kind == "dynamic":
        return rope.dynamic(head_dim, factor, original)
    if kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        return rope.llama3(
            head_dim, base, factor, low_freq_factor=low, high_freq_factor=high, original_max_len=original
        )
    amplitude = number("attention_factor") if "attention_factor" in about else None
    if kind == "longrope":
        short, long = (_numbers(about.get(name), name, head_dim) for name in ("short_factor", "long_factor"))
        return rope.longrope(short, long, factor, original_max_len=original, amplitude=amplitude)
    if amplitude is None and about.get("mscale") and about.get("mscale_all_dim"):
        weights = (number("mscale"), number("mscale_all_dim"))
        above, below = (rope.yarn_amplitude(factor, weight) for weight in weights)
        amplitude = above / below
    if type(whole := about.get("truncate", True)) is not bool:
        raise ValueError(f"truncate={quoted(whole, 40)} is to be true or false")
    return rope.yarn(
        head_dim,
        base,
        factor,
        original_max_len=original,
        amplitude=amplitude,
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        whole=whole,
    )


def _number(path: Path, name: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < _LARGEST:
        raise ValueError(
            f"{path} has {name}={quoted(value, 40)} among its rope parameters: a number above 0 is expected"
        )
    return float(value)


def _numbers(value: Any, name: str, head_dim: int) -> list[float]:
    if not isinstance(value, list) or len(value) != head_dim // 2 or {type(one) for one in value} - {int, float}:
        raise ValueError(f"{name} is to be {head_dim // 2} numbers, one for each pair of a head's coordinates")
    return [float(one) for one in value]
