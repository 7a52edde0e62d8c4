"""New tokens: a model with more rows than its file has, and a tokenizer that knows them."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from rslora_jax.config import LoraConfig, literal, matches
from rslora_jax.interop.json_files import json_text, read_json
from rslora_jax.interop.kept_tokenizer import copy_tokenizer, is_whole
from rslora_jax.interop.model import Model
from rslora_jax.interop.tokenizer import Tokenizer
from rslora_jax.interop.tokenizer_files import tokenizer_files
from rslora_jax.pytrees import Params
from rslora_jax.shown import quoted
from rslora_jax.sites import from_paths, named_leaves
from rslora_jax.stored import dense, is_stored


def _with_rows(model: Model, rows: int) -> Model:
    """Return a model with at least so many rows in its token table, and in its head; new ones are the mean of the old.

    What was stored in a form of its own is an array then, which is said.

    Raises:
      ValueError: nothing is known of where models of this family have their tokens.
    """
    if rows <= model.config.vocab_size:
        return model
    leaves = named_leaves(model.variables)
    for path, axis in _vocabulary(model).items():
        table = _as_array(path, leaves[path])
        shape = [rows - n if at == axis else n for at, n in enumerate(table.shape)]
        new = jnp.broadcast_to(jnp.expand_dims(_mean_row(table, axis), axis), shape).astype(table.dtype)
        leaves[path] = jnp.concatenate([table, new], axis)
    return dataclasses.replace(
        model,
        config=dataclasses.replace(model.config, vocab_size=rows),
        variables=from_paths(model.variables, leaves),
        changed={**model.changed, "vocab_size": rows},
        rows=model.rows or model.config.vocab_size,
    )


def _as_array(path: str, table: Any) -> Array:
    """Return a table as an array, to which rows can be added."""
    if is_stored(table):
        warnings.warn(
            f"{path} gets rows for new tokens, for which there is no place in {table.format}: it is held as an array, "
            f"in {table.size * jnp.dtype(table.dtype).itemsize / 1e6:,.0f} MB",
            stacklevel=3,
        )
    return dense(table)


def _mean_row(table: Any, axis: int) -> Array:
    """Return the mean of a table's rows, which lie along an axis, in float32 at least."""
    return jnp.mean(dense(table), axis, dtype=jnp.promote_types(table.dtype, jnp.float32))


def of_file(model: Model) -> Params:
    """Return a model's variables without the rows that its file does not have: the same numbers, to the bit."""
    if model.rows is None:
        return model.variables
    leaves = named_leaves(model.variables)
    for path, axis in _vocabulary(model).items():
        leaves[path] = jax.lax.slice_in_dim(leaves[path], 0, model.rows, axis=axis)
    return from_paths(model.variables, leaves)


def with_rows_of(model: Model, config: LoraConfig | None, more: int = 0) -> Model:
    """Return a model with the rows that adapters of a config train, and with at least `more`."""
    named: Any = () if config is None else config.trained_rows
    paths = _vocabulary(model) if named else {}
    ids = [n for pattern, ids in named if any(matches(path, pattern) for path in paths) for n in ids]
    return _with_rows(model, max([more, *(n + 1 for n in ids)]))


def with_tokens(model: Model, texts: Sequence[str]) -> tuple[Model, dict[str, tuple[int, ...]]]:
    """Return a model and a tokenizer with new tokens, and `LoraConfig.trained_rows` for them.

    Args:
      model: the base, with its tokenizer.
      texts: the tokens as they stand in a text; they are found there before it is split.

    Raises:
      ValueError: one is a token already, empty or there twice; or the tokenizer would write it as another text.
    """
    tokenizer = model.tokenizer
    for n, text in enumerate(texts):
        if not text.strip() or text in texts[:n]:
            raise ValueError(f"the new tokens {quoted(list(texts))} have one that is empty or there twice")
        if (known := _known(tokenizer.backend, text)) is not None:
            raise ValueError(f"{quoted(text)} is a token of this model already, {known}: leave it out of the new ones")
    backend = Backend.from_str(tokenizer.backend.to_str())
    backend.add_tokens([AddedToken(text, normalized=False) for text in texts])
    ids = tuple(backend.token_to_id(text) for text in texts)
    for text, number in zip(texts, ids, strict=True):
        if (written := backend.decode([number])).strip() != text.strip():
            raise ValueError(
                f"the new token {quoted(text)} would be written as {quoted(written)}, since this tokenizer spells "
                "bytes in such letters: take a token of ASCII characters"
            )
    own = dataclasses.replace(tokenizer, backend=backend, vocab_size=backend.get_vocab_size())
    found = dataclasses.replace(_with_rows(model, max(ids) + 1), tokenizer=own)
    return found, {literal(path): ids for path in _vocabulary(found)}


def _known(backend: Backend, text: str) -> int | None:
    """Return the id of a text that is one token, as it stands in the vocabulary or as the tokenizer spells it there."""
    ids = backend.encode(text, add_special_tokens=False).ids
    spelt = ids[0] if len(ids) == 1 and backend.decode(ids, skip_special_tokens=False) == text else None
    found = backend.token_to_id(text)
    return spelt if found is None else found


def first_rows(model: Model, rows: Mapping[str, Sequence[int]], adapters: Any) -> Any:
    """Return fresh adapters whose rows, those of new tokens, start at the mean of the table's.

    Of rows that the file has already, but no token so far, the numbers say nothing.
    """
    leaves, axes = named_leaves(of_file(model)), _vocabulary(model)
    started = {
        path: {"rows": jnp.zeros_like(adapters[path]["rows"]) + _mean_row(leaves[path], axes[path])}
        for path in axes
        if path in rows
    }
    return {**adapters, **started}


def write_tokenizer(tokenizer: Tokenizer, base: Path | None, max_len: int, out: Path) -> None:
    """Write a tokenizer with new tokens: the base's own files, with these in its tokenizer.json, where it has one."""
    out.mkdir(parents=True, exist_ok=True)
    if base is None or not is_whole(base):
        for name, text in tokenizer_files(tokenizer, max_len).items():
            (out / name).write_text(text, encoding="utf-8")
        return
    copy_tokenizer(base, out)
    about = read_json(base / "tokenizer.json")
    known = {token["content"] for token in about.get("added_tokens") or []}
    added = json.loads(tokenizer.backend.to_str())["added_tokens"]
    about["added_tokens"] = [*(about.get("added_tokens") or []), *(t for t in added if t["content"] not in known)]
    (out / "tokenizer.json").write_text(json_text(about), encoding="utf-8")


def _vocabulary(model: Model) -> Mapping[str, int]:
    """Return the paths of what has a row for each token, and along which axis."""
    if model.family.vocabulary is None:
        raise ValueError("nothing is known of where models of this family have their tokens: it has no `vocabulary`")
    return model.family.vocabulary(model.config)
