"""The tokenizer of a Hugging Face model's folder: read and written."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Backend

from rslora_jax.interop.json_files import json_text, read_json
from rslora_jax.interop.tokenizer import Tokenizer
from rslora_jax.shown import quoted, reason_of, shown

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MOST_TOKENS, _MOST_ADDED = 1 << 31, 100_000
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
# These classes of transformers 4 have tokens by default, and put `bos_token` in front as `add_bos_token` says; the
# others do as tokenizer.json says. Version 5, whose files have a field `backend`, goes by tokenizer.json for every
# class, unless `add_bos_token` or `add_eos_token` is said.
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
_GEMMA = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>", "add_bos_token": True}
_OF_CLASS = {"LlamaTokenizer": _LLAMA, "GemmaTokenizer": _GEMMA}


def read_tokenizer(folder: str | Path, *, eos_id: int | None = None) -> Tokenizer:
    """Read `tokenizer.json`, with what `tokenizer_config.json` and `chat_template.jinja` say beside it.

    Args:
      folder: a model's folder.
      eos_id: the token that ends a text, where the tokenizer's files name none.

    Raises:
      ValueError: a file is missing or damaged, no token ends a text, or one would be put behind every text.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no tokenizer.json: save it with transformers' "
            f'AutoTokenizer.from_pretrained("{folder}").save_pretrained("{folder}")'
        )
    about = _about(folder)
    named = _named(folder, about)
    with _refusing(path):
        backend = Backend.from_file(str(path))
        backend.no_truncation()
        backend.no_padding()
        _add(folder, backend, about, [*named.values(), *_extra(folder, about)])
    ids = {name: backend.token_to_id(token) for name, token in named.items()}
    eos_id, bos_id, size = ids.get("eos_token", eos_id), ids.get("bos_token"), backend.get_vocab_size()
    if eos_id is None:
        raise ValueError(f"{folder} names no token that ends a text: write eos_token into its tokenizer_config.json")
    if eos_id >= _MOST_TOKENS or backend.id_to_token(eos_id) is None:
        raise ValueError(
            f"{folder}: eos_token_id is {quoted(eos_id)}, which is not among the {size} tokens of tokenizer.json"
        )
    with _refusing(path):
        add_bos = _adds_bos(folder, backend, about, bos_id)
    return Tokenizer(
        backend=backend,
        eos_id=eos_id,
        bos_id=bos_id,
        pad_id=ids.get("pad_token", eos_id),
        vocab_size=size,
        add_bos=add_bos,
        chat_template=_chat_template(folder, about),
        special=named,
        source=str(folder),
    )


def with_words_of(folder: Path, tokenizer: Tokenizer) -> Tokenizer:
    """Return a tokenizer with the chat template and the end that a folder without a tokenizer.json says.

    Raises:
      ValueError: a file is damaged, or the end is no token of this tokenizer.
    """
    about = _about(folder)
    eos = _named(folder, about).get("eos_token")
    eos_id = tokenizer.eos_id if eos is None else tokenizer.backend.token_to_id(eos)
    if eos_id is None:
        raise ValueError(
            f"{folder} ends a text with {quoted(eos)}, which is no token of the base: put its tokenizer.json there"
        )
    ends = tuple(dict.fromkeys((*tokenizer.ends, tokenizer.eos_id)))
    own = _chat_template(folder, about)
    words: dict[str, Any] = {} if own is None else {"chat_template": own, "source": str(folder)}
    return dataclasses.replace(tokenizer, eos_id=eos_id, ends=ends, **words)


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Say of which file it was that the library could not read or use its content."""
    try:
        yield
    except ValueError as error:
        if str(path.parent) in str(error):
            raise
        raise ValueError(f"{path} cannot be read as a tokenizer ({reason_of(error)}): download it again") from error
    except BaseException as error:  # it raises nothing narrower; what its own code did not expect is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{path} cannot be read as a tokenizer ({reason_of(error)}): download it again") from error


def tokenizer_files(tokenizer: Tokenizer, max_len: int) -> dict[str, str]:
    """Give the text of the files that `read_tokenizer`, and transformers, read a tokenizer from, by name."""
    return {
        "tokenizer.json": _tokenizer_json(tokenizer),
        "tokenizer_config.json": json_text(_tokenizer_config(tokenizer, max_len)),
    }


def _about(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            found |= {key: value for key, value in read_json(folder / name).items() if value is not None}
    return found if "backend" in found else _of_class(found) | found


def _of_class(about: Mapping[str, Any]) -> dict[str, Any]:
    kind = about.get("tokenizer_class")
    return _OF_CLASS.get(kind.removesuffix("Fast"), {}) if isinstance(kind, str) else {}


def _named(folder: Path, about: Mapping[str, Any]) -> dict[str, str]:
    """Give the tokens that have a name, by which templates call them: those of every model, and of this one alone."""
    own = about.get("extra_special_tokens")
    more = (name for name, value in about.items() if name.endswith("_token") and not isinstance(value, bool))
    names = [*_NAMED, *(more if "backend" in about else ())]
    found = {name: about.get(name) for name in names} | (own if isinstance(own, dict) else {})
    return {name: text for name, token in found.items() if (text := _text(folder, name, token)) is not None}


def _extra(folder: Path, about: Mapping[str, Any]) -> list[str]:
    """Give the special tokens without a name, by version 4's word for them and by version 5's."""
    found = [about.get(name) for name in ("additional_special_tokens", "extra_special_tokens")]
    tokens = [token for several in found if isinstance(several, list) for token in several]
    return [text for token in tokens if (text := _text(folder, "a special token", token)) is not None]


def _text(folder: Path, name: str, token: Any) -> str | None:
    """Give the text of a token, which may be an object with its flags; None where there is none.

    Raises:
      ValueError: it has no text, or one that cannot be written.
    """
    if token is None:
        return None
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str) or text != text.encode(errors="replace").decode():
        raise ValueError(f"{folder / 'tokenizer_config.json'} has {shown(name)}={quoted(token)}, which is no token")
    return text


def _add(folder: Path, backend: Backend, about: Mapping[str, Any], named: Iterable[str]) -> None:
    """Add the tokens that only the config knows, as transformers does; their ids must come out as it says."""
    found = about.get("added_tokens_decoder")
    found = found if isinstance(found, dict) else {}
    wanted = {int(i): token for i, token in found.items() if re.fullmatch(r"[0-9]{1,9}", i) and isinstance(token, dict)}
    if len(wanted) > _MOST_ADDED:
        raise ValueError(
            f"{folder / 'tokenizer_config.json'} adds {len(wanted)} tokens: no more than {_MOST_ADDED} are"
        )
    known = backend.get_added_tokens_decoder()
    tokens = dict[int, AddedToken]()
    for token_id, about_token in sorted(wanted.items()):
        flags = {name: bool(about_token[name]) for name in _FLAGS if name in about_token}
        tokens[token_id] = AddedToken(_text(folder, f"added token {token_id}", about_token) or "", **flags)
    # All at once: with each call the library goes through all that it has.
    backend.add_tokens([token for token_id, token in tokens.items() if repr(known.get(token_id)) != repr(token)])
    for token_id, token in tokens.items():
        if backend.token_to_id(token.content) != token_id:
            raise ValueError(
                f"{folder}: token {quoted(token.content)} has another id in tokenizer_config.json than in "
                "tokenizer.json"
            )
    known_texts = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_special_tokens([AddedToken(text, special=True) for text in named if text not in known_texts])


def _adds_bos(folder: Path, backend: Backend, about: Mapping[str, Any], bos_id: int | None) -> bool:
    says = "add_bos_token" in about or "add_eos_token" in about
    if says and ("backend" in about or _of_class(about)):
        if about.get("add_eos_token", False):
            raise ValueError(f"{folder} puts eos_token behind every text (add_eos_token): that is not done here")
        return bool(about.get("add_bos_token", False))
    bare, whole = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    if whole not in (bare, [bos_id, *bare]):
        tokens = [backend.id_to_token(i) for i in whole]
        raise ValueError(f"{folder}: its tokenizer makes {quoted(tokens)} of 'a': only bos_token in front is done here")
    return whole != bare


def _chat_template(folder: Path, about: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read: {reason_of(error)}") from error
    found = about.get("chat_template")
    if isinstance(found, list):  # several, by name
        found = next(
            (one.get("template") for one in found if isinstance(one, dict) and one.get("name") == "default"), None
        )
    return found if isinstance(found, str) else None


def _tokenizer_json(tokenizer: Tokenizer) -> str:
    """Return the tokenizer as Hugging Face's `tokenizer.json`, which puts in front what `Tokenizer.encode` does."""
    backend = Backend.from_str(tokenizer.backend.to_str())
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        bos = backend.id_to_token(tokenizer.bos_id)
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, tokenizer.bos_id)]
        )
    return backend.to_str(pretty=True)


def _tokenizer_config(tokenizer: Tokenizer, max_len: int) -> dict[str, Any]:
    """Return the `tokenizer_config.json` to it."""
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    found = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokenizer.backend.id_to_token(number) for name, number in ids.items() if number is not None},
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_len,
        "model_input_names": ["input_ids", "attention_mask"],  # by default there is one that Llama refuses
    }
    return found if tokenizer.chat_template is None else found | {"chat_template": tokenizer.chat_template}
