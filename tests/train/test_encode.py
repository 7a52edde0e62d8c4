from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rslora_jax.train.encode import Encoded, cut, encode_all, encode_example, windows
from rslora_jax.train.examples import Example, Message

QUESTION, ANSWER = "What is the sum of 2 and 3? é∑", "the answer is 5 – ∎"


def learnt_texts(tokenizer, encoded: Encoded) -> list[str]:
    """The text of each run of learnt tokens."""
    runs, edges = [], np.flatnonzero(np.diff(encoded.is_learnt_N.astype(int), prepend=0, append=0))
    for start, stop in edges.reshape(-1, 2):
        runs.append(tokenizer.decode(encoded.ids_N[start:stop]))
    return runs


@pytest.mark.parametrize(
    ("template", "learnt"),
    [
        ("chatml", ANSWER + "<|im_end|>"),
        ("brackets", " " + ANSWER + "</s>"),
        ("reasoning", "<think>\n\n</think>\n\n" + ANSWER + "<|im_end|>"),
        ("opened", ANSWER + "<|im_end|>"),
        ("endless", ANSWER + "</s>"),
        (None, ANSWER + "</s>"),
    ],
)
def test_the_loss_is_on_the_answer_and_its_end_and_nothing_else(make_tokenizer, template, learnt):
    tokenizer = make_tokenizer(template)
    (encoded,) = encode_example(tokenizer, Example(QUESTION, ANSWER))
    assert learnt_texts(tokenizer, encoded) == [learnt]
    assert encoded.is_learnt_N[-1]
    assert encoded.ids_N.dtype == np.int32
    assert encoded.is_learnt_N.dtype == bool


@pytest.mark.parametrize("template", ["chatml", "brackets", "reasoning", "endless"])
def test_what_comes_before_the_loss_is_what_generation_starts_from(make_tokenizer, template):
    tokenizer = make_tokenizer(template)
    (encoded,) = encode_example(tokenizer, Example(QUESTION, ANSWER))
    request = tokenizer.encode(tokenizer.chat([{"role": "user", "content": QUESTION}]))
    assert encoded.ids_N[~encoded.is_learnt_N].tolist() == request


def test_a_prompt_whose_end_would_merge_with_the_completion_keeps_its_tokens(make_tokenizer):
    tokenizer = make_tokenizer(None)
    prompt, completion = "What is the n", "umber?"
    assert tokenizer.encode(prompt + completion)[: len(tokenizer.encode(prompt))] != tokenizer.encode(prompt)
    (encoded,) = encode_example(tokenizer, Example(prompt, completion))
    assert encoded.ids_N[~encoded.is_learnt_N].tolist() == tokenizer.encode(prompt)
    assert learnt_texts(tokenizer, encoded) == [completion + "</s>"]


@pytest.mark.parametrize(("prompt", "completion"), [("x = ", "the sum"), ("What is the n", "umber?")])
def test_one_bos_token_where_the_tokenizer_puts_it_and_none_before_the_completion(make_tokenizer, prompt, completion):
    tokenizer = make_tokenizer(None, adds_bos=True)
    (encoded,) = encode_example(tokenizer, Example(prompt, completion))
    assert tokenizer.decode(encoded.ids_N) == f"<s>{prompt}{completion}</s>"
    assert learnt_texts(tokenizer, encoded) == [completion + "</s>"]
    assert not encoded.is_learnt_N[0]


def test_plain_text_is_learnt_whole_and_no_template_touches_it(make_tokenizer):
    (encoded,) = encode_example(make_tokenizer("chatml"), Example("", "the number"))
    assert make_tokenizer("chatml").decode(encoded.ids_N) == "the number<|im_end|>"
    assert encoded.is_learnt_N.tolist() == [False] + [True] * (len(encoded.ids_N) - 1)
    tokenizer = make_tokenizer(None, adds_bos=True)
    (encoded,) = encode_example(tokenizer, Example("", "the number"))
    assert learnt_texts(tokenizer, encoded) == ["the number</s>"]


def test_a_question_without_a_template_stands_on_a_line_of_its_own(make_tokenizer):
    tokenizer = make_tokenizer(None)
    (encoded,) = encode_example(tokenizer, Example((Message("user", QUESTION),), ANSWER))
    assert tokenizer.decode(encoded.ids_N) == f"{QUESTION}\n{ANSWER}</s>"


CHAT = (
    Message("system", "Be brief."),
    Message("user", "2 + 2?"),
    Message("assistant", "the number 4"),
    Message("user", "And 3 + 3?"),
)


@pytest.mark.parametrize(
    ("template", "turns"),
    [
        ("chatml", ["the number 4<|im_end|>", "the number 6<|im_end|>"]),
        ("brackets", [" the number 4</s>", " the number 6</s>"]),
    ],
)
def test_every_turn_of_the_assistant_is_learnt_in_one_sequence(make_tokenizer, template, turns):
    tokenizer = make_tokenizer(template)
    (encoded,) = encode_example(tokenizer, Example(CHAT, "the number 6"))
    assert learnt_texts(tokenizer, encoded) == turns


def test_turns_that_a_template_rewrites_as_history_become_sequences_of_their_own(make_tokenizer):
    tokenizer = make_tokenizer("reasoning")
    first, second = encode_example(tokenizer, Example(CHAT, "the number 6"))
    assert learnt_texts(tokenizer, first) == ["<think>\n\n</think>\n\nthe number 4<|im_end|>"]
    assert learnt_texts(tokenizer, second) == ["<think>\n\n</think>\n\nthe number 6<|im_end|>"]
    assert tokenizer.decode(second.ids_N).count("think") == 2


def test_a_chat_of_several_turns_without_a_template_is_refused_by_name(make_tokenizer):
    with pytest.raises(ValueError, match=r"^chats\.jsonl:7 cannot be encoded: .*no chat template"):
        encode_example(make_tokenizer(None), Example(CHAT, "6", origin="chats.jsonl:7"))


@given(
    prompt=st.integers(1, 30),
    completion=st.integers(1, 30),
    limit=st.integers(2, 70),
    turn=st.integers(0, 28),
)
def test_cutting_keeps_the_completion_and_counts_what_it_takes(prompt, completion, limit, turn):
    size = prompt + completion
    is_learnt_N = np.arange(size) >= prompt
    # An earlier turn, with at least the header of the last one after it.
    is_learnt_N[1 : prompt - 1] |= np.arange(1, max(prompt - 1, 1)) == turn
    whole = Encoded(np.arange(size, dtype=np.int32), is_learnt_N)
    short = cut(whole, limit)
    kept = short.ids_N.tolist()

    assert len(kept) == len(short.is_learnt_N) == min(size, limit)
    assert kept[0] == 0 and kept == sorted(set(kept))
    assert sum(short.cut) == size - len(kept)
    kept_completion = [i for i in kept if i >= prompt]
    assert kept_completion == list(range(prompt, prompt + min(completion, limit - 1)))
    assert short.cut[1] == completion - len(kept_completion)
    assert short.is_learnt_N[-1] and not short.is_learnt_N[0]
    kept_prompt = [i for i in kept if i < prompt]
    missing = sorted(set(range(prompt)) - set(kept_prompt))
    assert not missing or missing == list(range(missing[0], missing[-1] + 1))
    for place, index in enumerate(kept_prompt):
        after_gap = place > 0 and kept_prompt[place - 1] != index - 1
        assert short.is_learnt_N[place] == (is_learnt_N[index] and not after_gap)


def test_cutting_below_two_tokens_is_refused():
    with pytest.raises(ValueError, match="limit is 1"):
        cut(Encoded(np.arange(4, dtype=np.int32), np.arange(4) >= 2), 1)


@given(size=st.integers(2, 60), limit=st.integers(2, 20), has_bos=st.booleans())
def test_windows_predict_every_token_of_a_text_once_from_the_one_before(size, limit, has_bos):
    text = Encoded(100 + np.arange(size, dtype=np.int32), np.arange(size) > has_bos)
    before = text.is_learnt_N.copy()
    found = windows(text, limit)
    assert [len(window.ids_N) for window in found[:-1]] == [limit] * (len(found) - 1)
    assert 2 <= len(found[-1].ids_N) <= limit
    pairs = [pair for w in found for pair in zip(w.ids_N[:-1].tolist(), w.ids_N[1:].tolist(), strict=True)]
    assert pairs == [(100 + n, 101 + n) for n in range(size - 1)]
    assert np.concatenate([w.is_learnt_N[1:] for w in found]).tolist() == text.is_learnt_N[1:].tolist()
    assert not any(w.is_learnt_N[0] for w in found) and all(w.cut == (0, 0) for w in found)
    np.testing.assert_array_equal(text.is_learnt_N, before)


def test_windows_below_two_tokens_are_refused():
    with pytest.raises(ValueError, match="limit is 1"):
        windows(Encoded(np.arange(4, dtype=np.int32), np.arange(4) > 0), 1)


def test_tokens_of_many_examples_come_apart_into_those_of_each(make_tokenizer):
    tokenizer = make_tokenizer("reasoning")
    examples = [Example("p", "c"), Example(CHAT, "the number 6"), Example("", "text")]
    tokens = encode_all(tokenizer, examples)
    assert [a.dtype for a in tokens] == [np.int32, bool, np.int64, np.int64]
    assert tokens.sequences_E.tolist() == [1, 2, 1]
    for found, example in zip(tokens.by_example(), examples, strict=True):
        for left, right in zip(found, encode_example(tokenizer, example), strict=True):
            np.testing.assert_array_equal(left.ids_N, right.ids_N)
            np.testing.assert_array_equal(left.is_learnt_N, right.is_learnt_N)
