"""What the weights of a Flax model are called in a Hugging Face model: a table, and how to read it.

A table maps a weight's path to the name of a Hugging Face parameter, with `{i}` for the number of a layer. Where the
name has an `{i}` and the path has none, the path holds all layers, stacked on its first axis.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

Names = Mapping[str, str]

_LAYERS = {
    "attn_norm/scale": "input_layernorm.weight",
    "attn/q_proj/kernel": "self_attn.q_proj.weight",
    "attn/k_proj/kernel": "self_attn.k_proj.weight",
    "attn/v_proj/kernel": "self_attn.v_proj.weight",
    "attn/o_proj/kernel": "self_attn.o_proj.weight",
    "attn/q_proj/bias": "self_attn.q_proj.bias",
    "attn/k_proj/bias": "self_attn.k_proj.bias",
    "attn/v_proj/bias": "self_attn.v_proj.bias",
    "attn/q_norm/scale": "self_attn.q_norm.weight",
    "attn/k_norm/scale": "self_attn.k_norm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "attn_post_norm/scale": "post_attention_layernorm.weight",
    "mlp_pre_norm/scale": "pre_feedforward_layernorm.weight",
    "mlp_post_norm/scale": "post_feedforward_layernorm.weight",
    "mlp/gate_proj/kernel": "mlp.gate_proj.weight",
    "mlp/up_proj/kernel": "mlp.up_proj.weight",
    "mlp/down_proj/kernel": "mlp.down_proj.weight",
}

# `rslora_jax.models.decoder.Decoder`, looped or scanned.
LLAMA: Names = {
    "params/embed/embedding": "model.embed_tokens.weight",
    **{f"params/layers_{{i}}/{path}": f"model.layers.{{i}}.{name}" for path, name in _LAYERS.items()},
    **{f"params/layers/{path}": f"model.layers.{{i}}.{name}" for path, name in _LAYERS.items()},
    "params/norm/scale": "model.norm.weight",
    "params/lm_head/kernel": "lm_head.weight",
}


class Place(NamedTuple):
    """Where a Hugging Face parameter lies: a path, and its place on the first axis where layers are stacked."""

    path: str
    layer: int | None


def places(names: Names, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """Give the place of every Hugging Face parameter that the weights of these paths and shapes hold.

    Raises:
      ValueError: a path is in no row of the table, or two places have one name.

    >>> found = places(LLAMA, {"params/layers/attn/q_proj/kernel": (2, 16, 16), "params/norm/scale": (16,)})
    >>> for name, place in found.items():
    ...     print(name, tuple(place))
    model.layers.0.self_attn.q_proj.weight ('params/layers/attn/q_proj/kernel', 0)
    model.layers.1.self_attn.q_proj.weight ('params/layers/attn/q_proj/kernel', 1)
    model.norm.weight ('params/norm/scale', None)
    """
    found: dict[str, Place] = {}
    for path, shape in shapes.items():
        for name, place in _of(names, path, shape):
            if name in found:
                raise ValueError(f"{path} and {found[name].path} would both be {name}: correct the table of names")
            found[name] = place
    return found


def _of(names: Names, path: str, shape: tuple[int, ...]) -> Iterable[tuple[str, Place]]:
    for pattern, name in names.items():
        matched = re.fullmatch(re.escape(pattern).replace(r"\{i\}", r"(\d+)"), path)
        if matched and matched.groups():
            return [(name.replace("{i}", matched[1]), Place(path, None))]
        if matched and "{i}" in name:
            return [(name.replace("{i}", str(layer)), Place(path, layer)) for layer in range(shape[0])]
        if matched:
            return [(name, Place(path, None))]
    raise ValueError(f"{path} is in no row of the table of names: add one with its Hugging Face name")
