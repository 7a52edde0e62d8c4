"""A tokenizer with its special tokens and chat template, and how to build one from a GGUF file's metadata."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

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
    further tokens by the names that chat templates call them by, and `ends` those that end an answer beside `eos_id`,
    such as the end of a turn.

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

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens at which to stop writing."""
        return tuple(dict.fromkeys((self.eos_id, *self.ends)))

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

        The template comes with the file, hence from a stranger: it runs in a sandbox.

        Raises:
          ValueError: the file has no template, or the template refuses the messages.

        >>> print(tokenizer_from_metadata(EXAMPLE).chat([{"role": "user", "content": "hi"}]))
        user: hi<end>
        """
        if self.chat_template is None:
            raise ValueError("this tokenizer has no chat template: write the prompt out as plain text")
        try:
            return _template(self.chat_template).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **{**self.special, "bos_token": self._token(self.bos_id), "eos_token": self._token(self.eos_id)},
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template does not take these messages: {error}") from error

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


@functools.cache  # a data set renders one template thousands of times
def _template(source: str) -> jinja2.Template:
    # The options and names here, and the names given when rendering, are what templates written for Hugging Face
    # rely on.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json  # jinja's own writes for HTML
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    return environment.from_string(source)


def _added(tokens: Sequence[str], types: Sequence[int], kind: int) -> list[AddedToken]:
    special = kind == _CONTROL
    return [
        AddedToken(token, normalized=False, special=special)
        for token, found in zip(tokens, types, strict=False)
        if found == kind
    ]


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


EXAMPLE = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<end>", "h", "i", "hi", "Ġ"],
    "tokenizer.ggml.token_type": [3, 1, 1, 1, 1],
    "tokenizer.ggml.merges": ["h i"],
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}",
}
