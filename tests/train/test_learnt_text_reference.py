"""Chats as transformers renders and masks them: the same text, the same ids, the same learnt tokens."""

from __future__ import annotations

import functools
import os

import numpy as np
import pytest
from hypothesis import given

from rslora_jax.train.encode import encode_example

from . import chats
from .test_learnt_text import CASES, example_of

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.reference, pytest.mark.xdist_group("reference")]


@functools.cache
def reference(kind: str, name: str):
    its = chats.TEMPLATES[name]
    named = {"bos_token": "<s>", "eos_token": its.eos, "chat_template": chats.source(name)}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=chats.backend(kind), **named)


def learnt_or_refused(tokenizer, turns):
    try:
        return encode_example(tokenizer, example_of(turns))
    except ValueError:
        return None


@pytest.mark.parametrize(("kind", "name"), CASES)
@chats.some(5)
@given(turns=chats.conversations())
def test_texts_and_ids_are_those_of_transformers(kind, name, turns):
    ours, theirs = chats.tokenizer(kind, name), reference(kind, name)
    for ask in (True, False):
        text = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask)
        assert ours.chat(turns, add_generation_prompt=ask) == text
    if (sequences := learnt_or_refused(ours, turns)) is None:
        return
    ids = sequences[-1].ids_N.tolist()
    whole = theirs.apply_chat_template(turns)
    if ours.add_bos and whole[0] != ours.bos_id:
        whole = [ours.bos_id, *whole]
    # Where a prompt's last token joins with the answer's first, ours keeps the prompt's as it is when generating.
    assert ids == whole[: len(ids)] or ours.decode(whole).startswith(ours.decode(ids))


@pytest.mark.parametrize("options", [{}, {"enable_thinking": True}, {"enable_thinking": False}])
@pytest.mark.parametrize("name", ["chatml_marked", "smollm3"])
@chats.some(30)
@given(turns=chats.conversations())
def test_what_is_learnt_is_what_a_template_marks_as_the_assistants(name, options, turns):
    if name == "chatml_marked" and options:
        return
    ours, theirs = chats.tokenizer("bytes", name, **options), reference("bytes", name)
    # Several where a prompt's last token would join with an answer's first: then their ids are not transformers'.
    if (sequences := learnt_or_refused(ours, turns)) is None or len(sequences) > 1:
        return
    (encoded,) = sequences
    found = theirs.apply_chat_template(turns, return_assistant_tokens_mask=True, return_dict=True, **options)
    ids, marked = found["input_ids"], np.array(found["assistant_masks"], bool)
    size = len(encoded.ids_N)
    if encoded.ids_N.tolist() != ids[:size]:  # so of the last answer alone
        return
    if name == "chatml_marked":
        assert encoded.is_learnt_N.tolist() == marked[:size].tolist() and not marked[size:].any()
        return
    # SmolLM3 marks the turn with its header, which is asked with, and with the newline behind it.
    header, end = "<|im_start|>assistant\n", ours.backend.token_to_id("<|im_end|>")
    header += "" if options.get("enable_thinking", True) else "<think>\n\n</think>\n"
    own = np.zeros(len(ids), bool)
    for start in np.flatnonzero(np.diff(marked.astype(int), prepend=0) == 1).tolist():
        begin = start + len(ours.encode(header))
        assert ours.decode(ids[start:begin]) == header
        own[begin : ids.index(end, begin) + 1] = True
    assert encoded.is_learnt_N.tolist() == own[:size].tolist() and not (own & ~marked).any()
