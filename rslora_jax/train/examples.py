"""Training examples, and the user's own in JSON lines."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from rslora_jax.shown import quoted, shown

ROLES = ("system", "user", "assistant", "tool")
FORMS = (("prompt", "completion"), ("question", "answer"), ("messages",), ("text",))
FORMS_HELP = "{prompt, completion}, {question, answer}, {messages} or {text}"
_BAD_ROWS_SHOWN = 3
_LONGEST_LINE = 1 << 25  # bytes: an object takes many times those of its JSON
_LONGEST = 220  # characters of what is said of them, without the file's name


@dataclass(frozen=True)
class Message:
    """Hold one turn of a chat: who speaks (one of `ROLES`), and what.

    >>> Message("user", "What is 2 + 2?").role
    'user'
    """

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """Hold one example: what the model is given, and what it should answer.

    `prompt` is a string, or the turns of a chat before the last one. The loss is on `completion`, and on
    the assistant's earlier turns if the prompt is a chat. An empty prompt marks plain text, all of which
    is learnt and which no chat template touches. `origin` says where the example is from (file:line, or
    module:function) for use in messages; it is not compared.

    >>> Example("2 + 2 =", " 4") == Example("2 + 2 =", " 4", origin="sums.jsonl:1")
    True
    """

    prompt: str | tuple[Message, ...]
    completion: str
    origin: str = field(default="", compare=False)


def read_jsonl(path: str | PathLike[str]) -> list[Example]:
    """Read a file of one JSON object a line, each in one of four forms.

    - `{"prompt": ..., "completion": ...}`: without a chat template the two are joined as they stand.
    - `{"question": ..., "answer": ...}`: a chat of one question.
    - `{"messages": [{"role": ..., "content": ...}, ...]}`: a chat that ends with the assistant.
    - `{"text": ...}`: plain text.

    The file is UTF-8. Blank lines are skipped; every other line becomes an example, in order. Keys of no
    form (an id, a source) are left alone; those of two forms leave open which is meant, and are an error.

    Raises:
      ValueError: the file cannot be read, holds no example, or has bad lines. All lines are checked
        first; the message counts the bad ones and says for the first few, by file:line, what is wrong.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp(), "sums.jsonl")
    >>> _ = path.write_text('{"prompt": "2 + 2 =", "completion": " 4"}')
    >>> read_jsonl(path)[0].completion
    ' 4'
    """
    return parse_all(path, _lines(Path(path)), decode_line, kind="line")


def parse_all(
    path: str | PathLike[str], rows: Iterable[tuple[int, Any]], decode: Callable[[Any], dict[str, Any]], *, kind: str
) -> list[Example]:
    """Make an example of each numbered row of a file, where `decode` turns a row into an object of one form.

    `kind` is what the file's rows are called.

    Raises:
      ValueError: there are no rows, or bad ones; as `read_jsonl` says.

    >>> parse_all("sums", [(1, '2 + 2'), (2, '3 + 3')], lambda row: {"text": row}, kind="line")[1].origin
    'sums:2'
    """
    examples: list[Example] = []
    problems, count = list[str](), 0
    for number, row in rows:
        origin = f"{path}:{number}"
        try:
            examples.append(_parse(decode(row), origin))
        except ValueError as error:
            count += 1
            # Of the first all is said; of the others only what is wrong.
            text = f"{origin} {error}" if count == 1 else f"{kind} {number} {str(error).partition(';')[0]}"
            length = sum(map(len, (*problems, text))) - len(str(path))
            if count <= _BAD_ROWS_SHOWN and (count == 1 or length <= _LONGEST):
                problems.append(text)
    if count == 1:
        raise ValueError(problems[0])
    if count:
        more = f"; and {count - len(problems)} more" if count > len(problems) else ""
        raise ValueError(f"{count} bad {kind}s: {'; '.join(problems)}{more}")
    if not examples:
        what = "JSON object a line" if kind == "line" else f"example a {kind}"
        raise ValueError(f"{path} holds no examples; write one {what}, as {FORMS_HELP}")
    return examples


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        # Bytes, so that one line of bad UTF-8 is one bad line, and U+2028 inside a string ends no line.
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line := line.rstrip():
                    yield number, line
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(f"{path} cannot be read ({reason}); give the path of a JSON lines file") from error


def _parse(record: dict[str, Any], origin: str) -> Example:
    form = _form(record)
    if form == ("messages",):
        *before, last = _messages(record["messages"])
        return Example(tuple(before), last.content, origin)
    texts = [_text(record[key], f'"{key}"') for key in form]
    if form == ("text",):
        return Example("", texts[0], origin)
    if form == ("question", "answer"):
        return Example((Message("user", texts[0]),), texts[1], origin)
    return Example(texts[0], texts[1], origin)


def decode_line(line: bytes) -> dict[str, Any]:
    """Read one line of JSON as an object; a ValueError says what it is in place of one.

    >>> decode_line(b'{"text": "a", "text": "b"}')
    Traceback (most recent call last):
    ValueError: has the key "text" twice; keep one of them
    """
    if len(line) > _LONGEST_LINE:
        raise ValueError(f"is longer than {_LONGEST_LINE} bytes; write what it holds as several lines")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from error
    try:
        record = json.loads(text, object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as error:
        reason = f"{error.msg.lower()} at column {error.colno}"
        raise ValueError(f"is not JSON ({reason}); write one whole JSON object on each line") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply; write one flat JSON object on each line") from error
    if not isinstance(record, dict):
        raise ValueError(f"is {_kind(record)}, not an object; write it as {FORMS_HELP}")
    return record


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"has the key {_quote([repeated])} twice; keep one of them")
    return record


def _form(record: dict[str, Any]) -> tuple[str, ...]:
    nearest = max(FORMS, key=lambda form: len(record.keys() & set(form)))
    missing = [key for key in nearest if key not in record]
    others = [key for form in FORMS for key in form if key in record and key not in nearest]
    if len(missing) == len(nearest):
        raise ValueError(f"has the keys {_quote(record)}; write it as {FORMS_HELP}")
    if missing:
        raise ValueError(f"lacks the key {_quote(missing)}; write it as {FORMS_HELP}")
    if others:
        raise ValueError(f"has {_quote(others)} beside {_quote(nearest)}; keep the keys of one form")
    return nearest


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        kind = "empty" if value == [] else _kind(value)
        raise ValueError(f'has "messages" that is {kind}; write a list of {{role, content}}')
    messages = []
    for number, turn in enumerate(value, start=1):
        where = f"message {number}"
        if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
            found = f"the keys {_quote(turn)}" if isinstance(turn, dict) else _kind(turn)
            raise ValueError(f'has in {where} {found}; give it "role" and "content" and nothing else')
        if turn["role"] not in ROLES:
            raise ValueError(f"has in {where} the role {quoted(turn['role'], 40)}; use one of {', '.join(ROLES)}")
        messages.append(Message(turn["role"], _text(turn["content"], f"the content of {where}")))
    if messages[-1].role != "assistant":
        raise ValueError(f"ends with a message of the {messages[-1].role}; end it with the assistant's")
    if len(messages) == 1:
        raise ValueError('has no message before the assistant\'s; give one, or write it as {"text"}')
    return messages


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"has {name} that is {_kind(value)}; make it a string")
    if not value.strip():
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
