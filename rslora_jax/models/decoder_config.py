"""What a decoder of the Llama family is made of: sizes, the parts that families differ in, and dtypes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from rslora_jax.models.remat import check_remat
from rslora_jax.models.rope import RopeScaling
from rslora_jax.shown import quoted

ATTENTION = ("auto", "xla", "chunked", "cudnn", "pallas")

# What depends on these figures is made before weights of their sizes are looked at.
LARGEST_SIZE = 2**31 - 1
MOST_LAYERS = 10_000
LARGEST_HEAD = 1 << 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Describe a Llama-family decoder.

    What families add to Llama 2, all off by default: `rope_scaling` (Llama 3.1 and many since), `qkv_bias` (Qwen 2),
    `qk_norm`, a norm of every query and key head (Qwen 3), and `window`, the number of positions, its own included,
    that a token sees (Mistral); with `window_layers`, one bool a layer, only layers where it is true have the window.

    What Gemma adds: `activation` "gelu_tanh" in place of "silu", norms whose weights are stored less `norm_offset`, a
    factor `embed_scale` on the embedding; `post_norms` behind attention and feed-forward part, scores over the root of
    `score_size` in place of that of `head_dim`, and `score_cap` and `logit_cap`, beyond which scores and logits level
    off as cap * tanh(x / cap) (Gemma 2, arXiv 2408.00118); and `window_rope_base`, the base of rotary embedding where
    there is a window, without scaling (Gemma 3, arXiv 2503.19786).

    `param_dtype` is what weights are stored in, `dtype` what products are computed in; normalisation, rotation, softmax
    and logits are float32 whatever `dtype` is. `remat` is None or "none" (keep all activations), "full" (keep none
    inside a layer), "offload" (as "full", and what a layer takes in waits in pinned host memory; on a CPU, whose memory
    that is, it takes what "full" takes) or a name in `REMAT_POLICIES`. `scan_layers` stacks the layers' weights on a
    leading axis and compiles one layer in place of `num_layers`.

    `attention` is "xla" (the scores of all tokens at once, as XLA compiles it), "chunked" (some at a time: memory that
    grows with the tokens and not with their square), "cudnn" (on NVIDIA GPUs, in bfloat16 and float16), "pallas" (JAX's
    splash attention on TPUs, tokamax's on GPUs) or "auto", what is best for shape, dtype and platform: the default
    device's, so a program that is compiled for another platform has to name it. To a kernel rows come in order, as
    `rslora_jax.train` and `generate` have them (`models.kernels.in_order`); of others the result is NaN.

    Raises:
      ValueError: the sizes do not fit together, or `remat` is unknown.

    >>> config = DecoderConfig(vocab_size=32, width=16, mlp_width=24, num_layers=2, num_heads=4, num_kv_heads=2)
    >>> config.head_dim, config.dtype
    (4, dtype('float32'))
    """

    vocab_size: int
    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 0
    rope_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    window_layers: tuple[bool, ...] | None = None
    activation: str = "silu"
    norm_offset: float = 0.0
    embed_scale: float = 1.0
    post_norms: bool = False
    score_size: float | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    window_rope_base: float | None = None
    max_len: int = 2048
    tie_head: bool = True
    scan_layers: bool = False
    remat: str | None = None
    attention: str = "auto"
    param_dtype: Any = jnp.float32
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        self._check_figures()
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}: "
                "every key-value head serves the same number of query heads"
            )
        # Dtypes are normalised so that jnp.float32, "float32" and np.dtype("float32") make equal
        # configurations, hence equal modules and no second compilation.
        object.__setattr__(self, "param_dtype", jnp.dtype(self.param_dtype))
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        object.__setattr__(self, "head_dim", self.head_dim or self.width // self.num_heads)
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd: rotary embedding turns pairs of coordinates")
        if self.rope_scaling is not None and 2 * len(self.rope_scaling.divisors) != self.head_dim:
            raise ValueError(
                f"rope_scaling has {len(self.rope_scaling.divisors)} divisors and head_dim={self.head_dim} has "
                f"{self.head_dim // 2} frequencies: one is needed for each"
            )
        check_remat(self.remat)
        if self.attention not in ATTENTION:
            raise ValueError(f"attention={self.attention!r} is unknown: use one of {', '.join(ATTENTION)}")
        if self.activation not in ("silu", "gelu_tanh"):
            raise ValueError(f"activation={self.activation!r} is unknown: use 'silu' or 'gelu_tanh'")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} is below 1: a token sees at least itself; use None for no window")
        if self.window_layers is not None:
            if self.window is None or len(self.window_layers) != self.num_layers:
                raise ValueError(
                    f"window_layers={self.window_layers} with window={self.window}: give one bool for each of the "
                    f"{self.num_layers} layers, and the window"
                )
            # All layers alike are the simpler program, and equal configurations.
            if len(set(self.window_layers)) == 1:
                object.__setattr__(self, "window", self.window if self.window_layers[0] else None)
                object.__setattr__(self, "window_layers", None)
        if self.window_rope_base is not None and self.window_layers is None:
            if self.window is not None:
                object.__setattr__(self, "rope_base", self.window_rope_base)
                object.__setattr__(self, "rope_scaling", None)
            object.__setattr__(self, "window_rope_base", None)

    def _check_figures(self) -> None:
        """Refuse sizes and numbers with which nothing can be computed."""
        for name in ("vocab_size", "width", "mlp_width", "num_layers", "num_heads", "num_kv_heads", "max_len"):
            most = MOST_LAYERS if name == "num_layers" else LARGEST_SIZE
            if not 0 < getattr(self, name) <= most:
                raise ValueError(f"{name}={quoted(getattr(self, name))} is not between 1 and {most}")
        numbers = ("rope_base", "window_rope_base", "norm_eps", "embed_scale", "score_size", "score_cap", "logit_cap")
        for name in numbers:
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf or (value == 0 and name == "norm_eps")):
                raise ValueError(f"{name}={quoted(value)} is not a positive number")
