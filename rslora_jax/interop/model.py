"""What every loader of models returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from rslora_jax.interop.tokenizer import Tokenizer
from rslora_jax.models.decoder import Decoder, DecoderConfig

# Where weights are to lie: a pytree of shardings like the variables, or what makes one of the variables' shapes (a
# pytree of `jax.ShapeDtypeStruct`), such as `partial(param_shardings, mesh=mesh, rules=SHARDING_RULES)`.
Shardings = Any | Callable[[Any], Any]

# progress(done, total), in bytes.
Progress = Callable[[int, int], None]


class Model(NamedTuple):
    """A model that was loaded: `Decoder(config).apply(variables, tokens)` gives its logits."""

    config: DecoderConfig
    variables: dict[str, Any]
    tokenizer: Tokenizer


def shapes_of(config: DecoderConfig) -> dict[str, Any]:
    """Give the shapes and dtypes of a decoder's variables, a pytree of `jax.ShapeDtypeStruct`.

    >>> config = DecoderConfig(vocab_size=32, width=16, mlp_width=24, num_layers=2, num_heads=4, num_kv_heads=2)
    >>> shapes_of(config)["params"]["embed"]["embedding"].shape
    (32, 16)
    """
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), "int32"))


def shardings_of(shardings: Shardings, shapes: Any) -> Any:
    """Give the pytree of shardings that a loader's argument stands for: one of Nones where it is None.

    Raises `ValueError` when a pytree is given that is not like the variables.
    """
    found = shardings(shapes) if callable(shardings) else shardings
    if found is None:
        return jax.tree.map(lambda _: None, shapes)
    structure: Any = jax.tree.structure(shapes)
    if jax.tree.structure(found) != structure:
        raise ValueError("the shardings are not a pytree like the model's variables: give a function of their shapes")
    return found
