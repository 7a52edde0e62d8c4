"""The tokenizer of the real file, and what a small hand-written one refuses."""

import jax.numpy as jnp
import numpy as np
import pytest

from rslora_jax.interop.tokenizer import tokenizer_from_metadata

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two in front, two behind  ",
    "tabs\tand\r\nlines\n\n\n\tend\n",
    "It's what they'd say; we'll see, I'm sure you've heard.",
    "In 1969, 3.14159 and 1,000,000 were numbers; so are ½, ², Ⅷ and ٣.",
    "\n\n1. first\n\n2. second",
    "def f(x: int = 0) -> int:\n    if x > 10:\n        return x ** 2\n    return f(x + 1)  # again\n",
    '{"name": "Zoë", "tags": ["a\\nb", null], "n": -1.5e-7}',
    "naïve café, Ångström, e\u0301 and \u00e9, ﬁne, straße, İstanbul",
    "日本語のテキスト、简体中文、한국어, ไทย, हिन्दी",
    "Русский, Ελληνικά, עברית, العربية",
    "🎉👍🏽👩‍👩‍👧 🇨🇭 ❤️ 𝒳 𐍈",
    "\u00a0hard\u2003wide\u200bzero\ufeffmark\u2028line",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><file_sep>",
    "<|im_start |> <im_end> <|endoftext> are no special tokens",
]


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return smollm2.tokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_as_it_was(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)


def test_the_ids_of_the_published_model(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert tokenizer.vocab_size == 49152 and tokenizer.add_bos is False
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|>") == [0, 1, 2]
    assert tokenizer.encode("Hello, world!") == [19556, 28, 905, 17]


def test_every_digit_is_a_token_and_cuts_what_is_around_it(tokenizer):
    def pieces(text):
        return [tokenizer.decode([i]) for i in tokenizer.encode(text)]

    assert pieces("in 2024") == ["in", " ", "2", "0", "2", "4"]
    assert pieces("a  1\n\n2") == ["a", "  ", "1", "\n\n", "2"]
    assert pieces("x1y") == ["x", "1", "y"]
    # Without a digit behind it, the last blank of a run goes to the next word.
    assert pieces("the  end\n\n\tnow") == ["the", " ", " end", "\n\n", "\t", "now"]


def test_bytes_that_the_vocabulary_lacks_are_left_out(tokenizer):
    ids = tokenizer.encode("a\x04b\x13\x14c")
    assert ids == [tokenizer.encode(letter)[0] for letter in "abc"]


def test_special_tokens_are_skipped_on_demand_and_only_they(tokenizer):
    ids = tokenizer.encode("<|im_start|>user\n<b>hi</b><|im_end|>\n")
    assert tokenizer.decode(ids, skip_special=True) == "user\n<b>hi</b>\n"
    assert tokenizer.decode([1, 0, 2, 16], skip_special=True) == ""


def test_ids_come_as_lists_or_arrays(tokenizer):
    ids = tokenizer.encode("any kind of array")
    for kind in (tuple, iter, np.array, jnp.array, lambda ids: np.array(ids, np.uint16)):
        assert tokenizer.decode(kind(ids)) == "any kind of array"


def test_half_a_character_is_shown_as_such(tokenizer):
    ids = tokenizer.encode("𐍈")
    assert len(ids) > 1 and set(tokenizer.decode(ids[:1])) == {"\ufffd"}


def test_a_chat_is_written_by_the_template_of_the_file(tokenizer):
    system = {"role": "system", "content": "Be brief."}
    turns = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": " Three?\n"},
    ]
    written = (
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\nTwo.<|im_end|>\n"
        "<|im_start|>user\n Three?\n<|im_end|>\n"
    )
    opening = "<|im_start|>system\nBe brief.<|im_end|>\n"
    default = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    ask = "<|im_start|>assistant\n"
    assert tokenizer.chat([system, *turns]) == opening + written + ask
    assert tokenizer.chat(turns) == default + written + ask
    assert tokenizer.chat(turns, add_generation_prompt=False) == default + written
    assert tokenizer.encode(tokenizer.chat(turns)).count(tokenizer.eos_id) == 4


def test_messages_that_the_template_does_not_take_are_refused(tokenizer):
    for messages in ([{"role": "user"}], [{"role": "user", "content": None}], [{"content": "hi"}]):
        with pytest.raises(ValueError, match="the chat template does not take these messages: "):
            tokenizer.chat(messages)


HAND_WRITTEN = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["<s>", "</s>", "<think>", "a", "b", "ab", "1", "Ġ", "Ġ1"],
    "tokenizer.ggml.token_type": [3, 3, 4, 1, 1, 1, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b", "Ġ 1"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
}


def _build(**changes):
    return tokenizer_from_metadata(HAND_WRITTEN | {f"tokenizer.{k}": v for k, v in changes.items()})


def test_the_file_decides_on_the_beginning_the_cut_and_the_padding():
    assert _build().encode("ab 1") == [5, 8]
    assert _build(**{"ggml.pre": "smollm"}).encode("ab 1") == [5, 7, 6]
    begun = _build(**{"ggml.add_bos_token": True})
    assert begun.encode("ab") == [0, 5] and begun.encode("") == [0]
    assert _build().pad_id == 1 and _build(**{"ggml.padding_token_id": 0}).pad_id == 0


def test_tokens_that_users_defined_are_found_whole_but_are_not_special():
    tokenizer = _build()
    assert tokenizer.encode("<s>a<think>b</s>") == [0, 3, 2, 4, 1]
    assert tokenizer.decode([0, 3, 2, 4, 1], skip_special=True) == "a<think>b"


def test_templates_have_the_names_and_options_of_hugging_face():
    template = (
        "{{ bos_token }}{% for m in messages %}\n"
        "    {% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}\n"
        "{% if loop.index > 2 %}{% break %}{% endif %}\n"
        "{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    tokenizer = _build(chat_template=template)
    assert tokenizer.chat([{"role": "user", "content": c} for c in "xyz"]) == "<s>x</s>y</s>"
    with pytest.raises(ValueError, match="does not take these messages: no tools here"):
        tokenizer.chat([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(1) }}",
        "{{ messages[0].__class__.__mro__[-1].__subclasses__() }}",
        "{{ raise_exception.__globals__['jinja2'] }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(template):
    with pytest.raises(ValueError, match="the chat template does not take these messages"):
        _build(chat_template=template).chat([{"role": "user", "content": "hi"}])


def test_what_would_give_wrong_ids_or_none_is_refused():
    with pytest.raises(ValueError, match="no chat template: write the prompt out"):
        _build().chat([])
    with pytest.raises(ValueError, match="does not take these messages: Expected an expression"):
        _build(chat_template="{% for %}").chat([])
    for changes, message in (
        ({"ggml.model": "bert"}, "kind 'bert', but only byte-level 'gpt2' and SentencePiece's 'llama' are read"),
        ({"ggml.model": None}, "kind None"),
        ({"ggml.pre": "llama-4"}, "rule 'llama-4', but only gpt-2, smollm, .* are known"),
        ({"ggml.pre": None}, "rule None"),
        ({"ggml.merges": ["a c"]}, "merges do not fit its tokens: take a file .*`c` out of vocabulary"),
        ({"ggml.merges": ["ab"]}, "merges do not fit its tokens"),
        ({"ggml.eos_token_id": 9}, "the eos token is not among the 9: take a file converted whole"),
        ({"ggml.bos_token_id": 9}, "the bos token is not among the 9"),
    ):
        with pytest.raises(ValueError, match=message):
            _build(**changes)
    for name in ("tokens", "merges", "eos_token_id"):
        metadata = {k: v for k, v in HAND_WRITTEN.items() if k != f"tokenizer.ggml.{name}"}
        with pytest.raises(ValueError, match=f"lacks tokenizer.ggml.{name}: take a file converted whole"):
            tokenizer_from_metadata(metadata)
