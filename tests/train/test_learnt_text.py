"""Of every example, whatever the template and the tokenizer: what is learnt is what was meant, or it is refused.

What a template renders is asked of Jinja here, and of transformers in `test_learnt_text_reference`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import unicodedata

import jinja2
import numpy as np
import pytest
from hypothesis import example, given
from tokenizers import Tokenizer as Backend

from rslora_jax.train.encode import encode_example
from rslora_jax.train.examples import Example, Message
from rslora_jax.train.turns import alike

from . import chats

pytestmark = pytest.mark.by_day_on("newest")


def example_of(turns: list[dict[str, str]]) -> Example:
    return Example(tuple(Message(**turn) for turn in turns[:-1]), turns[-1]["content"], origin="mine.jsonl:3")


def rendered(name: str, turns: list[dict[str, str]], **options) -> str:
    """The chat by Jinja itself, without the marks of what is an assistant's."""
    source = re.sub(r"{%-? (end)?generation -?%}", "", chats.source(name))
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(source)
    template.globals["raise_exception"] = lambda message: 1 / 0
    named = {"bos_token": "<s>", "eos_token": chats.TEMPLATES[name].eos, "add_generation_prompt": False}
    return template.render(messages=turns, **named, **options)


def up_to_the_end(name: str, text: str) -> str:
    head, end, _ = text.rpartition(chats.TEMPLATES[name].end)
    return head + end


def squashed(text: str) -> str:
    return "".join(unicodedata.normalize("NFC", text).split())


def runs(is_learnt_N: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(is_learnt_N.astype(int), prepend=0, append=0))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def plainly(tokenizer, ids) -> str:
    """The text of ids, without the bos token that the tokenizer puts in front by itself."""
    text = tokenizer.decode(ids)
    return text.removeprefix("<s>").removeprefix(" ") if tokenizer.add_bos else text


def check(kind: str, name: str, turns: list[dict[str, str]], **options) -> str:
    tokenizer = chats.tokenizer(kind, name, **options)
    end = tokenizer.backend.token_to_id(chats.TEMPLATES[name].end)
    answers = [(n, turn["content"]) for n, turn in enumerate(turns) if turn["role"] == "assistant"]
    wholes = [up_to_the_end(name, rendered(name, turns[: n + 1], **options)) for n, _ in answers]
    try:
        sequences = encode_example(tokenizer, example_of(turns))
    except ValueError as error:
        assert str(error).startswith("mine.jsonl:3 cannot be encoded: ") and len(str(error)) < 300
        stops = [tokenizer.decode([i]) for i in tokenizer.stop_ids]
        holds_stop = any(stop in answer for _, answer in answers for stop in stops)
        befores = [rendered(name, turns[:n], **options) for n, _ in answers]
        written = [whole[len(os.path.commonprefix([one, whole])) :] for one, whole in zip(befores, wholes, strict=True)]
        deleted = any(squashed(answer) not in squashed(own) for (_, answer), own in zip(answers, written, strict=True))
        assert holds_stop or deleted, error
        return "refused"
    found = []
    for encoded in sequences:
        ids, learnt = encoded.ids_N.tolist(), runs(encoded.is_learnt_N)
        for start, stop in learnt:
            # (b): the turn has one token at which generation stops, its last.
            assert ids[stop - 1] == end and not set(ids[start : stop - 1]) & set(tokenizer.stop_ids)
            found.append((ids[:stop], tokenizer.decode(ids[start:stop])))
        assert encoded.is_learnt_N[-1]
    assert len(found) == len(answers)
    for (ids, learnt), whole, (_, answer) in zip(found, wholes, answers, strict=True):
        # (a): prompt and answer are what the template renders up to the end of that turn.
        assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode(whole))
        assert squashed(tokenizer.decode(ids)) == squashed(
            whole if whole.startswith("<s>") or kind == "bytes" else "<s>" + whole
        )
        if kind == "bytes":
            assert tokenizer.decode(ids) == whole
        # (c): nothing of the answer is missing.
        assert squashed(answer) in squashed(learnt)
    return "learnt"


# SentencePiece writes a space as the "▁" that is in DeepSeek's tokens, whose tokenizers are of bytes.
CASES = [(kind, name) for kind in chats.KINDS for name in chats.TEMPLATES if (kind == "bytes" or name != "deepseek_r1")]
PLAIN = [
    {"role": "user", "content": "Answer: "},
    {"role": "assistant", "content": "Paris"},
    {"role": "user", "content": "def "},
    {"role": "assistant", "content": "double"},
]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_chats_of_every_template_are_learnt(kind, name):
    assert check(kind, name, PLAIN) == "learnt"
    system = [{"role": "system", "content": "Be brief."}]
    if chats.TEMPLATES[name].has_system:
        assert check(kind, name, system + PLAIN[:2]) == "learnt"
    else:
        with pytest.raises(ValueError, match=r"mine\.jsonl:3 cannot be encoded: the chat template does not take"):
            encode_example(chats.tokenizer(kind, name), example_of(system + PLAIN[:2]))


@pytest.mark.parametrize(("kind", "name"), CASES)
@chats.some(10)
@given(turns=chats.conversations())
def test_a_chat_is_learnt_as_the_template_renders_it_or_refused(kind, name, turns):
    check(kind, name, turns)


@pytest.mark.nightly
@pytest.mark.parametrize(("kind", "name"), CASES)
@chats.some(100)
@given(turns=chats.conversations())
def test_many_chats_are_learnt_as_the_template_renders_them_or_refused(kind, name, turns):
    check(kind, name, turns)


@pytest.mark.parametrize("kind", chats.KINDS)
@chats.some(100)
@given(prompt=chats.TEXTS, completion=chats.TEXTS)
@example(prompt="</", completion="s>")
@example(prompt="</", completion="s>Paris")
def test_without_a_template_what_is_learnt_is_the_completion_and_the_end(kind, prompt, completion):
    tokenizer = chats.tokenizer(kind, None)
    body = completion.removesuffix("</s>")
    try:
        (encoded,) = encode_example(tokenizer, Example(prompt, completion))
    except ValueError:
        assert "</s>" in body or (prompt + body).count("</s>") > prompt.count("</s>")
        return
    ids, ((start, stop),) = encoded.ids_N.tolist(), runs(encoded.is_learnt_N)
    assert stop == len(ids) and ids[-1] == tokenizer.eos_id and tokenizer.eos_id not in ids[start:-1]
    assert tokenizer.decode(ids[:-1]) == tokenizer.decode(tokenizer.encode(prompt + body))
    assert squashed(tokenizer.decode(ids[start:-1])).endswith(squashed(body))
    if kind == "bytes":
        assert tokenizer.decode(ids) == prompt + body + "</s>"


@pytest.mark.parametrize("kind", chats.KINDS)
@pytest.mark.parametrize(
    ("prompt", "completion"), [("Answer: ", "Paris"), ("def ", "double"), ("x =", " 1"), ("a", "b")]
)
def test_no_space_is_learnt_that_the_completion_does_not_begin_with(kind, prompt, completion):
    tokenizer = chats.tokenizer(kind, None)
    (encoded,) = encode_example(tokenizer, Example(prompt, completion))
    assert plainly(tokenizer, encoded.ids_N) == prompt + completion + "</s>"
    # The prompt's tokens are those that generation starts from.
    assert encoded.ids_N[~encoded.is_learnt_N].tolist() == tokenizer.encode(prompt)


def learnt(name: str, answer: str, kind: str = "bytes", **options) -> str:
    tokenizer = chats.tokenizer(kind, name, **options)
    (encoded,) = encode_example(tokenizer, Example("one", answer, origin="mine.jsonl:3"))
    ((start, stop),) = runs(encoded.is_learnt_N)
    return tokenizer.decode(encoded.ids_N[start:stop])


@pytest.mark.parametrize("answer", [">", "|>", "<|im_end", "_end|", "</think>", "s>", "<", "\n>"])
@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "phi3"])
def test_an_answer_that_is_a_part_of_the_end_is_learnt_with_one_end(name, answer):
    assert learnt(name, answer).strip() == answer.strip() + chats.TEMPLATES[name].end


REASONED = "<think>one two</think>yes"


def test_reasoning_is_learnt_where_the_template_keeps_it_and_refused_where_it_does_not():
    assert learnt("chatml", REASONED) == REASONED + "<|im_end|>"
    assert learnt("qwen3", REASONED) == "<think>\none two\n</think>\n\nyes<|im_end|>"
    assert learnt("qwen3_thinking", REASONED) == "<think>\none two\n</think>\n\nyes<|im_end|>"
    message = (
        "mine.jsonl:3 cannot be encoded: the chat template leaves out a part of the answer '<think>one two</think>yes'"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        learnt("deepseek_r1", REASONED)


def test_every_reasoned_turn_of_a_chat_is_learnt_as_it_is_generated():
    turns = [{**turn, "content": REASONED} if turn["role"] == "assistant" else turn for turn in PLAIN]
    tokenizer = chats.tokenizer("bytes", "qwen3")
    texts = [
        tokenizer.decode(one.ids_N[start:stop])
        for one in encode_example(tokenizer, example_of(turns))
        for start, stop in runs(one.is_learnt_N)
    ]
    assert texts == ["<think>\none two\n</think>\n\nyes<|im_end|>"] * 2


def test_an_end_within_an_answer_is_refused_and_one_that_is_written_out_is_not_doubled():
    for name, answer in (("chatml", "a<|im_end|>b"), ("chatml", "a<|im_end|>"), ("chatml", "a<|endoftext|>")):
        with pytest.raises(
            ValueError, match=r"mine\.jsonl:3 cannot be encoded: the answer holds '<\|.*generation stops"
        ):
            learnt(name, answer)
    tokenizer = chats.tokenizer("bytes", None)
    (encoded,) = encode_example(tokenizer, Example("a", "b</s>"))
    assert tokenizer.decode(encoded.ids_N) == "ab</s>"
    (encoded,) = encode_example(tokenizer, Example("", "one</s>two"))  # plain text is no turn
    assert tokenizer.decode(encoded.ids_N) == "one</s>two</s>"


@pytest.mark.parametrize("answer", ["yes", REASONED])
def test_an_answer_after_an_answer_is_learnt_alone_or_refused(answer):
    # Qwen 3 writes the first answer otherwise once another one follows.
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    turns.append({"role": "assistant", "content": answer})
    tokenizer = chats.tokenizer("bytes", "qwen3")
    if answer == REASONED:
        with pytest.raises(ValueError, match="writes other things around this answer than around others"):
            encode_example(tokenizer, example_of(turns))
        return
    last = encode_example(tokenizer, example_of(turns))[-1]
    assert [tokenizer.decode(last.ids_N[a:b]) for a, b in runs(last.is_learnt_N)] == ["yes<|im_end|>"]


def test_white_space_without_end_takes_no_time():
    text = ("a" + " " * 300_000 + "b" + "\n" * 300_000 + "<" * 100_000 + "c") * 2
    assert alike(f" {text} ") == text


def test_options_of_a_template_change_what_is_rendered():
    turns = PLAIN[:2]
    for name, option in (("qwen3", False), ("smollm3", False), ("smollm3", True)):
        assert check("bytes", name, turns, enable_thinking=option) == "learnt"
    assert learnt("smollm3", "yes", enable_thinking=False) == "yes<|im_end|>"
    assert learnt("qwen3", "yes", enable_thinking=False) == "yes<|im_end|>"
    assert learnt("qwen3", "yes") == "<think>\n\n</think>\n\nyes<|im_end|>"
    with pytest.raises(ValueError, match="has no option enable_thinkin: did you mean enable_thinking"):
        chats.tokenizer("bytes", "qwen3", enable_thinkin=False)
    with pytest.raises(ValueError, match="the template option messages is given by the chat itself"):
        chats.tokenizer("bytes", "qwen3", messages="[]")


def test_generation_stops_at_what_ends_the_templates_turn():
    for name, template in chats.TEMPLATES.items():
        tokenizer = chats.tokenizer("bytes", name)
        stops = [tokenizer.decode([i]) for i in tokenizer.stop_ids]
        assert stops == list(dict.fromkeys([template.eos, template.end])), name


@pytest.mark.parametrize("answer", ["a\x04b", "日本"])
def test_what_the_vocabulary_lacks_is_refused_by_name(answer):
    tokenizer = chats.tokenizer("bytes", None)
    state = json.loads(tokenizer.backend.to_str())
    lost = {"Ą": "\x04"}  # the byte 4, as GPT-2 writes it
    state["model"]["vocab"] = {k: v for k, v in state["model"]["vocab"].items() if k not in lost}
    smaller = dataclasses.replace(tokenizer, backend=Backend.from_str(json.dumps(state)))
    if "\x04" not in answer:
        assert encode_example(smaller, Example("x", answer))
        return
    with pytest.raises(ValueError, match=r"no tokens for the character '\\x04' \(U\+0004\); take it out"):
        encode_example(smaller, Example("x", answer))
