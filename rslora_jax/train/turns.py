"""Where a chat template puts an answer, and the tokens of a text of which the end is learnt."""

from __future__ import annotations

import functools
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from rslora_jax.train.examples import Message
from rslora_jax.train.tool_calls import name_of, with_arguments

# Put in place of an answer to see what a template writes around it: of the private use area, hence no white space,
# no part of a tag, and nothing that a template looks for.
_MARK = "\ue000\ue001"
# A tag or a special token: <think>, </s>, <|im_end|>, [INST]. Templates and tokenizers put white space beside them.
_TAGS = re.compile(r"(<[^\s<>]+>|\[/?[A-Z_]+\])")
_LONGEST_START = 64  # characters
# Texts behind which a text is encoded as it is inside another one: what some tokenizers put in front of all they are
# given then stands before these. The first is right for tokenizers that put nothing in front.
_ANCHORS = ("", "\n", "a", "1", ".")


class Tokenizer(Protocol):
    """Describe what is asked of a tokenizer.

    `encode` gives what the model is given when it generates: the bos token in front if the model wants one,
    and special tokens where their text stands. `chat` renders the chat template, special tokens included;
    it is called only if `chat_template` is not None.
    """

    @property
    def eos_id(self) -> int:
        """The id of the token that ends a text."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids at which generation stops: `eos_id`, and others such as the end of a turn."""

    @property
    def pad_id(self) -> int:
        """The id of the token that fills rows."""

    @property
    def chat_template(self) -> str | None:
        """The template of chats, if the model has one."""

    def encode(self, text: str) -> list[int]:
        """Return a text's token ids."""

    def decode(self, ids: Iterable[int], *, skip_special: bool = ...) -> str:
        """Return the text of token ids, with special tokens written out unless they are to be skipped."""

    def chat(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True, tools: Sequence[Any] | None = None
    ) -> str:
        """Return a chat as text; `tools` are given only where there are some."""


class Turn(NamedTuple):
    """Hold a rendered chat up to the end of the assistant's last turn: what stands before, and what is learnt."""

    before: str
    learnt: str


def find_turn(tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Turn:
    """Find the last message, of the assistant, in what the template renders.

    Rendered with a mark in its place, the chat shows what the template writes before and after any answer. The turn
    begins where the request for an answer ends, and ends with the first token after it at which generation stops.
    A turn that calls tools has no such place for a mark: it ends with the last such token that it renders.

    Raises:
      ValueError: the template leaves out a part of the answer, or the turn has no certain place.
    """
    chat = functools.partial(tokenizer.chat, tools=tools) if tools else tokenizer.chat
    turns = [{"role": message.role, "content": message.content, **message.more} for message in messages]
    whole = chat(turns, add_generation_prompt=False)
    request = chat(turns[:-1], add_generation_prompt=True)
    if turns[-1].get("tool_calls"):
        return _calls(tokenizer, chat, turns, request, whole)
    marked = chat([*turns[:-1], {**turns[-1], "content": _MARK}], add_generation_prompt=False)
    head, *tails = marked.split(_MARK)
    if len(tails) != 1:
        raise ValueError(f"the chat template writes an answer {len(tails)} times; use one that writes it once")
    before = _before(chat, turns[:-1], request, head)
    stop, after = len(whole) - len(tails[0]), tails[0]
    if not (whole.startswith(before) and whole.endswith(after) and len(before) <= stop):
        raise ValueError("the chat template writes other things around this answer than around others; use another one")
    answer = messages[-1].content
    if alike(answer) not in alike(whole[len(before) : stop]):
        before = _without_start(before, answer)
    kept = whole[len(before) : stop]
    _check_kept(turns[-1], kept)
    return Turn(before, kept + _end(tokenizer, after))


def join(tokenizer: Tokenizer, before: str, learnt: str) -> tuple[list[int], list[int]]:
    """Give the tokens of a text in two parts, which together decode to the whole.

    The first are those of the first part alone: when generating, it is all there is. Where no tokens for the second
    part go on from these, as is possible if the boundary is inside a token, the boundary is moved before that token.

    Raises:
      ValueError: the tokenizer has no tokens for a part of the text, or the parts make a token between them at which
        generation stops.

    >>> from rslora_jax.train.bytelevel import ByteTokenizer
    >>> join(ByteTokenizer(), "a", "b")
    ([97], [98])
    """
    joint = tokenizer.encode(before + learnt)
    text = tokenizer.decode(joint)
    _check_whole(tokenizer, before + learnt, text)
    before_ids = tokenizer.encode(before)
    size = len(os.path.commonprefix([before_ids, joint]))
    if size < len(before_ids):
        apart = Counter([*before_ids, *tokenizer.encode(learnt)])
        if made := [i for i in tokenizer.stop_ids if joint.count(i) > apart[i]]:
            what = f"{tokenizer.decode(made[:1])!r}, at which generation stops"
            raise ValueError(f"the end of the prompt and the begin of the answer make {what}; put a space between them")
        for anchor in _ANCHORS:
            start, both = tokenizer.encode(anchor), tokenizer.encode(anchor + learnt)
            rest = both[len(start) :]
            if both[: len(start)] == start and rest and tokenizer.decode(before_ids + rest) == text:
                return before_ids, rest
    return joint[:size], joint[size:]


def alike(text: str) -> str:
    """Give a text without the white space at its ends and beside tags, and with one form for equal characters.

    >>> alike(" <think>\\n1 + 1 \\n</think>\\n\\nTwo ")
    '<think>1 + 1</think>Two'
    """
    return "".join(part.strip() for part in _TAGS.split(unicodedata.normalize("NFC", text)))


def _calls(
    tokenizer: Tokenizer, chat: Callable[..., str], turns: list[dict[str, Any]], request: str, whole: str
) -> Turn:
    """Find a turn that calls tools, as `find_turn` does one that answers."""
    before = _before(chat, turns[:-1], request, whole)
    rest = whole[len(before) :]
    stops = [tokenizer.decode([i]) for i in tokenizer.stop_ids]
    ends = [rest.rindex(stop) + len(stop) for stop in stops if stop and stop in rest]
    learnt = rest[: max(ends)] if ends else rest.rstrip()
    _check_kept(turns[-1], learnt)
    calls = turns[-1]["tool_calls"]
    asked = [with_arguments(call, {"x": _MARK}) for call in calls]
    marked = chat([*turns[:-1], {**turns[-1], "tool_calls": asked}], add_generation_prompt=False)
    written = marked.count(_MARK) + marked.count(json.dumps(_MARK)[1:-1])
    if written < len(calls) or not all(name_of(call) in learnt for call in calls):
        raise ValueError(
            f"the chat template leaves out the call of {name_of(calls[0])!r} or its arguments; use one that writes the "
            "calls of tools, or write them into the content"
        )
    return Turn(before, learnt)


def _check_kept(turn: Mapping[str, Any], kept: str) -> None:
    """Raise a ValueError where a template keeps less than all of a turn's answer and of the reasoning before it."""
    for key in ("content", "reasoning_content", "thinking"):
        if (answer := turn.get(key, "")) and alike(answer) not in alike(kept):
            what = "answer" if key == "content" else f'"{key}"'
            raise ValueError(
                f"the chat template leaves out a part of the {what} {_short(answer)}, of which it keeps "
                f"{_short(kept)}; "
                "use a template that keeps all of an answer, or take that part out"
            )


def _before(chat: Callable[..., str], turns: list[dict[str, Any]], request: str, head: str) -> str:
    """Give what stands before an answer and is not learnt, of what a template writes before it."""
    before = os.path.commonprefix([request, head])
    if before == request:
        return before
    # A request may open the answer in a way that a finished turn does not show (a reasoning block, say). But where the
    # turns before are written otherwise, what they have in common ends somewhere in them.
    asked = chat(turns, add_generation_prompt=False)
    return before if len(before) >= len(os.path.commonprefix([request, asked])) else head


def _without_start(before: str, answer: str) -> str:
    """Take the start of an answer from the end of a request that opens every answer with it, such as <think>."""
    for size in range(min(len(before), len(answer), _LONGEST_START), 0, -1):
        opened = before[-size:].strip()
        if opened and answer.lstrip().startswith(opened):
            return before[:-size]
    return before


def _end(tokenizer: Tokenizer, after: str) -> str:
    """Give what is learnt of the text that a template writes after an answer."""
    stops = [tokenizer.decode([i]) for i in tokenizer.stop_ids]
    ends = [after.index(stop) + len(stop) for stop in stops if stop and stop in after]
    # Without a newline that many templates write after a turn: it is never generated.
    return after[: min(ends)] if ends else after.rstrip()


def _check_whole(tokenizer: Tokenizer, text: str, decoded: str) -> None:
    """Raise a ValueError where tokens decode to less than the text, but for the bos token in front."""
    nothing = tokenizer.decode(tokenizer.encode(""))
    if alike(decoded) in (wanted := alike(text), alike(nothing + text)):
        return
    lost = next(iter(Counter(wanted) - Counter(unicodedata.normalize("NFC", decoded))), None)
    what = f"the character {lost!r} (U+{ord(lost):04X})" if lost else f"what it makes {_short(decoded)} of"
    raise ValueError(f"the tokenizer has no tokens for {what}; take it out, or use another model")


def _short(text: str) -> str:
    """Write a text of any length as one short line."""
    return repr(text if len(text) <= 60 else f"{text[:30]}...{text[-27:]}")
