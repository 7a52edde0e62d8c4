"""A real byte-level tokenizer, made on the spot, with the chat templates that differ in what they do."""

from __future__ import annotations

import dataclasses
import functools

import jinja2
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

# ChatML: a newline follows the end of each turn.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Nothing marks the request for an answer; a bos token in the text; turns are trimmed.
BRACKETS = (
    "<s>{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content | trim }}</s>"
    "{% else %}[INST] {{ m.content | trim }} [/INST]{% endif %}{% endfor %}"
)
# The last answer shows an empty block of reasoning, earlier ones do not.
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The request opens a block that a finished turn does not show.
OPENED = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
# Turns have no end.
ENDLESS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

TEMPLATES = {
    "chatml": CHATML,
    "brackets": BRACKETS,
    "reasoning": REASONING,
    "opened": OPENED,
    "endless": ENDLESS,
}
SPECIALS = ["<|pad|>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


@functools.cache
def compiled(template: str) -> jinja2.Template:
    return jinja2.Template(template, keep_trailing_newline=True)


@dataclasses.dataclass(frozen=True)
class TinyTokenizer:
    backend: Tokenizer
    chat_template: str | None
    eos: str
    adds_bos: bool = False
    pad_id: int = 0

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (self.eos_id,)

    @property
    def eos_id(self) -> int:
        return self.backend.token_to_id(self.eos)

    def encode(self, text: str) -> list[int]:
        bos = [self.backend.token_to_id("<s>")] if self.adds_bos else []
        return bos + self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids, *, skip_special: bool = False) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def chat(self, messages, *, add_generation_prompt: bool = True) -> str:
        assert self.chat_template is not None
        return compiled(self.chat_template).render(messages=messages, add_generation_prompt=add_generation_prompt)


@pytest.fixture(scope="session")
def backend() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    text = ["def f(x):\n    return x\n\n", "What is the sum of two numbers?", "the answer is the number"] * 20
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.add_special_tokens([AddedToken(special, special=True) for special in SPECIALS])
    return tokenizer


@pytest.fixture
def make_tokenizer(backend):
    def make(template: str | None, **changes) -> TinyTokenizer:
        eos = "<|im_end|>" if template in ("chatml", "reasoning", "opened") else "</s>"
        return TinyTokenizer(backend, TEMPLATES[template] if template else None, eos, **changes)

    return make
