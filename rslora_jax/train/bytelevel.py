"""A tokenizer of bytes, which needs no vocabulary file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class ByteTokenizer:
    """Take each UTF-8 byte as a token; for models trained from scratch, and for trying things out.

    Token 256 ends a sequence and token 257 pads. There is no chat template.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("Hé"), tokenizer.decode([72, 195, 169, 256])
    ([72, 195, 169], 'Hé')
    """

    vocab_size = 258
    eos_id = 256
    stop_ids = (256,)
    pad_id = 257
    bos_id: int | None = None
    chat_template: str | None = None

    def encode(self, text: str) -> list[int]:
        """Give the bytes of a text, each in 0..255."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Give the text of tokens; the special ones have none, and broken UTF-8 becomes U+FFFD."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, tools: Any = None
    ) -> str:
        """Raise ValueError, for want of a chat template."""
        raise ValueError("bytes have no chat template; use a model that has one, or {prompt, completion} lines")
