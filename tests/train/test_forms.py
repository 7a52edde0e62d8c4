"""The forms in which people write one and the same example."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rslora_jax.train.encode import encode_example
from rslora_jax.train.examples import Example, Message, as_plain
from rslora_jax.train.forms import FORMS, parse, renamed

from . import chats
from .test_encode import learnt_texts

pytestmark = pytest.mark.by_day_on("newest")

THEIRS = {"user": ["human", "user"], "assistant": ["gpt", "model", "assistant"], "system": ["system"]}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1, "ü": ["a b"]}}}


@st.composite
def written(draw):
    """A chat as plain turns, and the same in one of the forms of others."""
    turns = draw(chats.conversations())
    if draw(st.booleans()):
        turns = [{"role": "system", "content": draw(chats.TEXTS)}, *turns]
    kind = draw(st.sampled_from(["messages", "sharegpt", "sharegpt system", "parts", "json", "trl", "trl mixed"]))
    if kind == "parts":
        record = {"messages": [{**t, "content": draw(cut(t["content"]))} for t in turns]}
    elif kind.startswith("sharegpt"):
        said = [{"from": draw(st.sampled_from(THEIRS[t["role"]])), "value": t["content"]} for t in turns]
        record = {"conversations": said, "id": 3}
        if kind == "sharegpt system" and turns[0]["role"] == "system":
            record = {"conversations": said[1:], "system": said[0]["value"]}
    elif kind == "json":
        record = {"messages": json.dumps(turns), "tools": None}
    elif kind == "trl":
        record = {"prompt": turns[:-1], "completion": turns[-1:]}
    elif kind == "trl mixed":
        record = {"prompt": turns[:-1], "completion": turns[-1]["content"]}
    else:
        record = {"messages": [{**turn, "name": None} for turn in turns]}
    return turns, kind, record


def cut(text):
    """Lists of parts that are this text."""
    return st.integers(0, len(text)).map(
        lambda n: [{"type": "text", "text": text[:n]}, {"text": text[n:], "type": "text"}]
    )


@settings(deadline=None)
@given(written())
def test_one_chat_is_the_same_example_in_every_form(both):
    turns, kind, record = both
    example = parse(record)
    learnt = not kind.startswith("trl")  # TRL learns nothing of a prompt
    *before, last = turns
    assert example == Example(
        tuple(Message(t["role"], t["content"], is_learnt=learnt or t["role"] == "nobody") for t in before),
        last["content"],
    )


ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n2, 3\n\n### Response:"
)
ALPACA_ALONE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Response:"
)
SAME = {
    "alpaca": ({"instruction": "Add.", "input": "2, 3", "output": "5"}, Example(ALPACA, "5")),
    "alpaca alone": ({"instruction": "Add.", "input": "", "output": "5"}, Example(ALPACA_ALONE, "5")),
    "its published file": ({"instruction": "Add.", "output": "5", "text": "all of it"}, Example(ALPACA_ALONE, "5")),
    "ultrachat's prompt": (
        {"prompt": "u", "messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
        Example((Message("user", "u"),), "a"),
    ),
    "a call in JSON": (
        {
            "messages": [
                {"role": "user", "content": "u"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}],
                },
            ]
        },
        Example((Message("user", "u"),), "", more={"tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}),
    ),
    "a call of ShareGPT": (
        {
            "conversations": [
                {"from": "human", "value": "u"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                {"from": "observation", "value": ""},
                {"from": "gpt", "value": "a"},
            ]
        },
        Example(
            (
                Message("user", "u"),
                Message(
                    "assistant",
                    "",
                    {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]},
                ),
                Message("tool", ""),
            ),
            "a",
        ),
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_what_others_write_is_read_as_it_is_meant(case):
    record, example = SAME[case]
    assert parse(record) == example


@settings(deadline=None)
@given(chats.conversations(), st.data())
def test_only_turns_of_weight_one_are_learnt(turns, data):
    tokenizer = chats.tokenizer("bytes", "chatml_marked")
    turns = [{**turn, "content": f"{n}. {turn['content'].strip()[:3].strip('<|')}"} for n, turn in enumerate(turns)]
    weights = data.draw(st.lists(st.booleans(), min_size=len(turns) // 2, max_size=len(turns) // 2))
    for turn, weight in zip(turns[1::2], weights, strict=True):
        turn |= data.draw(
            st.sampled_from([{"weight": int(weight)}, {"train": weight}, {} if weight else {"weight": 0.0}])
        )
    wanted = [turn["content"] + "<|im_end|>" for turn, weight in zip(turns[1::2], weights, strict=True) if weight]
    if not wanted:
        with pytest.raises(ValueError, match="has no turn of the assistant that is learnt; give one of them weight 1"):
            parse({"messages": turns})
        return
    (encoded,) = encode_example(tokenizer, parse({"messages": turns}))
    assert learnt_texts(tokenizer, encoded) == wanted


def chat(*turns, **more):
    return {"messages": [{"role": "user", "content": "u"}, *turns], **more}


ANSWER = {"role": "assistant", "content": "a"}
IMAGE = [{"type": "text", "text": "t"}, {"type": "image_url", "image_url": {"url": "x"}}]
BAD = {
    "an image": (chat({"role": "user", "content": IMAGE}, ANSWER), "has in message 2 a part of type 'image_url'; only"),
    "an image of ShareGPT": (
        {"conversations": [{"from": "human", "value": [{"type": "image"}]}, {"from": "gpt", "value": "a"}]},
        "has in message 1 a part of type 'image'; only text can be learnt: take it out",
    ),
    "half a weight": (chat({**ANSWER, "weight": 0.5}), 'has in message 2 "weight" that is 0.5; give 0 or 1'),
    "a weight of a user": (
        {"messages": [{"role": "user", "content": "u", "weight": 1}, ANSWER]},
        'has in message 1 "weight" for the user; only turns of the assistant are learnt',
    ),
    "two that disagree": (
        chat({**ANSWER, "weight": 0, "train": True}),
        'has in message 2 "weight" and "train" that dis',
    ),
    "nothing learnt": (chat({**ANSWER, "train": False}), "has no turn of the assistant that is learnt"),
    "an unknown key": (chat({**ANSWER, "wieght": 0}), 'has in message 2 the keys "role", "content", "wieght"; give it'),
    "a call of nothing": (
        chat({**ANSWER, "tool_calls": [{"id": 1}]}),
        "has in message 2 the call {'id': 1}; write it as",
    ),
    "a call by the user": (
        {"messages": [{"role": "user", "content": "u", "tool_calls": [CALL]}, ANSWER]},
        "has in message 1 calls of tools by the user; only the assistant",
    ),
    "no list of tools": (chat(ANSWER, tools={"name": "f"}), 'has "tools" that is an object; write a list'),
    "preferences": (
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        'is a pair of preferences ("chosen", "rejected"), which are not learnt from as such; learn from what was '
        "chosen alone with --columns prompt=prompt,completion=chosen",
    ),
    "preferences of chats": ({"chosen": [ANSWER], "rejected": [ANSWER]}, "alone with --columns messages=chosen"),
    "a speaker": (
        {"conversations": [{"from": "alien", "value": "u"}]},
        "has in message 1 the role 'alien'; use one of system, developer, user, assistant, tool",
    ),
    "half of Alpaca": ({"instruction": "i", "input": "x"}, 'lacks the key "output"; write it as'),
    "Alpaca and another": (
        {"instruction": "i", "output": "o", "question": "q", "answer": "a"},
        'has "instruction", "output" beside "question", "answer"; keep the keys of one form',
    ),
    "half a chat": (
        {"prompt": "p", "completion": [{"role": "user", "content": "u"}]},
        "ends with a message of the user",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_of_no_form_is_refused_in_a_sentence(case):
    record, said = BAD[case]
    with pytest.raises(ValueError) as caught:
        parse(record)
    assert str(caught.value).startswith(said) or said in str(caught.value)
    assert "; " in str(caught.value) and "\n" not in str(caught.value)


@settings(deadline=None)
@given(st.sampled_from(FORMS), st.data())
def test_columns_of_other_names_are_those_of_the_form(form, data):
    chat = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    record = {key: chat if key in ("messages", "conversations") else f"the {key}" for key in form.needed}
    names = data.draw(st.permutations(["q", "text", "prompt", "answer", "x y"]))[: len(record)]
    columns = dict(zip(record, names, strict=True))
    other = {name: record[key] for key, name in columns.items()} | {"other": 3}
    assert parse(renamed(other, columns)) == parse(record)
    with pytest.raises(ValueError, match=r'lacks the key "q.*" that --columns names; it has "other"'):
        renamed({"other": 3}, {"prompt": "q"})


def test_what_an_example_has_not_changes_no_checksum():
    plain = Example((Message("user", "u"),), "a")
    assert json.dumps(as_plain(plain)) == '[[{"role": "user", "content": "u"}], "a"]'
    others = [
        Example((Message("user", "u", {"name": "n"}),), "a"),
        Example((Message("user", "u", is_learnt=False),), "a"),
        Example((Message("user", "u"),), "a", tools=({"name": "t"},)),
        Example((Message("user", "u"),), "a", more={"name": "n"}),
        Example((Message("user", "u"),), "a", is_learnt=False),
    ]
    assert len({json.dumps(as_plain(one)) for one in (plain, *others)}) == 6
    assert len({hash(one) for one in (plain, *others)}) >= 1  # what is not hashed is no obstacle
