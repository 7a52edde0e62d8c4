"""How GGUF files hold a decoder: its figures, its weights' names, and what they have otherwise than Hugging Face.

What an entry means, and what holds where there is none, is in llama.cpp's src/models and src/llama-model.cpp.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rslora_jax.interop.family import GgufForm
from rslora_jax.interop.names import Names, Weight
from rslora_jax.models import rope
from rslora_jax.models.decoder_config import LARGEST_HEAD, LARGEST_SIZE, MOST_LAYERS, DecoderConfig
from rslora_jax.models.rope import RopeScaling
from rslora_jax.shown import quoted, shown

if TYPE_CHECKING:  # it needs the library `gguf`, which a family in itself does not
    from rslora_jax.interop.gguf_file import GgufTensor

# The largest of what is made of as many parts before weights are looked at.
_MOST = {"block_count": MOST_LAYERS, "attention.key_length": LARGEST_HEAD}
_HEAD, _DIVISORS = "output.weight", "rope_freqs.weight"
_MATRICES = {
    "attn/q_proj/kernel": "attn_q.weight",
    "attn/k_proj/kernel": "attn_k.weight",
    "attn/v_proj/kernel": "attn_v.weight",
    "attn/o_proj/kernel": "attn_output.weight",
    "mlp/gate_proj/kernel": "ffn_gate.weight",
    "mlp/up_proj/kernel": "ffn_up.weight",
    "mlp/down_proj/kernel": "ffn_down.weight",
}
_VECTORS = {
    "attn_norm/scale": "attn_norm.weight",
    "attn/q_proj/bias": "attn_q.bias",
    "attn/k_proj/bias": "attn_k.bias",
    "attn/v_proj/bias": "attn_v.bias",
    "attn/q_norm/scale": "attn_q_norm.weight",
    "attn/k_norm/scale": "attn_k_norm.weight",
    "mlp_norm/scale": "ffn_norm.weight",
    "attn_post_norm/scale": "post_attention_norm.weight",
    "mlp_pre_norm/scale": "ffn_norm.weight",
    "mlp_post_norm/scale": "post_ffw_norm.weight",
}

_NAMES: Names = {
    "params/embed/embedding": Weight("token_embd.weight"),
    "params/norm/scale": Weight("output_norm.weight"),
    "params/lm_head/kernel": Weight(_HEAD, transposed=True),
    **{
        f"params/{layers}/{path}": Weight(f"blk.{{i}}.{name}", path in _MATRICES)
        for layers in ("layers_{i}", "layers")
        for path, name in (_MATRICES | _VECTORS).items()
    },
}

_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")
_WINDOWED = {"gemma2": 2, "gemma3": 6}  # of so many layers one sees all
# The layers of the one size of which queries are divided otherwise than by their own size.
_BY_WIDTH = {"gemma2": 46, "gemma3": 62}
# Entries that are read, and those that change nothing that is computed here: any other might.
_LENGTHS = ("vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length", "expert_count")
_ATTENTION = ("head_count", "head_count_kv", "key_length", "value_length", "layer_norm_rms_epsilon")
_ROPE = ("dimension_count", "freq_base", "scale_linear")
_STRETCHED = ("type", "factor", "original_context_length", "attn_factor", "finetuned")
_YARN = ("yarn_ext_factor", "yarn_beta_fast", "yarn_beta_slow")
_KNOWN = {
    *_LENGTHS,
    *(f"attention.{name}" for name in _ATTENTION),
    *(f"rope.{name}" for name in _ROPE),
    *(f"rope.scaling.{name}" for name in _STRETCHED + _YARN),
    # These are of other norms than ours, of experts, and of how the file was made.
    *("attention.layer_norm_epsilon", "expert_used_count", "tensor_data_layout"),
}
_OF_WINDOWS = {
    *("attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
}

_Get = Callable[..., Any]  # get(name, default=None): the value of an entry of the architecture's own
_Number = Callable[..., Any]  # number(name, of, default=None): a number above 0


def _read_gguf_config(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor], **how: Any
) -> DecoderConfig:
    """Read a decoder's configuration.

    Args:
      path: of the file, for errors.
      metadata: its entries by name.
      tensors: its tensors by name.
      how: scan_layers, remat, param_dtype and dtype of the `DecoderConfig`.

    Raises:
      ValueError: an entry is missing, or asks for what is not computed here; it is named.
    """
    kind = metadata["general.architecture"]

    def get(name: str, default: Any = None) -> Any:
        value = metadata.get(f"{kind}.{name}", default)
        if isinstance(value, list):
            if not value or any(one != value[0] for one in value):
                raise ValueError(f"{path} has {kind}.{name} for each layer apart: only one for all is read")
            value = value[0]
        if value is None:
            raise ValueError(f"{path} lacks {kind}.{name}: take a file that was converted whole")
        return value

    def number(name: str, of: Any, default: Any = None) -> Any:
        value = get(name, default)
        most = _MOST.get(name, LARGEST_SIZE) if of is int else sys.float_info.max
        if type(value) is not of or not 0 < value <= most:
            raise ValueError(f"{path} has {kind}.{name}={quoted(value)}: a number above 0 is expected")
        return value

    heads, width = number("attention.head_count", int), number("embedding_length", int)
    head_dim = number("attention.key_length", int, width // heads)
    _check(path, kind, metadata, get, head_dim)
    base = number("rope.freq_base", float, 10000.0)
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    figures = dict(
        vocab_size=number("vocab_size", int, (len(tokens) if isinstance(tokens, list) else 0) or None),
        width=width,
        mlp_width=number("feed_forward_length", int),
        num_layers=number("block_count", int),
        num_heads=heads,
        num_kv_heads=number("attention.head_count_kv", int, heads),
        head_dim=head_dim,
        rope_base=base,
        norm_eps=number("attention.layer_norm_rms_epsilon", float),
        max_len=number("context_length", int),
        tie_head=_HEAD not in tensors,
        qkv_bias=kind == "qwen2",
        qk_norm=kind in ("qwen3", "gemma3"),
    )
    if kind.startswith("gemma"):
        figures |= dict(activation="gelu_tanh", norm_offset=1.0, embed_scale=width**0.5)
    if kind in _WINDOWED:
        figures |= _windows(path, kind, figures, get, number)
    try:
        figures["rope_scaling"] = _scaling(tensors, get, number, head_dim, base, figures["max_len"])
        return DecoderConfig(**figures, **how)
    except (ValueError, OverflowError, ZeroDivisionError) as error:
        raise ValueError(text if (text := str(error)).startswith(str(path)) else f"{path}: {text}") from error


def _check(path: Path, kind: str, metadata: Mapping[str, Any], get: _Get, head_dim: int) -> None:
    """Refuse what would be computed otherwise."""
    known = _KNOWN | (_OF_WINDOWS if kind in _WINDOWED else set())
    for name in metadata:
        if name.startswith(f"{kind}.") and name.removeprefix(f"{kind}.") not in known:
            entry = f"{shown(name)}={quoted(metadata[name])}"
            raise ValueError(f"{path} has {entry}: what it asks for is not computed here")
    for name, plain in (
        ("expert_count", 0),
        ("rope.dimension_count", head_dim),
        ("attention.value_length", head_dim),
        ("rope.scaling.attn_factor", 1.0),
        ("rope.scaling.yarn_ext_factor", 1.0),
    ):
        if (found := get(name, plain)) != plain:
            raise ValueError(f"{path} has {kind}.{name}={quoted(found)}: only {plain!r} is computed here")


def _windows(path: Path, kind: str, figures: Mapping[str, Any], get: _Get, number: _Number) -> dict[str, Any]:
    """Give what Gemma 2 and 3 add: windows, norms behind, the size that scores are divided by, caps."""
    layers, width, heads = figures["num_layers"], figures["width"], figures["num_heads"]
    every = number("attention.sliding_window_pattern", int, _WINDOWED[kind])
    found = dict(
        post_norms=True,
        window=number("attention.sliding_window", int, 4096 if kind == "gemma2" else None),
        window_layers=tuple(bool(n % every) for n in range(1, layers + 1)),
        score_size=float(width // heads if layers == _BY_WIDTH[kind] else figures["head_dim"]),
    )
    if kind == "gemma2":
        if (near := get("rope.freq_base_swa", figures["rope_base"])) != figures["rope_base"]:
            raise ValueError(
                f"{path} has gemma2.rope.freq_base_swa={quoted(near)}: only rope.freq_base is computed here"
            )
        return found | dict(
            score_cap=number("attn_logit_softcapping", float, 50.0),
            logit_cap=number("final_logit_softcapping", float, 30.0),
        )
    if get("attn_logit_softcapping", 0.0):
        raise ValueError(f"{path} has gemma3.attn_logit_softcapping: Gemma 3 is computed without")
    return found | dict(
        window_rope_base=number("rope.freq_base_swa", float, 10000.0),
        logit_cap=number("final_logit_softcapping", float) if get("final_logit_softcapping", 0.0) else None,
    )


def _scaling(
    tensors: Mapping[str, GgufTensor], get: _Get, number: _Number, head_dim: int, base: float, max_len: int
) -> RopeScaling | None:
    """Give how rotary embedding is stretched: by what the entries say, or by a tensor, as Llama 3.1's."""
    # Without a type llama.cpp takes a factor as linear; the second name is the older one.
    factor = number("rope.scaling.factor", float, number("rope.scale_linear", float, 1.0))
    kind = get("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"rope.scaling.type is {quoted(kind)}: only none, linear and yarn are computed here")
    if _DIVISORS in tensors:
        divisors = tensors[_DIVISORS]
        if divisors.shape != (head_dim // 2,) or (kind != "none" and factor != 1):
            raise ValueError(
                f"tensor {_DIVISORS} of shape {quoted(divisors.shape)} beside rope.scaling.type={quoted(kind)} and "
                f"factor {factor}: only {head_dim // 2} numbers alone are computed here"
            )
        return RopeScaling(divisors=tuple(map(float, divisors.rows(0, head_dim // 2))))
    if kind == "yarn":
        original = number("rope.scaling.original_context_length", int, max_len)
        fast, slow = (
            number(f"rope.scaling.{name}", float, of) for name, of in zip(_YARN[1:], (32.0, 1.0), strict=True)
        )
        return rope.yarn(head_dim, base, factor, original_max_len=original, beta_fast=fast, beta_slow=slow)
    return None if kind == "none" or factor == 1 else rope.linear(head_dim, factor)


@dataclasses.dataclass(frozen=True, eq=False)
class _LessOne:
    """A tensor of which the file has one more: the norms of Gemma."""

    tensor: GgufTensor

    @property
    def path(self) -> Path:
        return self.tensor.path

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> np.dtype:
        return self.tensor.dtype

    def rows(self, first: int, stop: int) -> np.ndarray:
        return self.tensor.rows(first, stop) - np.float32(1)


def _weights(
    config: DecoderConfig, metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor]
) -> dict[str, GgufTensor | _LessOne]:
    """Give the tensors of weights, with rows and numbers as Hugging Face has them."""
    kind = metadata["general.architecture"]
    found: dict[str, GgufTensor | _LessOne] = {}
    for name, tensor in tensors.items():
        if kind == "llama":
            found[name] = dataclasses.replace(tensor, order=_row_order(config, name))
        elif kind.startswith("gemma") and name.endswith("norm.weight"):
            found[name] = _LessOne(tensor)
        else:
            found[name] = tensor
    found.pop(_DIVISORS, None)
    return found


def _row_order(config: DecoderConfig, name: str) -> np.ndarray | None:
    """Say which rows of a Llama's q and k stand where: its files have pairs side by side, Hugging Face halves.

    >>> config = DecoderConfig(vocab_size=8, width=6, mlp_width=8, num_layers=1, num_heads=1, num_kv_heads=1)
    >>> _row_order(config, "blk.0.attn_q.weight").tolist()
    [0, 2, 4, 1, 3, 5]
    """
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(name.removesuffix(".weight").split(".")[-1])
    if heads is None:
        return None
    return np.arange(heads * config.head_dim).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


FORM = GgufForm(architectures=_ARCHITECTURES, read_config=_read_gguf_config, names=_NAMES, weights=_weights)
