"""Chats with tools, names and weights as transformers renders them: the same text and ids, learnt as by hand."""

from __future__ import annotations

import functools
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rslora_jax.train.encode import encode_example
from rslora_jax.train.forms import parse

from . import chats
from .test_encode import learnt_texts

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.reference, pytest.mark.xdist_group("reference")]

WORDS = st.text("ab é∑\n'\"{}", min_size=1, max_size=6).map(lambda text: f"w{text}w")
ARGUMENTS = st.dictionaries(st.sampled_from(["x", "city", "ü"]), WORDS | st.integers(-5, 5) | st.none(), max_size=2)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def by_hand(name, turn, is_first_text=False):
    """What is learnt of a turn, written out: never by a template."""
    calls = [call["function"] for call in turn.get("tool_calls", [])]
    if name == "hermes_tools":
        asked = [
            f'<tool_call>\n{{"name": "{c["name"]}", "arguments": {json.dumps(c["arguments"], ensure_ascii=False)}}}\n'
            "</tool_call>"
            for c in calls
        ]
        return "\n".join([*([turn["content"]] if turn["content"] else []), *asked]) + "<|im_end|>"
    if name == "llama3_tools":
        if calls:
            arguments = json.dumps(calls[0]["arguments"], ensure_ascii=False)
            return f'{{"name": "{calls[0]["name"]}", "parameters": {arguments}}}<|eot_id|>'
        return turn["content"] + "<|eot_id|>"
    listed = json.dumps(calls, ensure_ascii=False)
    return f"[TOOL_CALLS] {listed}</s>" if calls else f" {turn['content']}</s>"


@st.composite
def tool_chats(draw, name):
    turns = []
    if draw(st.booleans()):
        turns.append({"role": draw(st.sampled_from(["system", "developer"])), "content": draw(WORDS)})
    for _ in range(draw(st.integers(1, 2))):
        turns.append({"role": "user", "content": draw(WORDS), **draw(st.sampled_from([{}, {"name": "Zoe"}]))})
        if draw(st.booleans()):
            many = draw(st.integers(1, 1 if name == "llama3_tools" else 2))
            text = draw(WORDS) if name == "hermes_tools" and draw(st.booleans()) else ""
            calls = [
                {
                    "type": "function",
                    "function": {"name": draw(st.sampled_from(["add", "f"])), "arguments": draw(ARGUMENTS)},
                }
                for _ in range(many)
            ]
            turns.append({"role": "assistant", "content": text, "tool_calls": calls})
            turns += [{"role": "tool", "content": draw(WORDS)} for _ in range(many)]
        if turns[-1]["role"] != "assistant" or draw(st.booleans()):
            turns.append({"role": "assistant", "content": draw(WORDS)})
    weights = [draw(st.booleans()) if turn["role"] == "assistant" else False for turn in turns]
    return turns, weights, draw(st.sampled_from([[], [TOOL], [TOOL, TOOL]]))


@functools.cache
def reference(name):
    its = chats.WITH_TOOLS[name]
    named = {"bos_token": "<s>", "eos_token": its.eos, "chat_template": chats.source(name)}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=chats.backend("bytes"), **named)


@pytest.mark.parametrize("name", chats.WITH_TOOLS)
@chats.some(25)
@given(data=st.data())
def test_chats_with_tools_have_the_tokens_of_transformers_and_are_learnt_as_by_hand(name, data):
    turns, weights, tools = data.draw(tool_chats(name))
    tokenizer = chats.tokenizer("bytes", name)
    marked = [
        {**turn, **({} if weight or turn["role"] != "assistant" else {"train": False})}
        for turn, weight in zip(turns, weights, strict=True)
    ]
    as_openai = data.draw(st.booleans())
    for turn in marked:
        if as_openai and turn.get("tool_calls"):
            turn["tool_calls"] = [
                {**c, "id": "1", "function": {**c["function"], "arguments": json.dumps(c["function"]["arguments"])}}
                for c in turn["tool_calls"]
            ]
    while turns[-1]["role"] != "assistant":
        turns, weights, marked = turns[:-1], weights[:-1], marked[:-1]
    if not any(weights):
        return
    (encoded,) = encode_example(tokenizer, parse({"messages": marked, "tools": tools}))
    wanted = [by_hand(name, turn) for turn, weight in zip(turns, weights, strict=True) if weight]
    assert "".join(learnt_texts(tokenizer, encoded)) == "".join(wanted)
    last = max(n for n, weight in enumerate(weights) if weight)
    text = reference(name).apply_chat_template(turns[: last + 1], tools=tools or None, tokenize=False)
    assert tokenizer.decode(encoded.ids_N) == text.removesuffix("\n")
    ids = reference(name).apply_chat_template(turns[: last + 1], tools=tools or None)
    assert encoded.ids_N.tolist() == ids[: len(encoded.ids_N)] or tokenizer.decode(ids).startswith(
        tokenizer.decode(encoded.ids_N)
    )


@pytest.mark.parametrize("name", ["chatml", "llama3_tools"])
def test_what_a_template_leaves_out_of_a_turn_is_refused(name):
    tokenizer = chats.tokenizer("bytes", name) if name != "chatml" else chats.tokenizer("bytes", "chatml")
    call = {"function": {"name": "add", "arguments": {"x": "1"}}}
    turn = {"role": "assistant", "content": "I add.", "tool_calls": [call]}
    with pytest.raises(ValueError, match="the chat template leaves out"):
        encode_example(tokenizer, parse({"messages": [{"role": "user", "content": "u"}, turn]}))
    thought = {"role": "assistant", "content": "It is 2.", "reasoning_content": "1 + 1"}
    with pytest.raises(ValueError, match='leaves out a part of the "reasoning_content"'):
        encode_example(tokenizer, parse({"messages": [{"role": "user", "content": "u"}, thought]}))
