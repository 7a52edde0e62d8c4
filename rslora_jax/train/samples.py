"""What the model writes for a few examples, to be read before and after training."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rslora_jax.models.decoder import DecoderConfig
from rslora_jax.models.generation import generate
from rslora_jax.pytrees import Params
from rslora_jax.train.encode import Tokenizer, encode_example
from rslora_jax.train.examples import Example

_TEXT_PROMPT = 16  # tokens of a plain text that are given, for the model to go on


def write(
    apply: Callable[..., Any],
    params: Params,
    config: DecoderConfig,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    max_new: int,
    max_len: int,
) -> list[str]:
    """Write the likeliest completion of each example's prompt, up to `max_new` tokens."""
    if not examples:
        return []
    room = max(1, min(max_len, config.max_len - max_new))
    prompts = [prompt_of_example(tokenizer, example)[-room:] for example in examples]
    outs = generate(apply, params, prompts, config, max_new=max_new, eos_id=tokenizer.stop_ids)
    return [tokenizer.decode(out, skip_special=True).strip() for out in outs]


def prompt_of_example(tokenizer: Tokenizer, example: Example) -> list[int]:
    """Return the tokens an example gives before its last completion; of plain text, its start.

    >>> from rslora_jax.train.bytelevel import ByteTokenizer
    >>> prompt_of_example(ByteTokenizer(), Example("ab", "c"))
    [97, 98]
    """
    encoded = encode_example(tokenizer, example)[-1]
    if example.prompt == "":
        return encoded.ids_N[:_TEXT_PROMPT].tolist()
    return encoded.ids_N[: int(np.flatnonzero(~encoded.is_learnt_N)[-1]) + 1].tolist()


def show(example: Example, answers: Mapping[str, str]) -> str:
    """Lay out a prompt and what was answered, one line or a few for each.

    >>> print(show(Example("2 + 2 =", "4", origin="sums.jsonl:1"), {"before": "5", "after": "4"}))
    --- sums.jsonl:1
      | 2 + 2 =
      before: 5
      after: 4
    """
    prompt = example.prompt if isinstance(example.prompt, str) else example.prompt[-1].content
    lines = (prompt or example.completion).strip().splitlines()
    if len(lines) > 8:
        lines = [*lines[:5], "...", *lines[-2:]]
    shown = [
        f"--- {example.origin}",
        *(f"  | {textwrap.shorten(line, 100) if len(line) > 100 else line}" for line in lines),
    ]
    for name, answer in answers.items():
        text = answer if len(answer) <= 300 else answer[:300] + "..."
        shown.append(textwrap.indent(f"{name}: {text}", "  "))
    return "\n".join(shown)
