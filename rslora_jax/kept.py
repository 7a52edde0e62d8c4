"""What is compiled of a `Lora`, kept as long as it is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from rslora_jax.wrap import Lora

_P = ParamSpec("_P")
_R = TypeVar("_R")
# An executable of a small model takes tens of megabytes; training and what comes after it want one or two at once.
_MOST = 2


def kept_with_lora(make: Callable[Concatenate[Lora, _P], _R]) -> Callable[Concatenate[Lora, _P], _R]:
    """Let `make(lora, ...)` give the same again for the same arguments, the last few; it goes when the `Lora` goes.

    A cache of the function's own would hold every `Lora` of a process, and all that was compiled of each.

    >>> import jax.numpy as jnp, rslora_jax as rslora
    >>> lora = rslora.wrap(lambda p, x: x @ p, jnp.ones((2, 2)), jnp.ones((1, 2)), config=rslora.LoraConfig(rank=1))
    >>> @kept_with_lora
    ... def make(lora, name):
    ...     return [name]
    >>> make(lora, "a") is make(lora, "a"), make(lora, "a") is make(lora, "b")
    (True, False)
    """

    @functools.wraps(make)
    def kept(lora: Lora, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        cache = lora.compiled.setdefault(kept, functools.lru_cache(_MOST)(functools.partial(make, lora)))
        return cache(*args, **kwargs)

    return kept
