"""The forms in which people write examples, each read as an `Example`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from rslora_jax.shown import quoted, shown
from rslora_jax.train.examples import ROLES, Example, Message
from rslora_jax.train.tool_calls import calls_of


class Form(NamedTuple):
    """Hold the keys that an example of one form has, and those that it may have."""

    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()


_PROMPT, _QUESTION = Form(("prompt", "completion"), ("tools",)), Form(("question", "answer"))
_MESSAGES, _SHAREGPT = Form(("messages",), ("tools",)), Form(("conversations",), ("tools", "system"))
_ALPACA, _TEXT = Form(("instruction", "output"), ("input",)), Form(("text",))
FORMS = (_PROMPT, _QUESTION, _MESSAGES, _SHAREGPT, _ALPACA, _TEXT)
FORMS_HELP = (
    "{prompt, completion}, {question, answer}, {messages}, {conversations}, {instruction, input, output} or {text}"
)
PAIR = ("chosen", "rejected")  # of preferences, which another loss learns from
KEYS = tuple(dict.fromkeys(key for form in FORMS for key in (*form.needed, *form.optional)))

# What speakers are called elsewhere; `ROLES` mean themselves.
_SPEAKERS = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bard", "bing", "model", "function_call"), "assistant"),
    **dict.fromkeys(("function", "function_response", "observation"), "tool"),
}
# What of a turn a template is given beside its role and content.
_MORE = ("name", "tool_call_id", "reasoning_content", "thinking")
_OF_TURNS = ("role", "from", "content", "value", "weight", "train", "tool_calls", "function_call", *_MORE)


def parse(record: Mapping[str, Any], origin: str = "") -> Example:
    """Read an object of one form; a key that is null is one that is not there.

    - `{"prompt", "completion"}`: without a chat template the two are joined as they stand. Lists of turns, as TRL has
      them, are a chat of which the completion's turns of the assistant are learnt.
    - `{"question", "answer"}`: a chat of one question.
    - `{"messages"}`: a chat that ends with the assistant, with `{"tools"}` for the template if there are some.
    - `{"conversations"}`: the same, as ShareGPT has it; `{"system"}` is what it begins with.
    - `{"instruction", "input", "output"}`: Stanford Alpaca's, whose prompt is written as there (`alpaca_prompt`).
    - `{"text"}`: plain text.

    A turn is `{"role", "content"}` or `{"from", "value"}`, with `name`, `tool_calls`, `tool_call_id` and
    `reasoning_content` for the template. It is not learnt where its `weight` is 0 or its `train` false. A content is a
    string, or a list of parts of text.

    Raises:
      ValueError: it is of no form, of several, or a part of it is not what it should be. The message goes after the
        place of the example.

    >>> parse({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}).completion
    'Ho'
    """
    found = {key: value for key, value in record.items() if value is not None}
    form = _form_of(found, record)
    if form is _TEXT:
        return Example("", _text(found["text"], '"text"'), origin)
    if form is _ALPACA:
        more = _text(found.get("input", ""), '"input"', may_be_empty=True)
        prompt = alpaca_prompt(_text(found["instruction"], '"instruction"'), more)
        return Example(prompt, _text(found["output"], '"output"'), origin)
    if form is _QUESTION:
        question, answer = (_text(found[key], f'"{key}"') for key in form.needed)
        return Example((Message("user", question),), answer, origin)
    tools = _tools(found.get("tools"))
    if form is _PROMPT:
        return _of_pair(found["prompt"], found["completion"], tools, origin)
    (key,) = form.needed
    turns = turns_of(found[key], key)
    if form is _SHAREGPT and "system" in found and turns[0].role != "system":
        turns = [Message("system", _text(found["system"], '"system"', may_be_empty=True)), *turns]
    return _chat(turns, tools, origin)


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """Write an instruction, and the input beside it if there is one, as Stanford Alpaca's published prompt.

    Source: the prompt that the README of github.com/tatsu-lab/stanford_alpaca gives for fine-tuning and inference.

    >>> print(alpaca_prompt("Add them.", "2 and 3").partition("\\n\\n")[2])
    ### Instruction:
    Add them.
    <BLANKLINE>
    ### Input:
    2 and 3
    <BLANKLINE>
    ### Response:
    """
    has_input = bool(context.strip())
    paired = ", paired with an input that provides further context" if has_input else ""
    about = f"Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
    parts = [about + "request.", f"### Instruction:\n{instruction}"]
    return "\n\n".join([*parts, *([f"### Input:\n{context}"] if has_input else []), "### Response:"])


def renamed(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Give the keys of a form to what an object has under others: `columns` is {key of the form: key of the object}.

    Of its other keys only tools stay.

    >>> renamed({"q": "2 + 2", "a": "4", "text": "?"}, {"question": "q", "answer": "a"})
    {'question': '2 + 2', 'answer': '4'}
    """
    if not columns:
        return dict(record)
    if lacking := [source for source in columns.values() if source not in record]:
        raise ValueError(f"lacks the key {_quote(lacking)} that --columns names; it has {_quote(record)}")
    kept = {"tools": record["tools"]} if record.get("tools") is not None else {}
    return kept | {key: record[source] for key, source in columns.items()}


def turns_of(value: Any, key: str = "messages") -> list[Message]:
    """Read a list of turns, or one written as JSON.

    Raises:
      ValueError: it is none, or a turn of it is none.

    >>> turns_of([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}])[0].content
    'Hi'
    """
    value = _from_json(value)
    if not isinstance(value, list) or not value:
        kind = "empty" if value == [] else _kind(value)
        raise ValueError(f'has "{key}" that is {kind}; write a list of {{role, content}}')
    return [_turn(turn, f"message {number}") for number, turn in enumerate(value, start=1)]


def _form_of(found: Mapping[str, Any], record: Mapping[str, Any]) -> Form:
    if set(PAIR) <= found.keys():
        told = "prompt=prompt,completion=chosen" if "prompt" in found else "messages=chosen"
        raise ValueError(
            'is a pair of preferences ("chosen", "rejected"), which are not learnt from as such; learn from what was '
            f"chosen alone with --columns {told}"
        )
    whole = [form for form in FORMS if found.keys() >= set(form.needed)]
    if _ALPACA in whole:  # its published file has the whole as "text" too
        whole = [form for form in whole if form is not _TEXT]
    if len(whole) == 1:
        return whole[0]
    if whole:
        others = [key for form in whole[1:] for key in form.needed]
        raise ValueError(f"has {_quote(others)} beside {_quote(whole[0].needed)}; keep the keys of one form")
    nearest = max(FORMS, key=lambda form: len(found.keys() & set(form.needed)))
    missing = [key for key in nearest.needed if key not in found]
    if len(missing) == len(nearest.needed):
        raise ValueError(f"has the keys {_quote(record)}; write it as {FORMS_HELP}, or name them with --columns")
    raise ValueError(f"lacks the key {_quote(missing)}; write it as {FORMS_HELP}")


def _of_pair(prompt: Any, completion: Any, tools: tuple[Any, ...], origin: str) -> Example:
    """Read a prompt and its completion, each a text or a list of turns; of the prompt nothing is learnt."""
    if not (isinstance(prompt, list) or isinstance(completion, list)):
        return Example(_text(prompt, '"prompt"'), _text(completion, '"completion"'), origin, tools=tools)
    is_list = isinstance(prompt, list)
    before = turns_of(prompt, "prompt") if is_list else [Message("user", _text(prompt, '"prompt"'))]
    before = [Message(turn.role, turn.content, turn.more, is_learnt=False) for turn in before]
    is_list = isinstance(completion, list)
    after = turns_of(completion, "completion") if is_list else [Message("assistant", _text(completion, '"completion"'))]
    return _chat([*before, *after], tools, origin)


def _chat(turns: list[Message], tools: tuple[Any, ...], origin: str) -> Example:
    *before, last = turns
    if last.role != "assistant":
        raise ValueError(f"ends with a message of the {last.role}; end it with the assistant's")
    if not before:
        raise ValueError('has no message before the assistant\'s; give one, or write it as {"text"}')
    if not any(turn.is_learnt for turn in turns if turn.role == "assistant"):
        raise ValueError("has no turn of the assistant that is learnt; give one of them weight 1, or leave it out")
    return Example(tuple(before), last.content, origin, more=last.more, tools=tools, is_learnt=last.is_learnt)


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f'has in {where} {_kind(turn)}; give it "role" and "content"')
    turn = {key: value for key, value in turn.items() if value is not None or key in ("content", "value")}
    speaker, said = ("from", "value") if "from" in turn else ("role", "content")
    unknown = [key for key in turn if key not in _OF_TURNS]
    if unknown or speaker not in turn or not {said, "tool_calls", "function_call"} & turn.keys():
        also = ", ".join(key for key in _OF_TURNS[4:] if key != "function_call")
        raise ValueError(
            f'has in {where} the keys {_quote(turn)}; give it "role" and "content", and of others only {also}'
        )
    role = _SPEAKERS.get(turn[speaker]) if isinstance(turn[speaker], str) else None
    if role is None:
        raise ValueError(f"has in {where} the role {quoted(turn[speaker], 40)}; use one of {', '.join(ROLES)}")
    content, calls = turn.get(said), calls_of(turn, turn[speaker] == "function_call", where)
    if calls and role != "assistant":
        raise ValueError(f"has in {where} calls of tools by the {role}; only the assistant calls them")
    if content is None or turn[speaker] == "function_call":
        content = "" if calls else content
    may_be_empty = bool(calls) or role in ("tool", "system", "developer")
    text = _text(_joined(content, where), f"the content of {where}", may_be_empty=may_be_empty)
    more = {key: turn[key] for key in _MORE if turn.get(key)} | ({"tool_calls": calls} if calls else {})
    return Message(role, text, more, is_learnt=_is_learnt(turn, role, where))


def _is_learnt(turn: Mapping[str, Any], role: str, where: str) -> bool:
    """Say whether a turn of the assistant is learnt, by its "weight" or "train"."""
    said = {key: turn[key] for key in ("weight", "train") if key in turn}
    for key, value in said.items():
        if value not in (0, 1):
            raise ValueError(f'has in {where} "{key}" that is {quoted(value, 20)}; give 0 or 1, or leave it out')
        if value and role != "assistant":
            raise ValueError(f'has in {where} "{key}" for the {role}; only turns of the assistant are learnt')
    if len({bool(value) for value in said.values()}) > 1:
        raise ValueError(f'has in {where} "weight" and "train" that disagree; leave one out')
    return all(said.values())


def _joined(content: Any, where: str) -> Any:
    """Join the parts of a content, which are to be text."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type", "text" if "text" in part else "none") if isinstance(part, dict) else _kind(part)
        if isinstance(part, str):
            texts.append(part)
        elif kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise ValueError(f"has in {where} a part of type {quoted(kind, 40)}; only text can be learnt: take it out")
    return "".join(texts)


def _tools(value: Any) -> tuple[Any, ...]:
    """Read the descriptions of tools, a list or one written as JSON."""
    value = _from_json(value)
    if value in (None, "", []):
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError(f'has "tools" that is {_kind(value)}; write a list of their descriptions')
    return tuple(value)


def _from_json(value: Any) -> Any:
    """Read a list that is written as JSON, as a cell of a table has it."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _text(value: Any, name: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise ValueError(f"has {name} that is {_kind(value)}; make it a string")
    if not value.strip() and not may_be_empty:
        raise ValueError(f"has {name} that is empty; fill it in or delete the example")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"has {name} with half a surrogate pair; write the whole character") from error
    return value


def _kind(value: Any) -> str:
    kinds = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    kinds[bytes] = "bytes"
    return kinds.get(type(value), "a list" if isinstance(value, list) else "an object")


def _quote(keys: Any) -> str:
    return shown(", ".join(f'"{shown(str(key), 40)}"' for key in itertools.islice(keys, 8))) or "none"
