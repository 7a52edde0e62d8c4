"""A decoder of the Llama family in Flax Linen, small enough to read and equal to the published weights.

The module keeps no state of its own: the cache of keys and values is an argument and a result, so that
`Decoder.apply` stays the pure function of arrays that `jax.jit`, `jax.grad` and `rslora_jax.wrap` expect.

Shapes in names: B batch, T tokens of this call, S slots of the cache, L layers, N query heads, K key-value
heads, G = N / K query heads for each of them, H size of a head, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from rslora_jax.models.attention import Array, Cache, attend, extend, init_cache, lengthen
from rslora_jax.models.decoder_config import DecoderConfig
from rslora_jax.models.places import Places, level_off
from rslora_jax.models.remat import REMAT_POLICIES, named_input, named_product, policy_of
from rslora_jax.models.rope import rotary, rotate

__all__ = ["REMAT_POLICIES", "Decoder", "DecoderConfig", "init_cache", "lengthen"]

# Where the weights lie on a mesh (`parallel.sharding.param_shardings`): those that widen are split by column,
# those that narrow by row, so that a layer needs one sum over "tensor" for each pair; the rest of each by "fsdp".
SHARDING_RULES = (
    ("*/{q_proj,k_proj,v_proj,gate_proj,up_proj,lm_head}/kernel", ("fsdp", "tensor")),
    ("*/{o,down}_proj/kernel", ("tensor", "fsdp")),
    ("*/embedding", ("tensor", "fsdp")),
)


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last axis, in float32 (arXiv 1910.07467, eq. 4)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BxTxD: Array) -> Array:
        offset = self.config.norm_offset
        init = nn.initializers.constant(1 - offset)
        scale_D = self.param("scale", init, (x_BxTxD.shape[-1],), self.config.param_dtype)
        wide = x_BxTxD.astype(jnp.float32)
        wide = wide * lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.config.norm_eps)
        # In float32 the sum too: a bfloat16 has no room for a small weight beside 1.
        scale_D = scale_D.astype(jnp.float32) + offset if offset else scale_D
        return (wide * scale_D).astype(self.config.dtype)


def _dense(config: DecoderConfig, features: int, name: str, bias: bool = False) -> Callable[[Array], Array]:
    layer = nn.Dense(features, use_bias=bias, dtype=config.dtype, param_dtype=config.param_dtype, name=name)
    return lambda x: named_product(layer(x))  # with its adapter in it, of which a policy sees the parts


class Attention(nn.Module):
    """Self-attention with grouped keys and values (arXiv 2305.13245); returns the new keys and values too."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x_BxTxD: Array, rope: Any, places: Any, cached: Any, has_window: Any = None
    ) -> tuple[Array, Any]:
        c = self.config

        def heads(count: int, name: str) -> Array:
            flat = _dense(c, count * c.head_dim, name, c.qkv_bias)(x_BxTxD)
            return flat.reshape(*x_BxTxD.shape[:-1], count, c.head_dim)

        q, k, v = heads(c.num_heads, "q_proj"), heads(c.num_kv_heads, "k_proj"), heads(c.num_kv_heads, "v_proj")
        if c.qk_norm:
            q, k = RMSNorm(c, name="q_norm")(q), RMSNorm(c, name="k_norm")(k)
        q, k = rotate(q, *rope), rotate(k, *rope)
        blocks = [(k, v, places["new"])]
        if cached is not None:
            blocks.insert(0, (cached["k"], cached["v"], places["cached"]))
        how: dict[str, Any] = dict(windowed=has_window, size=c.score_size, cap=c.score_cap, how=c.attention)
        out = attend(q, places["new"], blocks, c.window, **how)
        return _dense(c, c.width, "o_proj")(out.reshape(*x_BxTxD.shape[:-1], -1)), {"k": k, "v": v}


class MLP(nn.Module):
    """The gated feed-forward part, SwiGLU or GEGLU (arXiv 2002.05202, eq. 6)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BxTxD: Array) -> Array:
        c = self.config
        gate = _dense(c, c.mlp_width, "gate_proj")(x_BxTxD)
        up = _dense(c, c.mlp_width, "up_proj")(x_BxTxD)
        gate = nn.silu(gate) if c.activation == "silu" else nn.gelu(gate, approximate=True)
        return _dense(c, c.width, "down_proj")(gate * up)


class Layer(nn.Module):
    """One residual layer. The stream is the carry of a scan, the new keys and values its stacked result.

    `places` says where new and cached tokens stand. `has_window` (bool, a scalar) is given where layers differ in it.
    `rope` is a list of one, or of two where the second is for layers with a window.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x_BxTxD: Array, rope: Any, places: Any, cached: Any, has_window: Any = None
    ) -> tuple[Array, Any]:
        c, x_BxTxD = self.config, named_input(x_BxTxD)
        if len(rope) > 1:
            rope = [jax.tree.map(partial(jnp.where, has_window), rope[1], rope[0])]

        def norm(name: str) -> RMSNorm:
            return RMSNorm(c, name=name)

        def after(name: str, out: Array) -> Array:
            return norm(name)(out) if c.post_norms else out

        out, new = Attention(c, name="attn")(norm("attn_norm")(x_BxTxD), rope[0], places, cached, has_window)
        x_BxTxD = x_BxTxD + after("attn_post_norm", out)
        out = MLP(c, name="mlp")(norm("mlp_pre_norm" if c.post_norms else "mlp_norm")(x_BxTxD))
        x_BxTxD = x_BxTxD + after("mlp_post_norm", out)
        # Without a cache nobody wants the keys, and a scan would stack and keep them.
        return x_BxTxD, None if cached is None else new


class Embed(nn.Module):
    """The token table (V, D), read by look-up and, when the head is tied, by a product."""

    config: DecoderConfig

    def setup(self) -> None:
        """Make the table."""
        shape = (self.config.vocab_size, self.config.width)
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)
        self.embedding = self.param("embedding", init, shape, self.config.param_dtype)

    def __call__(self, tokens_BxT: Array) -> Array:
        # Cast after the look-up: casting the table would touch V rows to read T. A token outside the
        # vocabulary gives NaN, not a neighbour's row.
        return jnp.take(self.embedding, tokens_BxT, axis=0).astype(self.config.dtype)

    def attend(self, x: Array) -> Array:
        """Give logits (..., V) in float32, the product of states (..., D) with the table."""
        table_VxD = self.embedding.astype(self.config.dtype)
        product = partial(lax.dot_general, preferred_element_type=jnp.float32)
        if x.ndim > 1 and x.shape[-2] == 1:
            # A token of each row, in generation. XLA on CPUs reads the table eight times slower the other way round,
            # and without the barrier makes this that again (`scripts/generate_speed.py`).
            logits_Vx1xB = product(table_VxD, x, (((1,), (x.ndim - 1,)), ((), ())))
            return jnp.moveaxis(lax.optimization_barrier(logits_Vx1xB), 0, -1)
        return product(x, table_VxD, (((x.ndim - 1,), (1,)), ((), ())))


def _layer_class(config: DecoderConfig) -> Any:
    if config.remat in (None, "none"):
        return Layer
    # The body of a scan is compiled apart, so common-subexpression elimination cannot undo the remat there
    # and the barriers that guard against it would only cost.
    return nn.remat(Layer, policy=policy_of(config.remat), prevent_cse=not config.scan_layers)


class Decoder(nn.Module):
    """A Llama-family decoder: `Decoder(config).apply(variables, tokens_BxT)` gives logits_BxTxV in float32.

    Weights are `params/layers_3/attn/q_proj/kernel` and the like, or, with `scan_layers`,
    `params/layers/attn/q_proj/kernel` with a leading axis of layers; kernels are (in, out).

    >>> config = DecoderConfig(vocab_size=32, width=16, mlp_width=24, num_layers=2, num_heads=4, num_kv_heads=2)
    >>> model, tokens = Decoder(config), jnp.array([[1, 2, 3]])
    >>> variables = model.init(jax.random.key(0), tokens)
    >>> logits = model.apply(variables, tokens)
    >>> logits.shape, logits.dtype
    ((1, 3, 32), dtype('float32'))

    Logits only where they are wanted:

    >>> x = model.apply(variables, tokens, method="hidden")
    >>> model.apply(variables, x[:, -1], method="head").shape
    (1, 32)
    """

    config: DecoderConfig

    def setup(self) -> None:
        """Make the layers, one by one or as one scanned over."""
        c = self.config
        self.embed = Embed(c)
        if c.scan_layers:
            self.layers = nn.scan(
                _layer_class(c),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast, 0, 0),
                length=c.num_layers,
            )(c)
        else:
            self.layers = [_layer_class(c)(c) for _ in range(c.num_layers)]
        self.norm = RMSNorm(c)
        if not c.tie_head:
            wide = partial(lax.dot_general, preferred_element_type=jnp.float32)
            self.lm_head = nn.Dense(
                c.vocab_size, use_bias=False, dtype=c.dtype, param_dtype=c.param_dtype, dot_general=wide
            )

    def __call__(
        self,
        tokens_BxT: Array,
        positions_BxT: Array | None = None,
        segments_BxT: Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """Give logits_BxTxV (float32), or (logits, cache) when a cache is given. Arguments as in `hidden`."""
        if cache is None:
            return self.head(self.hidden(tokens_BxT, positions_BxT, segments_BxT))
        x_BxTxD, cache = self.hidden(tokens_BxT, positions_BxT, segments_BxT, cache)
        return self.head(x_BxTxD), cache

    def hidden(
        self,
        tokens_BxT: Array,
        positions_BxT: Array | None = None,
        segments_BxT: Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """Give the last normalised state x_BxTxD in `config.dtype`, or (x, cache) when a cache is given.

        A token attends to tokens of its row whose position is not negative and not after its own; so
        position -1 marks padding, on either side. Positions default to 0, 1, 2, ... or to what follows the
        cache. `segments_BxT` (int) keeps packed documents apart: a token sees its own segment only.

        Writing past the cache's end over several calls gives NaN, as no shape shows it. A cache of no slots comes back
        with T: so a prompt is read without attention to empty slots.

        Raises:
          ValueError: there are more tokens than `config.max_len` or than the cache holds, or segments with a cache.
        """
        (B, T), c = tokens_BxT.shape, self.config
        if c.max_len < T:
            raise ValueError(f"{T} tokens are more than max_len={c.max_len}: cut them or raise max_len")
        slots = 0 if cache is None else cache["positions"].shape[1]
        is_plain = positions_BxT is None and segments_BxT is None and not slots
        if positions_BxT is None:
            first_Bx1 = 0 if cache is None or not slots else cache["positions"].max(axis=1, keepdims=True) + 1
            positions_BxT = jnp.broadcast_to(first_Bx1 + jnp.arange(T, dtype=jnp.int32), (B, T))
        if segments_BxT is not None and cache is not None:
            raise ValueError("segments cannot be used with a cache: decode packed documents apart")
        places: dict[str, Any] = {"new": Places(positions_BxT, segments_BxT, is_plain)}
        if cache is not None:
            places["cached"] = Places(cache["positions"])
        cached = None
        x_BxTxD = self.embed(tokens_BxT)
        if c.embed_scale != 1:
            x_BxTxD = x_BxTxD * jnp.asarray(c.embed_scale, c.dtype)
        if cache is not None:
            if 0 < slots < T:
                raise ValueError(f"{T} tokens do not fit a cache of {slots}: call init_cache with more")
            cached = {"k": cache["k"], "v": cache["v"]}
            if slots:
                x_BxTxD = jnp.where(cache["index"] + T <= slots, x_BxTxD, jnp.nan)
        rope = [rotary(positions_BxT, c.head_dim, c.rope_base, c.rope_scaling, segments_BxT)]
        if c.window_rope_base is not None:
            rope.append(rotary(positions_BxT, c.head_dim, c.window_rope_base))
        x_BxTxD, new = self._run_layers(x_BxTxD, rope, places, cached)
        x_BxTxD = self.norm(x_BxTxD)
        return x_BxTxD if cache is None else (x_BxTxD, extend(cache, new, positions_BxT))

    def head(self, x: Array) -> Array:
        """Give logits (..., V) in float32 for states (..., D), such as some rows of `hidden`."""
        logits = self.embed.attend(x) if self.config.tie_head else self.lm_head(x)
        return level_off(logits, self.config.logit_cap)

    def _run_layers(self, x_BxTxD: Array, rope: Any, places: Any, cached: Any) -> tuple[Array, Any]:
        windows_L = None if self.config.window_layers is None else jnp.array(self.config.window_layers)
        if self.config.scan_layers:
            return self.layers(x_BxTxD, rope, places, cached, windows_L)
        news = []
        for i, layer in enumerate(self.layers):
            x_BxTxD, new = layer(x_BxTxD, rope, places, *jax.tree.map(lambda a, i=i: a[i], (cached, windows_L)))
            news.append(new)
        return x_BxTxD, None if cached is None else jax.tree.map(lambda *a: jnp.stack(a), *news)
