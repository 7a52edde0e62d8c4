"""Which arrays of a base stay arrays when it is put into fewer bits, as far as their names and shapes tell."""

import re
from collections.abc import Sequence

_VECTORS = {"bias", "scale", "norm", "ln", "mean", "var"}
_BY_NAME = {
    "table": {"embed", "embedding", "embeddings", "embedder", "wte", "vocab", "unembed", "unembedding"},
    "position table": {"pos", "position", "positions", "positional", "relpos", "wpe"},
    "head": {"logits", "classifier"},
    "router": {"router"},
}


def kept_dense(path: str, shape: Sequence[int]) -> str:
    """Return why an array stays as it is unless it is named, or "" for one that is put into fewer bits.

    Args:
      path: its path, joined with "/"; each part is read word by word.
      shape: its shape, the stack's axes in front.

    >>> kept_dense("params/layers/attn/q_proj/kernel", (30, 576, 576)), kept_dense("params/lm_head/kernel", (576, 9000))
    ('', 'head')
    >>> kept_dense("params/embedding", (9000, 576)), kept_dense("layers/attn_norm/w", (30, 576)), kept_dense("w", (9,))
    ('table', 'norm or bias', 'norm or bias')
    """
    parts = [[word.lower() for word in re.findall("[A-Z]+(?![a-z])|[A-Z]?[a-z]+", part)] for part in path.split("/")]
    words = {word for part in parts for word in part}
    if sum(size != 1 for size in shape) < 2 or any(w in _VECTORS or w.endswith("norm") for w in words):
        return "norm or bias"
    for kind, names in _BY_NAME.items():
        if words & names:
            return kind
    # "lm_head", but no "multi_head" and no "head_dim".
    return "head" if any(part[-1:] == ["head"] and "multi" not in part for part in parts) else ""
