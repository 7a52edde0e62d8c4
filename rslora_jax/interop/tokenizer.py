"""A tokenizer with its special tokens and chat template, and how to build one from a GGUF file's metadata."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer as Backend

from rslora_jax.interop import chat_template
from rslora_jax.interop.gguf_vocabulary import read_vocabulary


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Turn text into token ids and back, and messages into the text of a chat.

    Take the one that a loader gives, or build one with `tokenizer_from_metadata` or `read_tokenizer`. `special` holds
    further tokens by the names that chat templates call them by, `ends` those that end an answer beside `eos_id`, and
    `options` what the template is given beside the messages, such as {"enable_thinking": False}. `source` is the file
    or folder that it came from, for errors.

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
    source: str = dataclasses.field(default="", repr=False, compare=False)

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

    def padded_within(self, rows: int) -> Tokenizer:
        """Return one whose padding is a token of a table of so many rows: that of its own is often one beyond.

        What stands in a padded place is never looked at, so that any token will do.

        >>> dataclasses.replace(tokenizer_from_metadata(EXAMPLE), pad_id=5).padded_within(5).pad_id
        0
        """
        return self if self.pad_id < rows else dataclasses.replace(self, pad_id=self.eos_id)

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

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Write messages ({"role": ..., "content": ...}) as one text, by the file's own template.

        `tools` are descriptions of those that the model may call, where the template writes such.

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
                "tools": list(tools) if tools else None,
                "documents": None,
            },
            self.source,
        )

    def _token(self, token_id: int | None) -> str:
        return "" if token_id is None else self.backend.id_to_token(token_id) or ""


def tokenizer_from_metadata(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build a `Tokenizer` from the `tokenizer.*` entries of a GGUF file (a mapping of name to plain value).

    Its ends are the tokens that the file says end a text, a turn or a message.

    Raises:
      ValueError: as `gguf_vocabulary.read_vocabulary`, or the chat template is no text.

    >>> tokenizer_from_metadata({"tokenizer.ggml.model": "bert"})
    Traceback (most recent call last):
    ValueError: the tokenizer is of kind 'bert', but only byte-level 'gpt2' and SentencePiece's 'llama' are read: ...
    """
    backend, ids, add_bos = read_vocabulary(metadata)
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise ValueError("tokenizer.chat_template is no text: take a file converted whole")
    named = {"unknown": "unk_token", "padding": "pad_token"}
    return Tokenizer(
        backend=backend,
        eos_id=ids["eos"],
        bos_id=ids.get("bos"),
        pad_id=ids.get("padding", ids["eos"]),
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        add_bos=add_bos,
        chat_template=template,
        special={theirs: backend.id_to_token(ids[name]) or "" for name, theirs in named.items() if name in ids},
        ends=tuple(ids[name] for name in ("eos", "eot", "eom") if name in ids),
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


EXAMPLE = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<end>", "h", "i", "hi", "Ġ"],
    "tokenizer.ggml.token_type": [3, 1, 1, 1, 1],
    "tokenizer.ggml.merges": ["h i"],
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}",
}
