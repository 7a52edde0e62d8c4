"""Generate text: one program reads the prompts into a cache, another adds tokens in a compiled loop.

The loop's end is an argument. So a whole answer, and one shown piece by piece, come from one program and are the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rslora_jax.models.decoder import DecoderConfig, init_cache, lengthen
from rslora_jax.models.sampling import Choosing, choosing, next_token
from rslora_jax.pytrees import Params

Array = jax.Array
State = dict[str, Any]


def generate(
    apply: Callable[..., Any],
    variables: Params,
    prompts: Sequence[Sequence[int]],
    config: DecoderConfig,
    *,
    max_new: int,
    **options: Any,
) -> list[list[int]]:
    """Continue a batch of prompts (token ids) by up to `max_new` tokens each, without the prompts.

    `apply(variables, tokens_BxT, positions_BxT, cache=cache)` gives (logits_BxTxV, cache), as `Decoder.apply`
    does; `variables` is whatever pytree it takes, for instance (base, adapters):

        def run(both, *args, **kwargs):
            return lora.apply(*both, *args, **kwargs)

        generate(run, (variables, adapters), prompts, config, max_new=32)

    `options` are those of `start`: eos_id=None, key=None, bucket=64, and those of `sampling.choosing`, by which tokens
    are chosen: temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0. Temperature 0 takes the
    likeliest token; otherwise `key` draws one. Keep one `apply` between calls: it is part of what is compiled, once for
    each number of prompts, `max_new`, prompt length rounded up to `bucket`, and which of these options do something. A
    row ends with, and includes, `eos_id`, or the first of several. What a row gives does not depend on the other rows,
    except through rounding.

    >>> from rslora_jax.models.decoder import Decoder
    >>> config = DecoderConfig(vocab_size=32, width=16, mlp_width=24, num_layers=2, num_heads=4, num_kv_heads=2)
    >>> model = Decoder(config)
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    >>> outs = generate(model.apply, variables, [[1, 2, 3], [4]], config, max_new=5, bucket=4)
    >>> [len(out) for out in outs]
    [5, 5]
    """
    going = start(apply, variables, prompts, config, max_new=max_new, **options)
    return tokens_of(going.advance(going.read(), max_new))


def stream(
    apply: Callable[..., Any],
    variables: Params,
    prompts: Sequence[Sequence[int]],
    config: DecoderConfig,
    *,
    max_new: int,
    chunk: int = 4,
    **options: Any,
) -> Iterator[list[list[int]]]:
    """Give what `generate` gives, with the same arguments, piece by piece: each row's new tokens, `chunk` at a time.

    The first token comes alone, as soon as the prompts are read.

    >>> from rslora_jax.models.decoder import Decoder
    >>> config = DecoderConfig(vocab_size=32, width=16, mlp_width=24, num_layers=2, num_heads=4, num_kv_heads=2)
    >>> model = Decoder(config)
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    >>> [len(new) for new, in stream(model.apply, variables, [[1, 2]], config, max_new=7, chunk=3, bucket=4)]
    [1, 2, 3, 1]
    """
    going = start(apply, variables, prompts, config, max_new=max_new, **options)
    yield from pieces(going, going.read(), chunk)


@dataclasses.dataclass(frozen=True, eq=False)
class Generation:
    """Prompts on their way through the two programs, for who wants to time or show each part. `start` makes one."""

    reading: tuple[Any, ...]
    choosing: tuple[Any, ...]
    config: DecoderConfig
    max_new: int

    def compile(self) -> None:
        """Compile both programs, where that has not been done; otherwise the first calls do it."""
        for program in self.lower():
            program.compile()

    def lower(self) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
        """Return both programs, lowered: that which reads, and that which adds tokens."""
        reading = _read.lower(*self.reading, config=self.config, max_new=self.max_new)
        state = _read.eval_shape(*self.reading, config=self.config, max_new=self.max_new)
        adding = _advance.lower(*self.reading[:2], state, np.int32(0), *self.choosing)
        return reading, adding

    def read(self) -> State:
        """Read the prompts; give the state before the first new token."""
        return _read(*self.reading, config=self.config, max_new=self.max_new)

    def advance(self, state: State, until: int) -> State:
        """Add tokens until each row has `until`, or has ended. The state that is given is used up."""
        end = np.int32(min(until, self.max_new))
        return _advance(*self.reading[:2], state, end, *self.choosing)


def start(
    apply: Callable[..., Any],
    variables: Params,
    prompts: Sequence[Sequence[int]],
    config: DecoderConfig,
    *,
    max_new: int,
    eos_id: int | Sequence[int] | None = None,
    key: Array | None = None,
    bucket: int = 64,
    **how: Any,
) -> Generation:
    """Lay prompts out for `generate`, whose arguments these are; nothing is compiled or run yet."""
    _check(prompts, config, max_new)
    by = choosing(vocab_size=config.vocab_size, **how)
    key = key if "temperature" in by else None
    if "temperature" in by and key is None:
        raise ValueError("drawing tokens needs a key: pass key=jax.random.key(seed), or temperature=0")
    longest = max(len(prompt) for prompt in prompts)
    length = min(-(-longest // bucket) * bucket, config.max_len - max_new + 1)
    tokens_BxP = np.zeros((len(prompts), length), np.int32)
    positions_BxP = np.full((len(prompts), length), -1, np.int32)
    for row, prompt in enumerate(prompts):
        # Padding goes to the left, so that every row's last token sits in the same column.
        tokens_BxP[row, length - len(prompt) :] = prompt
        positions_BxP[row, length - len(prompt) :] = np.arange(len(prompt))
    # No token has id -1, so that without an end every row runs to max_new, by the same program.
    ends_E = np.atleast_1d(np.asarray(-1 if eos_id is None else eos_id, np.int32))
    return Generation(
        (apply, variables, tokens_BxP, positions_BxP),
        (ends_E, by, _seen(prompts, config) if "repetition_penalty" in by else None, key),
        config,
        max_new,
    )


def _seen(prompts: Sequence[Sequence[int]], config: DecoderConfig) -> np.ndarray:
    """Say of every token whether it is in each prompt."""
    seen_BxV = np.zeros((len(prompts), config.vocab_size), bool)
    for row, prompt in enumerate(prompts):
        seen_BxV[row, np.asarray(prompt)] = True
    return seen_BxV


def pieces(going: Generation, state: State, chunk: int) -> Iterator[list[list[int]]]:
    """Give each row's new tokens after the prompts are read: the first alone, then `chunk` at a time."""
    given = 0
    while given < going.max_new:
        until = chunk * (given // chunk + 1) if given else 1
        state = going.advance(state, until)
        yield [row[given:] for row in tokens_of(state)]
        if np.all(state["done_B"]):
            return
        given = until


def tokens_of(state: State) -> list[list[int]]:
    """Give each row's new tokens so far."""
    lengths = np.asarray(state["lengths_B"])
    return [row[:n].tolist() for row, n in zip(np.asarray(state["new_BxM"]), lengths, strict=True)]


@partial(jax.jit, static_argnums=0, static_argnames=("config", "max_new"))
def _read(
    apply: Callable[..., Any],
    variables: Params,
    tokens_BxP: Array,
    positions_BxP: Array,
    *,
    config: DecoderConfig,
    max_new: int,
) -> State:
    B, P = tokens_BxP.shape
    cache = init_cache(config, B, 0 if P > 1 else max_new)
    if P > 1:
        # All but the last prompt token. Nothing reads these logits, so the compiler drops their product
        # with the vocabulary; the loop's first step gives the first ones that are wanted.
        _, cache = apply(variables, tokens_BxP[:, :-1], positions_BxP[:, :-1], cache=cache)
        cache = lengthen(cache, max_new)
    return {
        "step": jnp.zeros((), jnp.int32),
        "last_Bx1": tokens_BxP[:, -1:],
        "position_Bx1": positions_BxP[:, -1:],
        "cache": cache,
        "new_BxM": jnp.zeros((B, max_new), jnp.int32),
        "lengths_B": jnp.zeros(B, jnp.int32),
        "done_B": jnp.zeros(B, bool),
    }


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _advance(
    apply: Callable[..., Any],
    variables: Params,
    state: State,
    until: Array,
    ends_E: Array,
    by: Choosing,
    prompted_BxV: Array | None,
    key: Array | None,
) -> State:
    B = len(state["done_B"])

    def choose(state: State, logits_BxV: Array) -> Array:
        seen_BxV = None if prompted_BxV is None else prompted_BxV | _written(state, logits_BxV.shape[-1])
        keys_B = None
        if key is not None:
            # One key for each row and step, so that a row draws the same whatever the batch.
            of_step = jax.random.fold_in(key, state["step"])
            keys_B = jax.vmap(partial(jax.random.fold_in, of_step))(jnp.arange(B))
        return jax.vmap(partial(next_token, by=by))(keys_B, logits_BxV, seen_BxV)

    def go_on(state: State) -> Array:
        return (state["step"] < until) & ~jnp.all(state["done_B"])

    def one(state: State) -> State:
        step, done_B = state["step"], state["done_B"]
        logits_Bx1xV, cache = apply(variables, state["last_Bx1"], state["position_Bx1"], cache=state["cache"])
        token_B = choose(state, logits_Bx1xV[:, 0]).astype(jnp.int32)
        return {
            "step": step + 1,
            "last_Bx1": token_B[:, None],
            "position_Bx1": state["position_Bx1"] + 1,
            "cache": cache,
            "new_BxM": lax.dynamic_update_slice(state["new_BxM"], token_B[:, None], (0, step)),
            "lengths_B": state["lengths_B"] + ~done_B,
            "done_B": done_B | jnp.isin(token_B, ends_E),
        }

    return lax.while_loop(go_on, one, state)


def _written(state: State, vocab_size: int) -> Array:
    """Say of every token whether it is among each row's new ones."""
    B, M = state["new_BxM"].shape
    is_there_BxM = jnp.arange(M)[None] < state["step"]
    return jnp.zeros((B, vocab_size), bool).at[jnp.arange(B)[:, None], state["new_BxM"]].max(is_there_BxM)


def _check(prompts: Sequence[Sequence[int]], config: DecoderConfig, max_new: int) -> None:
    if not len(prompts) or not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt is empty: give each at least one token")
    if max_new < 1:
        raise ValueError(f"max_new={max_new}: ask for at least one token")
    longest = max(len(prompt) for prompt in prompts)
    if longest - 1 + max_new > config.max_len:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new} new ones exceed max_len={config.max_len}: cut one"
        )
