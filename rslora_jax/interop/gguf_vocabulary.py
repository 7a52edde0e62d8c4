"""The vocabulary of a GGUF file, `tokenizer.ggml.*`, as a tokenizer of Hugging Face's library.

Two kinds are read: pairs of bytes merged in a given order ("gpt2"), whose text is cut beforehand by a rule that the
file names, and SentencePiece's pairs of characters merged by the score of what they make ("llama"). What names stand
for is in llama.cpp's src/llama-vocab.cpp; the rules are those of the models' own tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from rslora_jax.shown import quoted, reason_of

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_NORMAL = 1
_LONGEST_TOKEN = 512  # characters: each is cut at every place
# What llama.cpp takes where a SentencePiece file says nothing; of pairs of bytes the end must be named.
_DEFAULT_IDS = {"bos": 1, "eos": 2, "unknown": 0}
# What is not done here, and would give other ids.
_REFUSED = ("add_eos_token", "add_sep_token", "remove_extra_whitespaces", "precompiled_charsmap")


class _Cut(NamedTuple):
    """How text is cut before pairs of bytes are merged.

    `whole` says that a piece that is itself a token is taken as it is; `bos` that a text begins with the token that
    begins one, where the file does not say.
    """

    pre_tokenizer: Any
    normalizer: Any = None
    whole: bool = False
    bos: bool = False


def _by_regex(pattern: str) -> Any:
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# The cut of digits comes first and decides where runs of white space end, so "\n\n1" keeps its two newlines together.
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2])
_ENDS = r"'s|'t|'re|'ve|'m|'ll|'d"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"(?i:{_ENDS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_AS_LLAMA3 = _Cut(_by_regex(_LLAMA3), whole=True, bos=True)
_CUTS = {
    "gpt-2": _Cut(_GPT2),
    "smollm": _Cut(_DIGITS),
    "starcoder": _Cut(_DIGITS),
    "llama-bpe": _AS_LLAMA3,
    "llama3": _AS_LLAMA3,
    "llama-v3": _AS_LLAMA3,
    "smaug-bpe": _Cut(_by_regex(_LLAMA3)),
    "qwen2": _Cut(_by_regex(_QWEN2), normalizers.NFC()),
    "deepseek-r1-qwen": _Cut(_by_regex(_QWEN2)),
    "tekken": _Cut(_by_regex(_TEKKEN), whole=True, bos=True),
}


class Vocabulary(NamedTuple):
    """A vocabulary: `ids` has its special tokens by what the file calls them, those that are there."""

    backend: Backend
    ids: dict[str, int]
    add_bos: bool


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """Read the `tokenizer.ggml.*` entries of a GGUF file (a mapping of name to plain value).

    A token for padding that is not among the tokens is left out: nothing ever looks it up.

    Raises:
      ValueError: the vocabulary is of another kind, cuts text in a way not known here (a wrong cut would give wrong ids
        without a word), or entries are missing or do not fit together.
    """
    get = {name.removeprefix("tokenizer.ggml."): value for name, value in metadata.items()}.get
    kind = get("model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(
            f"the tokenizer is of kind {quoted(kind, 40)}, but only byte-level 'gpt2' and SentencePiece's 'llama' "
            "are read: convert it or load the text as token ids"
        )
    for name in _REFUSED:
        if get(name):
            raise ValueError(f"the tokenizer has {name}: that is not done here, so its ids would be others")
    tokens = _tokens(get("tokens"))
    ids = _ids(get, len(tokens), _DEFAULT_IDS if kind == "llama" else {})
    if "eos" not in ids:
        raise ValueError("the tokenizer lacks tokenizer.ggml.eos_token_id: take a file converted whole")
    types = _numbers(get("token_type"), "token_type", len(tokens))
    if kind == "gpt2":
        backend, bos = _byte_level(tokens, get("merges"), get("pre"))
    else:
        scores = _numbers(get("scores"), "scores", len(tokens))
        backend, bos = _sentencepiece(tokens, scores, types, ids.get("unknown"), get("add_space_prefix", True)), True
    backend.add_special_tokens(_added(tokens, types, (_CONTROL, _UNKNOWN), special=True))
    backend.add_tokens(_added(tokens, types, (_USER_DEFINED,), special=False))
    return Vocabulary(backend, ids, bool(get("add_bos_token", bos)))


def _tokens(found: Any) -> list[str]:
    if not isinstance(found, list) or not found or not all(isinstance(token, str) for token in found):
        raise ValueError("the tokenizer lacks tokenizer.ggml.tokens: take a file converted whole")
    if len(set(found)) != len(found):
        seen = set[str]()
        twice = next(token for token in found if token in seen or seen.add(token))  # type: ignore[func-returns-value]
        raise ValueError(f"the tokenizer has the token {quoted(twice, 40)} twice: take a file converted whole")
    return found


def _ids(get: Any, count: int, defaults: Mapping[str, int]) -> dict[str, int]:
    found = {}
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        number = get(f"{name}_token_id", defaults.get(name))
        if number is None or (name == "padding" and isinstance(number, int) and number >= count):
            continue
        if type(number) is not int or not 0 <= number < count:
            raise ValueError(f"the {name} token is not among the {count}: take a file converted whole")
        found[name] = number
    return found


def _numbers(found: Any, name: str, count: int) -> list[Any]:
    if found is None and name == "token_type":
        return [_NORMAL] * count
    if not isinstance(found, list) or len(found) != count or {type(one) for one in found} - {int, float}:
        raise ValueError(
            f"the tokenizer's {name} are not one for each of its {count} tokens: take a file converted whole"
        )
    return found


def _byte_level(tokens: Sequence[str], merges: Any, pre: Any) -> tuple[Backend, bool]:
    if not isinstance(pre, str) or pre not in _CUTS:
        raise ValueError(
            f"the tokenizer cuts text by the rule {quoted(pre, 40)}, but only {', '.join(_CUTS)} are known"
        )
    if not isinstance(merges, list) or not all(isinstance(pair, str) for pair in merges):
        raise ValueError("the tokenizer lacks tokenizer.ggml.merges: take a file converted whole")
    cut, vocabulary = _CUTS[pre], {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(pair.split(" ", 1)) for pair in merges]
    backend = _backend(vocabulary, pairs, ignore_merges=cut.whole)
    if cut.normalizer is not None:
        backend.normalizer = cut.normalizer
    backend.pre_tokenizer = cut.pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    return backend, cut.bos


def _sentencepiece(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], unknown: int | None, prefix: Any
) -> Backend:
    """Build a tokenizer that merges the pair whose token has the highest score; characters unknown become bytes."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    unk = None if unknown is None else tokens[unknown]
    pairs = _pairs(tokens, scores, types)
    backend = _backend(vocabulary, pairs, unk_token=unk, fuse_unk=True, byte_fallback=True)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _pairs(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """Give the pairs of tokens that make a token, best first; of one token's those with the longest left half first."""
    if (longest := max(map(len, tokens))) > _LONGEST_TOKEN:
        raise ValueError(f"the tokenizer has a token of {longest} characters: take a file converted whole")
    scored = {token: score for token, score, of in zip(tokens, scores, types, strict=True) if of == _NORMAL}
    found = [
        (score, at, token)
        for token, score in scored.items()
        for at in range(1, len(token))
        if token[:at] in scored and token[at:] in scored
    ]
    if len({token for _, _, token in found}) > 1 and len({score for score, _, _ in found}) == 1:
        raise ValueError(
            "the tokenizer gives all its tokens one score, so that which are merged first is not said: convert the "
            "model again, from a folder with its tokenizer.model"
        )
    # As transformers does; a tokenizer.json has no way to say that of one score the pair on the left goes first.
    found.sort(key=lambda pair: (-pair[0], -pair[1], -len(pair[2])))
    return [(token[:at], token[at:]) for _, at, token in found]


def _backend(vocabulary: dict[str, int], pairs: list[Any], **options: Any) -> Backend:
    try:
        return Backend(models.BPE(vocab=vocabulary, merges=pairs, **options))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"the tokenizer's merges do not fit its tokens: take a file converted whole ({reason_of(error)})"
        ) from error


def _added(tokens: Sequence[str], types: Sequence[int], kinds: tuple[int, ...], *, special: bool) -> list[AddedToken]:
    return [
        AddedToken(token, normalized=False, special=special)
        for token, found in zip(tokens, types, strict=True)
        if found in kinds
    ]
