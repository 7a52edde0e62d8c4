"""The tokenizer that lies beside adapters, as those who train with a template or tokens of their own save it there."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rslora_jax.interop.kept_tokenizer import is_whole, same_files
from rslora_jax.interop.model import Model
from rslora_jax.interop.tokenizer import Tokenizer
from rslora_jax.interop.tokenizer_files import read_tokenizer, with_words_of
from rslora_jax.shown import quoted


def with_own_tokenizer(model: Model, folder: Path | None, *, text: bool = True) -> Model:
    """Return a model with the tokenizer of its adapters in place of its own, and say how they differ.

    Generation stops at the ends of both. A folder without a tokenizer.json has the base's tokens.

    Args:
      model: the base.
      folder: from `tokenizer_beside`; None leaves the model as it is.
      text: as of `load_model`.

    Raises:
      ValueError: the files are damaged, or have tokens for which the model has no rows.
    """
    if folder is None or (model.tokenizer is None and not is_whole(folder)):
        return model
    base = model.tokenizer

    def read() -> Tokenizer:
        if not is_whole(folder):
            return with_words_of(folder, base)
        ends = () if base is None else (*base.ends, base.eos_id)
        own = read_tokenizer(folder, eos_id=ends[0] if ends else None).padded_within(model.config.vocab_size)
        check_rows(folder, own, model.config.vocab_size)
        return dataclasses.replace(own, ends=tuple(dict.fromkeys(i for i in ends if i < own.vocab_size)))

    own = read_or_none(read, text)
    if base is not None and own is not None and (found := differences(own, base)):
        text_of = (
            f"{folder} has a tokenizer of its own, which is used: it differs from the base's in {', '.join(found)}"
        )
        print(text_of, file=sys.stderr, flush=True)
    return dataclasses.replace(model, tokenizer=own)


def read_or_none(read: Callable[[], Tokenizer], text: bool) -> Any:
    """Return a tokenizer; None, which is said, where it cannot be read and the model is not to read and write text."""
    try:
        return read()
    except ValueError as error:
        if text:
            raise
        print(f"without a tokenizer: {error}", file=sys.stderr, flush=True)
        return None


def check_rows(folder: Path, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise a ValueError where a tokenizer has tokens of text for which a model has no rows."""
    # Gemma 3 has an added token for pictures that the text model has no row for.
    tokens = tokenizer.backend.get_vocab_size(with_added_tokens=False)
    tokens = max(tokens, *(1 + i for i in (*tokenizer.stop_ids, tokenizer.bos_id, tokenizer.pad_id) if i is not None))
    if tokens > vocab_size:
        raise ValueError(
            f"{folder} has {quoted(tokens)} tokens in tokenizer.json and vocab_size {vocab_size} in "
            "config.json: they do not belong together"
        )


def differences(one: Tokenizer, other: Tokenizer) -> list[str]:
    """Say in what one tokenizer differs from another, in words for a person; nothing where they do the same.

    >>> from rslora_jax.interop.tokenizer import EXAMPLE, tokenizer_from_metadata
    >>> one = tokenizer_from_metadata(EXAMPLE)
    >>> differences(dataclasses.replace(one, eos_id=1, chat_template=None), one)
    ['the chat template (none here)', "the eos token ('h' for '<end>')"]
    """
    found = []
    if one.chat_template != other.chat_template:
        absent = " (none here)" if one.chat_template is None else " (none there)" if other.chat_template is None else ""
        found.append(f"the chat template{absent}")
    for name in ("eos", "bos", "pad"):
        mine, theirs = (_token(tokenizer, getattr(tokenizer, f"{name}_id")) for tokenizer in (one, other))
        if mine != theirs:
            found.append(f"the {name} token ({mine} for {theirs})")
    if one.add_bos != other.add_bos:
        found.append("whether bos is put in front of a text")
    mine, theirs = one.backend.get_vocab(), other.backend.get_vocab()
    if mine != theirs:
        found.append(f"its tokens ({len(mine.items() - theirs.items())} that are not there or of other ids)")
    elif one.backend.to_str() != other.backend.to_str():
        found.append("how it cuts text")
    return found


def same_tokenizer(one: Path | None, other: Path | None) -> bool:
    """Say whether two folders of `tokenizer_beside` hold the same tokenizer; None is that of the base."""
    if one is None or other is None:
        return one is other
    if same_files(one, other) or not (is_whole(one) and is_whole(other)):
        return same_files(one, other)
    return not differences(read_tokenizer(one, eos_id=0), read_tokenizer(other, eos_id=0))


def _token(tokenizer: Tokenizer, token_id: int | None) -> str:
    return "none" if token_id is None else repr(tokenizer.backend.id_to_token(token_id))
