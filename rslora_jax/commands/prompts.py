"""The prompts of `rslora generate`: where they come from, and their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rslora_jax.commands.choice import BASE, Asked
from rslora_jax.train.forms import alpaca_prompt, turns_of
from rslora_jax.train.records import decode_line

_T = TypeVar("_T")
Prompt = str | tuple[Mapping[str, Any], ...]  # text, or the turns of a chat
_KEYS = ("prompt", "question", "messages", "conversations", "instruction")


def read_prompts(path: str) -> list[Asked]:
    """Read prompts from a file: of JSON objects (.jsonl, .json), one a line, or of lines of text.

    An object has "prompt", "question" or "messages", or "conversations" or "instruction" as training reads them
    (`train.forms`), and may have "adapter", a name, or null for the base alone; its
    other keys are not read. A chat that ends with the assistant is asked again: that last turn is not part of the
    prompt. So a file to train on is one of prompts too.

    Raises:
      ValueError: the file cannot be read, has no prompt, or a line that is none.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "two.jsonl")
    >>> _ = file.write_text('{"prompt": "2 + 2 ="}\\n{"prompt": "Hi", "adapter": "polite"}\\n')
    >>> [(asked.prompt, asked.adapter) for asked in read_prompts(str(file))]
    [('2 + 2 =', None), ('Hi', 'polite')]
    """
    try:
        lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8").split("\n")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({(error.strerror or str(error)).lower()})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start + 1}: save the file as UTF-8") from error
    filled = [(n, line.removesuffix("\r")) for n, line in enumerate(lines, start=1) if line.strip()]
    if not filled:
        raise ValueError(f"{path} holds no prompt: write one a line")
    if Path(path).suffix.lower() not in (".jsonl", ".json"):
        return [Asked(line) for _, line in filled]
    return [_parse(line, f"{path}:{n}") for n, line in filled]


def _parse(line: str, where: str) -> Asked:
    """Read one line of JSON."""
    try:
        record = decode_line(line.encode())
    except ValueError as error:
        raise ValueError(f"{where} {error}") from error
    named = record.get("adapter")
    named = BASE if named is None and "adapter" in record else named
    if named is not None and not _is_text(named):
        raise ValueError(f'{where} has "adapter" that is no text: write the name of one, or null for the base')
    return Asked(_prompt_of(record, where), named, where)


def _prompt_of(record: Mapping[str, Any], where: str) -> Prompt:
    """Return the prompt that an object has."""
    found = [key for key in _KEYS if key in record]
    if len(found) != 1:
        raise ValueError(f'{where} is not {{"prompt": ...}}, {{"question": ...}} or {{"messages": [...]}}: write one')
    (key,), value = found, record[found[0]]
    if key in ("messages", "conversations") or isinstance(value, list):
        return _chat(value, key, where)
    if not _is_text(value) or not value.strip():
        raise ValueError(f'{where} has "{key}" that is no text: fill it in')
    more = record.get("input")
    return alpaca_prompt(value, str(more) if _is_text(more) else "") if key == "instruction" else value


def _chat(value: Any, key: str, where: str) -> tuple[Mapping[str, Any], ...]:
    """Read the turns of a chat."""
    try:
        turns = turns_of(value, key)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from error
    if turns[-1].role == "assistant":
        turns = turns[:-1]
    if not turns:
        raise ValueError(f'{where} has "{key}" without one to answer: write a list of {{role, content}}')
    return tuple({"role": turn.role, "content": turn.content, **turn.more} for turn in turns)


def _is_text(value: Any) -> bool:
    """Say whether a value is text that can be written: half a surrogate pair cannot."""
    return isinstance(value, str) and value == value.encode(errors="replace").decode()


def prompt_ids(tokenizer: Any, prompt: Prompt, *, plain: bool) -> list[int]:
    """Give a prompt's tokens, by the chat template where there is one and `plain` is not asked for.

    Without one, text stands as it is, and a chat of one question gets a newline after it, as in training.

    Raises:
      ValueError: the prompt is empty, or a chat of several turns that no template writes out.

    >>> from rslora_jax.train.bytelevel import ByteTokenizer
    >>> prompt_ids(ByteTokenizer(), "ab", plain=False)
    [97, 98]
    """
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise ValueError("a prompt is empty: give at least a word")
    if not plain and tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
        return tokenizer.encode(tokenizer.chat(turns, add_generation_prompt=True))
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    if [turn["role"] for turn in prompt] != ["user"]:
        raise ValueError("a chat of several turns needs a chat template: leave out --plain, or take a model with one")
    return tokenizer.encode(prompt[0]["content"] + "\n")


def batches(prompts: Sequence[_T], size: int) -> Iterator[tuple[list[_T], int]]:
    """Give batches of `size` prompts and how many are real: the last is filled up, so that all are of one shape.

    >>> list(batches([[1], [2], [3]], 2))
    [([[1], [2]], 2), ([[3], [3]], 1)]
    """
    size = min(size, len(prompts))
    for first in range(0, len(prompts), size):
        real = list(prompts[first : first + size])
        yield real + real[-1:] * (size - len(real)), len(real)
