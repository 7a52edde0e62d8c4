"""Chat templates of many models, small tokenizers with their special tokens, and conversations made at random.

The templates in `templates/` are ours: each does to a chat what its model's does, and little else.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from rslora_jax.interop.tokenizer import Tokenizer


class Template(NamedTuple):
    """How a template writes an answer: what ends a turn, and what the model's files name as eos."""

    end: str
    eos: str
    has_system: bool = True


TEMPLATES = {
    "chatml": Template("<|im_end|>", "<|endoftext|>"),  # the eos of a base: not what ends a turn
    "chatml_marked": Template("<|im_end|>", "<|im_end|>"),
    "llama2": Template("</s>", "</s>"),
    "llama3": Template("<|eot_id|>", "<|endoftext|>"),
    "gemma": Template("<end_of_turn>", "<eos>", has_system=False),
    "mistral": Template("</s>", "</s>", has_system=False),
    "qwen25": Template("<|im_end|>", "<|endoftext|>"),
    "qwen3": Template("<|im_end|>", "<|im_end|>"),
    "qwen3_thinking": Template("<|im_end|>", "<|im_end|>"),
    "deepseek_r1": Template("<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "smollm3": Template("<|im_end|>", "<|im_end|>"),
    "phi3": Template("<|end|>", "<|endoftext|>"),
}
# Those that write calls of tools: each by one, by one without text, as a list.
WITH_TOOLS = {
    "hermes_tools": Template("<|im_end|>", "<|endoftext|>"),
    "llama3_tools": Template("<|eot_id|>", "<|endoftext|>"),
    "mistral_tools": Template("</s>", "</s>", has_system=False),
}
SPECIALS = [
    *("<s>", "</s>", "<eos>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|end|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>"),
    *("<|system|>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
]
KINDS = ("bytes", "pieces", "old pieces")
_WORDS = (
    "def double(x):\n    return x\n\nAnswer: Paris is the answer > yes; "
    "user assistant model [INST] <think> one two </think>"
)


def some(count: int) -> settings:
    """Take so many examples, however long each takes on a machine that does other work too."""
    return settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def source(name: str) -> str:
    """Give a template's text."""
    return (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


@functools.cache
def backend(kind: str) -> Backend:
    """Make a tokenizer: of bytes as GPT-2's, or of SentencePiece's pieces as Llama's, which puts a space in front."""
    trainer = {"vocab_size": 600, "show_progress": False}
    if kind == "bytes":
        made = Backend(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        made.train_from_iterator([_WORDS] * 20, trainers.BpeTrainer(initial_alphabet=alphabet, **trainer))
    else:
        taught = Backend(models.BPE())
        taught.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        taught.train_from_iterator(
            [_WORDS.replace("\n", " ")] * 20, trainers.BpeTrainer(initial_alphabet=["▁"], **trainer)
        )
        state = json.loads(taught.to_str())["model"]
        merges = [tuple(pair) for pair in state["merges"]]
        tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *state["vocab"]]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        made = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        if kind == "pieces":
            made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:
            made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    return made


def tokenizer(kind: str, name: str | None, **options) -> Tokenizer:
    """Make the tokenizer of a kind with a template, or with none."""
    its = backend(kind)
    template = {**TEMPLATES, **WITH_TOOLS}[name or "llama2"]
    made = Tokenizer(
        backend=its,
        eos_id=its.token_to_id(template.eos),
        bos_id=its.token_to_id("<s>"),
        pad_id=its.token_to_id("</s>"),
        vocab_size=its.get_vocab_size(),
        add_bos=kind != "bytes",
        chat_template=source(name) if name else None,
    )
    return made.with_options(options)


# Among them what templates cut at, parts of the tokens that end a turn, and what tokenizers join or lose.
_PIECES = st.sampled_from(
    [
        *("Paris", "yes", "def ", "double", " ", "  ", "\n", "\n\n", "\t", ">", "|>", "<|", "<", "</", "s>", "end"),
        *("<think>", "</think>", "<think>\none two\n</think>\n\n", "[/INST]", "assistant", "model", "<b>", "</b>"),
        *("é", "e\u0301", "日本", "🎉", "\u00a0", "<|im_start|>", "<|im_end|>", "</s>", "\x04", "{{ x }}", "'"),
    ]
)
TEXTS = st.lists(_PIECES, min_size=1, max_size=6).map("".join).filter(str.strip)


@st.composite
def conversations(draw) -> list[dict[str, str]]:
    """Make a chat of one to three questions, each with its answer."""
    turns = []
    for _ in range(draw(st.integers(1, 3))):
        turns += [{"role": "user", "content": draw(TEXTS)}, {"role": "assistant", "content": draw(TEXTS)}]
    return turns
