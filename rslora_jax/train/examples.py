"""Training examples: what the model is given, and what it should answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """Hold one turn of a chat: who speaks (one of `ROLES`), and what.

    `more` is what the chat template is given of the turn beside these, such as `name` and `tool_calls`. A turn of the
    assistant that is not `is_learnt` has no part in the loss.

    >>> Message("user", "What is 2 + 2?").role
    'user'
    """

    role: str
    content: str
    more: Mapping[str, Any] = field(default_factory=dict, hash=False)
    is_learnt: bool = True


@dataclass(frozen=True)
class Example:
    """Hold one example: what the model is given, and what it should answer.

    `prompt` is a string, or the turns of a chat before the last one. The loss is on `completion`, and on
    the assistant's earlier turns if the prompt is a chat. An empty prompt marks plain text, all of which
    is learnt and which no chat template touches. `origin` says where the example is from (file:line, or
    module:function) for use in messages; it is not compared. `more` and `is_learnt` are the last turn's, as those of a
    `Message`; `tools` describe to the chat template which tools there are.

    >>> Example("2 + 2 =", " 4") == Example("2 + 2 =", " 4", origin="sums.jsonl:1")
    True
    """

    prompt: str | tuple[Message, ...]
    completion: str
    origin: str = field(default="", compare=False)
    more: Mapping[str, Any] = field(default_factory=dict, hash=False)
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    is_learnt: bool = True

    @property
    def messages(self) -> tuple[Message, ...]:
        """The turns of the chat that it is, with the last one.

        >>> [message.role for message in Example("2 + 2 =", " 4").messages]
        ['user', 'assistant']
        """
        before = (Message("user", self.prompt),) if isinstance(self.prompt, str) else self.prompt
        return (*before, Message("assistant", self.completion, self.more, self.is_learnt))


def as_plain(example: Example) -> list[Any]:
    """Return what two examples that are equal have in common, as JSON values, of which checksums are made.

    What an example has not is not in them, so that the checksums of runs begun before there was such a thing hold.

    >>> as_plain(Example((Message("user", "Hi"),), "Ho"))
    [[{'role': 'user', 'content': 'Hi'}], 'Ho']
    """
    prompt = example.prompt
    turns = prompt if isinstance(prompt, str) else [_plain_turn(message) for message in prompt]
    more: dict[str, Any] = {"more": example.more, "tools": example.tools} if example.more or example.tools else {}
    more |= {} if example.is_learnt else {"is_learnt": False}
    return [turns, example.completion, *([more] if more else [])]


def _plain_turn(message: Message) -> dict[str, Any]:
    more = {"more": message.more} if message.more else {}
    return {"role": message.role, "content": message.content, **more} | (
        {} if message.is_learnt else {"is_learnt": False}
    )
