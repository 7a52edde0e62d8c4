"""The vocabularies of GGUF files against tokenizers in plain Python, by the rules of llama.cpp."""

from __future__ import annotations

import itertools
import json
import random
import re
import unicodedata

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from rslora_jax.interop.tokenizer import tokenizer_from_metadata

regex = pytest.importorskip("regex")  # comes with transformers
pytestmark = pytest.mark.by_day_on("newest")

SAMPLE = """def f(x: int = 0) -> int:\n    if x > 10:\n\t\treturn x ** 2\r\n\n\n    return f(x + 1)  # again
It's what they'd say; WE'LL see, I'M sure you've heard. In 1969, 3.14159 and 1,000,000 were numbers; ½, ², Ⅷ and ٣.
naïve café, Ångström, e\u0301 and \u00e9, straße, İstanbul. 日本語のテキスト、简体中文、한국어, ไทย, हिन्दी
Русский, Ελληνικά, עברית, العربية 🎉🎉 {"name": "Zoë", "tags": ["a\\nb", null], "n": -1.5e-7} HTTPServer\n"""
WHOLE = "Zqx"  # a token that no pairs make
PIECES = [
    WHOLE,
    "'s",
    "'LL",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "1",
    "12",
    "1234567",
    "a",
    "A",
    "Ab",
    "é",
    "e\u0301",
    "漢",
    "🎉",
    ".",
    "./\n",
]


def texts(count):
    rng = random.Random(0)
    for n in range(count):
        start = rng.randrange(len(SAMPLE))
        part = SAMPLE[start : start + rng.randrange(60)]
        yield part if n % 2 else "".join(rng.choices([*PIECES, part[:5]], k=rng.randrange(1, 20)))


# The rules as llama.cpp has them, in which letters of contractions are spelled out, and the ids of bytes.
CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + REST
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RULES = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "starcoder": [r"\p{N}", GPT2],
    "llama-bpe": [LLAMA3],
    "llama3": [LLAMA3],
    "llama-v3": [LLAMA3],
    "smaug-bpe": [LLAMA3],
    "qwen2": [QWEN2],
    "deepseek-r1-qwen": [QWEN2],
    "tekken": [TEKKEN],
}
TAKES_WHOLE = BEGINS = {"llama-bpe", "llama3", "llama-v3", "tekken"}


def cut(text, rules):
    """Cut by one rule after the other, what lies between two matches being a piece too."""
    pieces = [text]
    for rule in rules:
        pieces = [part for piece in pieces for part in regex.split(f"({rule})", piece) if part]
    return pieces


def byte_letters():
    """The letter that GPT-2 writes for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}


LETTERS = byte_letters()


def merged(parts, rank):
    """Merge the best pair, the leftmost of equals, until there is none."""
    while True:
        ranks = [(rank(a, b), n) for n, (a, b) in enumerate(itertools.pairwise(parts))]
        best = min((one for one in ranks if one[0] is not None), default=None)
        if best is None:
            return parts
        at = best[1]
        parts = [*parts[:at], parts[at] + parts[at + 1], *parts[at + 2 :]]


@pytest.fixture(scope="module")
def pairs():
    """Train pairs on the sample, across words too, so that every cut is felt."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=list(LETTERS.values()), show_progress=False)
    backend.train_from_iterator([SAMPLE, *(text.replace(WHOLE, "") for text in texts(300))], trainer)
    found = re.findall(r'"merges":(\[.*\])', backend.to_str())[0]
    tokens = sorted(backend.get_vocab(), key=backend.get_vocab().get)
    return tokens, [tuple(pair) for pair in json.loads(found)]


def byte_level(pairs, pre, **changes):
    tokens, merges = pairs
    # Only a rule that takes pieces whole finds the last.
    whole = [*tokens, "<s>", "</s>", "<|tool|>", WHOLE]
    size = len(tokens)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": whole,
        "tokenizer.ggml.token_type": [1] * size + [3, 3, 4, 1],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": size,
        "tokenizer.ggml.eos_token_id": size + 1,
        **{f"tokenizer.ggml.{name}": value for name, value in changes.items()},
    }


@pytest.mark.parametrize("pre", RULES)
def test_pairs_of_bytes_are_merged_by_the_rule_that_the_file_names(pre, pairs):
    metadata = byte_level(pairs, pre)
    tokenizer = tokenizer_from_metadata(metadata)
    vocabulary = {token: n for n, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    ranks = {pair: n for n, pair in enumerate(pairs[1])}
    assert tokenizer.add_bos is (pre in BEGINS)
    for text in texts(400):
        # Qwen's own tokenizer composes characters first; llama.cpp leaves that out.
        text = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
        want = [tokenizer.bos_id] if pre in BEGINS else []
        for piece in cut(text, RULES[pre]):
            letters = [LETTERS[byte] for byte in piece.encode()]
            if pre in TAKES_WHOLE and "".join(letters) in vocabulary:
                want.append(vocabulary["".join(letters)])
            else:
                want += [vocabulary[part] for part in merged(letters, lambda a, b: ranks.get((a, b)))]
        assert tokenizer.encode(text) == want, text
        assert tokenizer.decode(want, skip_special=True) == text


def test_qwen_composes_characters_first(pairs):
    tokenizer = tokenizer_from_metadata(byte_level(pairs, "qwen2"))
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")


WORDS = [
    "the",
    "then",
    "he",
    "hello",
    "low",
    "lower",
    "a",
    "aa",
    "aaa",
    "na",
    "nan",
    "é",
    "漢字",
    "1",
    "12",
    ".",
    "...",
]
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece(seed=0, **changes):
    """Draw a vocabulary: every piece of some words, in any order of scores."""
    rng = random.Random(seed)
    pieces = {"▁" * n for n in (1, 2, 4)}
    for word in [*WORDS, *("▁" + word for word in WORDS)]:
        pieces |= {word[a:b] for a in range(len(word)) for b in range(a + 1, len(word) + 1)}
    pieces = sorted(pieces)
    rng.shuffle(pieces)
    tokens = [*SPECIAL, *BYTES, *pieces, "<tool>", "<|x|>"]
    # A piece's score is its place, as SentencePiece writes it; single characters come after all pairs.
    scores = [-1e4 if len(piece) == 1 else -float(n) for n, piece in enumerate(pieces)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + scores + [0.0, 0.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces) + [3, 4],
        **{f"tokenizer.ggml.{name}": value for name, value in changes.items()},
    }


def by_score(metadata, text, prefix):
    """Do as llama.cpp: special tokens first, a space in front of what follows one, the best pair first, then bytes."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    ids = {token: n for n, token in enumerate(tokens)}
    scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True))
    added = sorted((t for t, of in zip(tokens, types, strict=True) if of in (2, 3, 4)), key=len, reverse=True)
    normal = {token for token, of in zip(tokens, types, strict=True) if of == 1}

    def rank(a, b):
        # Of two ways to make one token transformers takes that of the longer left half, llama.cpp that on the left.
        return (-scores[a + b], -len(a)) if a + b in normal else None

    found = []
    for part in re.split("(" + "|".join(map(re.escape, added)) + ")", text):
        if part in added:
            found.append(ids[part])
        elif part:
            letters = list((" " + part if prefix else part).replace(" ", "▁"))
            for piece in merged(letters, rank):
                found += [ids[piece]] if piece in normal else [ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return found


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pairs_of_characters_are_merged_by_score(seed, prefix):
    metadata = sentencepiece(seed, add_space_prefix=prefix)
    tokenizer = tokenizer_from_metadata(metadata)
    rng = random.Random(seed)
    parts = [*WORDS, " ", "  ", "\n", "🎉", "字漢", "xyz", "<tool>", "<|x|>", "</s>", "<0x41>", "▁"]
    for _ in range(400):
        text = "".join(rng.choices(parts, k=rng.randrange(0, 12)))
        want = by_score(metadata, text, prefix)
        assert tokenizer.encode(text) == [1, *want], text
        if "<" not in text and "▁" not in text:
            assert tokenizer.decode([1, *want], skip_special=True) == text


def test_what_a_sentencepiece_file_says_beside_its_pieces():
    plain = tokenizer_from_metadata(sentencepiece())
    assert (plain.bos_id, plain.eos_id, plain.pad_id, plain.add_bos, plain.ends) == (1, 2, 2, True, (2,))
    assert plain.special == {"unk_token": "<unk>"} and plain.chat_template is None
    tool = plain.vocab_size - 2
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}<tool>{% endfor %}{{ eos_token }}{{ pad_token }}"
    says = dict(bos_token_id=2, eos_token_id=tool, eot_token_id=tool + 1, eom_token_id=1, padding_token_id=0)
    told = tokenizer_from_metadata(sentencepiece(add_bos_token=False, **says) | {"tokenizer.chat_template": template})
    assert (told.bos_id, told.eos_id, told.pad_id, told.add_bos) == (2, tool, 0, False)
    assert told.ends == (tool, tool + 1, 1) and told.stop_ids == told.ends
    assert told.chat([{"role": "user", "content": "he"}]) == "</s>he<tool><tool><unk>"
    turns = tokenizer_from_metadata(sentencepiece() | {"tokenizer.chat_template": template.partition("{{ eos")[0]})
    assert turns.stop_ids == (2, tool)  # what the template ends a turn with


def test_padding_beyond_the_vocabulary_is_left_out():
    assert tokenizer_from_metadata(sentencepiece(padding_token_id=10**6)).pad_id == 2


WRONG = {
    "kind": (dict(model="t5"), "kind 't5', but only byte-level 'gpt2' and SentencePiece's 'llama' are read"),
    "end behind": (dict(add_eos_token=True), "the tokenizer has add_eos_token: that is not done here"),
    "spaces": (dict(remove_extra_whitespaces=True), "remove_extra_whitespaces"),
    "no scores": (dict(scores=None), "scores are not one for each of its"),
    "few scores": (dict(scores=[1.0]), "scores are not one for each of its"),
    "one score": (dict(scores=[-1000.0] * len(sentencepiece()["tokenizer.ggml.tokens"])), "one score, so that which"),
    "types": (dict(token_type=["1"]), "token_type are not one for each of its"),
    "end": (dict(eos_token_id=10**6), "the eos token is not among the"),
    "turn": (dict(eot_token_id=-1), "the eot token is not among the"),
    "beginning": (dict(bos_token_id="1"), "the bos token is not among the"),
    "no tokens": (dict(tokens=[]), "lacks tokenizer.ggml.tokens"),
    "numbers": (dict(tokens=[1, 2]), "lacks tokenizer.ggml.tokens"),
    "twice": (dict(tokens=["a", "b", "b"]), "the token 'b' twice"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_vocabulary_that_would_give_other_ids_is_refused(case):
    changes, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        tokenizer_from_metadata(sentencepiece(**changes))


@pytest.mark.parametrize("pre", ["qwen35", "default", "", "LLAMA3", None, 3, ["gpt-2"]])
def test_a_rule_that_is_not_known_is_refused_by_its_name(pre, pairs):
    with pytest.raises(ValueError, match=re.escape(f"cuts text by the rule {pre!r}, but only gpt-2, smollm,")):
        tokenizer_from_metadata(byte_level(pairs, pre))
