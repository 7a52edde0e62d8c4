"""A tokenizer with its special tokens and chat template, and how to build one from a GGUF file's metadata."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from rslora_jax.interop import chat_template

# How text is cut before pairs are merged, by the file's `tokenizer.ggml.pre`. The cut of digits comes first
# and decides where runs of white space end, so "\n\n1" keeps its two newlines together.
_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_PRE_TOKENIZERS = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTE_LEVEL]),
}
_CONTROL, _USER_DEFINED = 3, 4


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Turn text into token ids and back, and messages into the text of a chat.

    Take the one that a loader gives, or build one with `tokenizer_from_metadata` or `read_tokenizer`. `special` holds
    further tokens by the names that chat templates call them by, `ends` those that end an answer beside `eos_id`, and
    `options` what the template is given beside the messages, such as {"enable_thinking": False}.

    >>> tokenizer = tokenizer_from_metadata(EXAMPLE)
    >>> tokenizer.encode("hi hi<end>"), tokenizer.decode([3, 4, 3, 0])
    ([3, 4, 3, 0], 'hi hi<end>')
    >>> tokenizer.decode([3, 0], skip_special=True), tokenizer.eos_id, tokenizer.vocab_size
    ('hi', 0, 5)
    """

    backend: Backend = dataclasses.field(repr=False)
    eos_id: int
    bos_id: int | None
    pad_id: int
    vocab_size: int
    add_bos: bool = False
    chat_template: str | None = dataclasses.field(default=None, repr=False)
    special: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)
    ends: tuple[int, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens at which to stop writing: those that the files name, and what the template ends an answer with.

        >>> tokenizer_from_metadata(EXAMPLE).stop_ids
        (0,)
        """
        return tuple(dict.fromkeys((self.eos_id, *self.ends, *_turn_ends(self))))

    def with_options(self, options: Mapping[str, Any]) -> Tokenizer:
        """Return one whose template is given these options; a ValueError for one that it never looks at."""
        chat_template.check_options(self.chat_template, options)
        return dataclasses.replace(self, options={**self.options, **options})

    def encode(self, text: str) -> list[int]:
        """Give the token ids of a text.

        Special tokens written out in the text become their one id. The file says whether the id that begins
        a text is put in front (`add_bos`); where it is there already, as in many a chat, it is not put twice. A
        byte that the vocabulary lacks is left out, as by the published tokenizer: SmolLM2 has no token for six
        control characters, such as U+0004.

        >>> tokenizer_from_metadata(EXAMPLE).encode("hih")
        [3, 1]
        """
        ids = self.backend.encode(text, add_special_tokens=False).ids
        if not self.add_bos or self.bos_id is None or ids[:1] == [self.bos_id]:
            return ids
        return [self.bos_id, *ids]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Give the text of token ids (a list or an array of ints), with special tokens written out.

        Bytes that do not end a character, as when generation stops inside one, become U+FFFD.

        >>> tokenizer_from_metadata(EXAMPLE).decode([3, 1])
        'hih'
        """
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """Write messages ({"role": ..., "content": ...}) as one text, by the file's own template.

        Raises:
          ValueError: the file has no template, or the template refuses the messages.

        >>> print(tokenizer_from_metadata(EXAMPLE).chat([{"role": "user", "content": "hi"}]))
        user: hi<end>
        """
        if self.chat_template is None:
            raise ValueError("this tokenizer has no chat template: write the prompt out as plain text")
        return chat_template.render(
            self.chat_template,
            {
                **self.special,
                "bos_token": self._token(self.bos_id),
                "eos_token": self._token(self.eos_id),
                **self.options,
                "messages": messages,
                "add_generation_prompt": add_generation_prompt,
                "tools": None,
                "documents": None,
            },
        )

    def _token(self, token_id: int | None) -> str:
        return "" if token_id is None else self.backend.id_to_token(token_id) or ""


def tokenizer_from_metadata(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build a `Tokenizer` from the `tokenizer.*` entries of a GGUF file (a mapping of name to plain value).

    Raises:
      ValueError: the tokenizer is not byte-level, cuts text in a way not known here (a wrong cut would give wrong ids
        without a word), or entries are missing or do not fit together.

    >>> tokenizer_from_metadata({"tokenizer.ggml.model": "llama"})
    Traceback (most recent call last):
    ValueError: the tokenizer is of kind 'llama', but only byte-level 'gpt2' is read: convert it or load ...
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(
            f"the tokenizer is of kind {kind!r}, but only byte-level 'gpt2' is read: "
            "convert it or load the text as token ids"
        )
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in _PRE_TOKENIZERS:
        raise ValueError(
            f"the tokenizer cuts text by the rule {pre!r}, but only {', '.join(_PRE_TOKENIZERS)} are known"
        )
    for name in ("tokens", "merges", "eos_token_id"):
        if f"tokenizer.ggml.{name}" not in metadata:
            raise ValueError(f"the tokenizer lacks tokenizer.ggml.{name}: take a file converted whole")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    for name in ("eos", "bos", "padding"):
        if metadata.get(f"tokenizer.ggml.{name}_token_id", 0) >= len(tokens):
            raise ValueError(f"the {name} token is not among the {len(tokens)}: take a file converted whole")
    merges = [tuple(pair.split(" ", 1)) for pair in metadata["tokenizer.ggml.merges"]]
    try:
        backend = Backend(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"the tokenizer's merges do not fit its tokens: take a file converted whole ({error})"
        ) from error
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre]
    backend.decoder = decoders.ByteLevel()
    types = metadata.get("tokenizer.ggml.token_type", [])
    backend.add_special_tokens(_added(tokens, types, _CONTROL))
    backend.add_tokens(_added(tokens, types, _USER_DEFINED))
    eos_id = int(metadata["tokenizer.ggml.eos_token_id"])
    bos_id = metadata.get("tokenizer.ggml.bos_token_id")
    return Tokenizer(
        backend=backend,
        eos_id=eos_id,
        bos_id=None if bos_id is None else int(bos_id),
        pad_id=int(metadata.get("tokenizer.ggml.padding_token_id", eos_id)),
        vocab_size=len(tokens),
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


@functools.lru_cache(maxsize=8)  # asked for with every example
def _turn_ends(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Give the token that the template ends the assistant's turn with, where it does with one."""
    if tokenizer.chat_template is None:
        return ()
    added = {token.content: i for i, token in tokenizer.backend.get_added_tokens_decoder().items()}
    known = [text for text, i in added.items() if i in (tokenizer.eos_id, *tokenizer.ends)]
    found = chat_template.turn_end(tokenizer.chat, list(added), known)
    return () if found is None else (added[found],)


def _added(tokens: Sequence[str], types: Sequence[int], kind: int) -> list[AddedToken]:
    special = kind == _CONTROL
    return [
        AddedToken(token, normalized=False, special=special)
        for token, found in zip(tokens, types, strict=False)
        if found == kind
    ]


EXAMPLE = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<end>", "h", "i", "hi", "Ġ"],
    "tokenizer.ggml.token_type": [3, 1, 1, 1, 1],
    "tokenizer.ggml.merges": ["h i"],
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}",
}
