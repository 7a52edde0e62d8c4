"""Tokens kept on disk, in a file named by all that they depend on."""

from __future__ import annotations

import hashlib
import json
import pickle
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rslora_jax.shown import reason_of
from rslora_jax.train.encode import Tokenizer, Tokens
from rslora_jax.train.examples import Example, as_plain

# To be raised with every change to encode.py and turns.py that gives other tokens.
_FORMAT = 2
_PROBES, _PROBE_LENGTH = 16, 200


def file_for(folder: str | Path, tokenizer: Tokenizer, examples: Sequence[Example]) -> Path:
    """Name the file in `folder` for the tokens of these examples by this tokenizer; make the folder.

    Hashed are the examples, the tokenizer's pickle (all it holds), its chat template and special ids, and what
    it makes of the beginnings of a few examples: that tells where its code has changed.

    Raises:
      ValueError: the folder cannot be made, or the tokenizer not be pickled.

    >>> from rslora_jax.train.bytelevel import ByteTokenizer
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> one, two = [Example("", "a")], [Example("", "b")]
    >>> file_for(folder, ByteTokenizer(), one) == file_for(folder, ByteTokenizer(), two)
    False
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot hold the cache ({(error.strerror or '').lower()}); name a folder") from error
    try:
        content = pickle.dumps(tokenizer, protocol=4)
    except Exception as error:  # each kind of object refuses in its own way
        raise ValueError(f"the tokenizer cannot be pickled, so it has no name for the cache: {error}") from error
    probed = examples[:: -(-len(examples) // _PROBES)]
    about = {
        "format": _FORMAT,
        "special": [tokenizer.eos_id, tokenizer.pad_id, list(tokenizer.stop_ids), tokenizer.chat_template],
        "probes": [tokenizer.encode(example.completion[:_PROBE_LENGTH]) for example in probed],
    }
    digest = hashlib.sha256(content)
    digest.update(json.dumps(about).encode())
    for example in examples:
        digest.update(json.dumps(as_plain(example)).encode())
    return Path(folder) / f"tokens-{digest.hexdigest()[:32]}.npz"


def load(path: Path, examples: int) -> Tokens | None:
    """Read the tokens of so many examples, or None where there is no file, or with a warning a damaged one."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            tokens = Tokens(*(file[name] for name in Tokens._fields))
        for name, kind in zip(Tokens._fields, "ibii", strict=True):
            if (array := getattr(tokens, name)).ndim != 1 or array.dtype.kind != kind or (array < 0).any():
                raise ValueError(f"{name} is no list of numbers")
        sizes = (len(tokens.ids_N), len(tokens.is_learnt_N), len(tokens.lengths_S), len(tokens.sequences_E))
        if sizes != (tokens.lengths_S.sum(), sizes[0], tokens.sequences_E.sum(), examples):
            raise ValueError("arrays that do not belong together")
    except Exception as error:  # a damaged zip file raises almost anything
        warnings.warn(f"{path} is damaged ({reason_of(error)}); the data are tokenised anew", stacklevel=2)
        return None
    return tokens


def save(path: Path, tokens: Tokens) -> None:
    """Write tokens so that other processes see the whole file or none; only warn where that fails."""
    part = path.with_suffix(f".{uuid.uuid4().hex}.part")
    try:
        with part.open("xb") as file:
            np.savez(file, **tokens._asdict())
        part.replace(path)
    except OSError as error:  # a full disk must not cost the tokens already made
        warnings.warn(f"{path} cannot be written ({error}); the next run tokenises again", stacklevel=2)
    finally:
        part.unlink(missing_ok=True)
