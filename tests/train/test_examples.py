from __future__ import annotations

import json
import re

import pytest

from rslora_jax.train.examples import Example, Message
from rslora_jax.train.records import read_jsonl

GOOD = '{"prompt": "p", "completion": "c"}'


@pytest.fixture
def write(tmp_path):
    def write(*lines: str | bytes):
        path = tmp_path / "mine.jsonl"
        path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
        return path

    return write


def turns(*roles: str) -> str:
    return json.dumps({"messages": [{"role": role, "content": f"from {role}"} for role in roles]})


def test_all_four_forms_are_read_in_order(write):
    path = write(
        '{"prompt": " p ", "completion": " c\\n"}',
        '{"answer": "a", "id": 7, "question": "q"}',
        turns("system", "user", "assistant", "user", "assistant"),
        '{"text": "t"}',
    )
    examples = read_jsonl(path)
    assert examples == [
        Example(" p ", " c\n"),
        Example((Message("user", "q"),), "a"),
        Example(
            tuple(Message(role, f"from {role}") for role in ("system", "user", "assistant", "user")),
            "from assistant",
        ),
        Example("", "t"),
    ]
    assert [example.origin for example in examples] == [f"{path}:{n}" for n in (1, 2, 3, 4)]


def test_marks_line_ends_and_blank_lines_of_other_systems_are_read(write):
    path = write(b"\xef\xbb\xbf" + GOOD.encode() + b"\r", "", "   ", '{"text": "a\u2028b"}', "")
    assert [(e.completion, e.origin.rpartition(":")[2]) for e in read_jsonl(path)] == [
        ("c", "1"),
        ("a\u2028b", "4"),
    ]


BAD = {
    "cut off": ('{"prompt": "p"', r"is not JSON (expecting ',' delimiter at column 15); write one whole"),
    "a list": ("[1]", "is a list, not an object; write it as {prompt, completion}"),
    "a number": ("7", "is a number, not an object"),
    "null": ("null", "is null, not an object"),
    "deep": ("[" * 100_000, "is nested too deeply"),
    "latin-1": (b'{"text": "caf\xe9"}', "is not UTF-8 at byte 14; save the file as UTF-8"),
    "no keys": ("{}", "has the keys none; write it as"),
    "other keys": ('{"words": "i", "deeds": "o"}', 'has the keys "words", "deeds"; write it as'),
    "half": ('{"question": "q"}', 'lacks the key "answer"; write it as'),
    "two forms": (
        '{"prompt": "p", "completion": "c", "text": "t"}',
        'has "text" beside "prompt", "completion"; keep the keys of one form',
    ),
    "twice": ('{"text": "a", "text": "b"}', 'has the key "text" twice; keep one of them'),
    "wrong type": ('{"prompt": "p", "completion": 4}', 'has "completion" that is a number; make it a string'),
    "a boolean": ('{"text": true}', 'has "text" that is a boolean'),
    "empty completion": (
        '{"prompt": "p", "completion": " \\n"}',
        'has "completion" that is empty; fill it in or delete',
    ),
    "empty prompt": ('{"prompt": "", "completion": "c"}', 'has "prompt" that is empty'),
    "half a character": ('{"text": "\\ud83d"}', 'has "text" with half a surrogate pair'),
    "messages": ('{"messages": "hi"}', 'has "messages" that is a string; write a list of {role, content}'),
    "no messages": ('{"messages": []}', 'has "messages" that is empty; write a list'),
    "message": ('{"messages": ["hi"]}', "has in message 1 a string; give it"),
    "message keys": (
        '{"messages": [{"speaker": "user", "words": "v"}]}',
        'has in message 1 the keys "speaker", "words"; give it "role" and "content"',
    ),
    "role": (turns("user", "asistant"), "has in message 2 the role 'asistant'; use one of system, developer, user"),
    "content": (
        '{"messages": [{"role": "user", "content": null}]}',
        "has the content of message 1 that is null; make it a string",
    ),
    "ends with user": (turns("assistant", "user"), "ends with a message of the user; end it with the"),
    "no question": (turns("assistant"), "has no message before the assistant's; give one"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_named_by_file_and_line_with_what_to_do(write, case):
    line, message = BAD[case]
    path = write(GOOD, "", line, GOOD)
    with pytest.raises(ValueError) as caught:
        read_jsonl(path)
    assert str(caught.value).startswith(f"{path}:3 {message}")
    assert "; " in str(caught.value) and "\n" not in str(caught.value)


def test_several_bad_lines_are_counted_and_the_first_three_are_shown(write):
    path = write(*["7", GOOD] * 5)
    with pytest.raises(ValueError) as caught:
        read_jsonl(path)
    message = str(caught.value)
    assert message.startswith(f"5 bad lines: {path}:1 is a number") and message.endswith("; and 2 more")
    assert re.findall(r"(?:jsonl:|line )(\d+)", message) == ["1", "3", "5"]


def test_a_file_without_examples_is_refused(write):
    with pytest.raises(ValueError, match=r"mine\.jsonl holds no examples; write one JSON object a line"):
        read_jsonl(write("", "  "))


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl cannot be read \(no such file or directory\); give"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"cannot be read \(is a directory\)"):
        read_jsonl(tmp_path)
