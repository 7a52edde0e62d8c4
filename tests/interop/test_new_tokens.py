"""New tokens of any spelling: one id each, wherever they stand in a text, here and in transformers."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from rslora_jax.interop.enlarged import with_tokens, write_tokenizer
from rslora_jax.interop.huggingface import load_huggingface
from rslora_jax.interop.tokenizer_files import read_tokenizer
from tests.interop import folders

pytestmark = pytest.mark.by_day_on("newest")
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
ROWS = 400  # enough, so that no table grows


def of_words(folder):
    """A tokenizer as SentencePiece's, which writes a blank as a letter and puts one in front of a text."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *"▁hi12a", "hi", "▁hi"]
    model = models.BPE({token: n for n, token in enumerate(vocabulary)}, [("h", "i"), ("▁", "hi")], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in vocabulary[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))


def normalised(folder):
    """A tokenizer of bytes that puts accents together before, and has a token that only its config names."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(NAMED | {"additional_special_tokens": ["<x>"]}))


KINDS = {"bytes": lambda folder: None, "words": of_words, "normalised": normalised}
TOKENS = [
    *(
        "<tool>",
        "</tool>",
        "<too",
        "a b",
        " lead",
        "trail ",
        "e\u0301",
        "日本",
        "a,b",
        "hi hi",
        "12",
        "<s",
        "s>",
        "\na",
    ),
    *('x"y', "<|im|>", "1 2", "\u200b", "😀", "<unk>x", "İstanbul", "A" * 300),
]
PLAIN = ["hi", "hi 1", "12", " ", "é", "e\u0301", "a", "!", "ha ", "日", "<", "\n", "<s", "aa"]


@pytest.fixture(scope="module", params=KINDS)
def base(request, tmp_path_factory):
    folder = folders.write(tmp_path_factory.mktemp(request.param), {"vocab_size": ROWS})
    (folder / "tokenizer_config.json").write_text(json.dumps(NAMED))
    KINDS[request.param](folder)
    return request.param, folder, load_huggingface(folder, scan_layers=True)


tokens = st.lists(st.sampled_from(TOKENS), min_size=1, max_size=4, unique=True)


def texts_of(tokens):
    return st.lists(st.sampled_from([*tokens, *tokens, *PLAIN]), max_size=6).map("".join)


def test_each_is_one_id_wherever_it_stands_and_other_text_is_cut_as_before(base):
    kind, _, model = base

    @given(tokens, st.data())
    @settings(max_examples=60, deadline=None, database=None)
    def check(texts, data):
        if kind != "words" and "İstanbul" in texts:
            with pytest.raises(ValueError, match=r"would be written as '.*stanbul', since this tokenizer spells bytes"):
                with_tokens(model, texts)
            return
        found, rows = with_tokens(model, texts)
        ids = dict(zip(texts, rows["params/embed/embedding"], strict=True))
        assert sorted(ids.values()) == list(range(min(ids.values()), min(ids.values()) + len(ids)))
        text = data.draw(texts_of(texts))
        got = found.tokenizer.encode(text)
        specials = {"<s>", "</s>", "<pad>", "<unk>", "<x>"} & model.tokenizer.backend.get_vocab().keys()
        # The longest of those that begin first.
        either = "|".join(re.escape(one) for one in sorted({*texts, *specials}, key=len, reverse=True))
        parts = [part for part in re.split(f"({either})", text) if part]
        if kind != "words":  # there a blank in front of each part is the tokenizer's own affair
            cut = [[ids[p]] if p in ids else model.tokenizer.encode(p) for p in parts]
            bos, told = [model.tokenizer.bos_id] * model.tokenizer.add_bos, parts[:1] == ["<s>"]
            cut = [one[1:] if bos and p not in ids and p != "<s>" else one for p, one in zip(parts, cut, strict=True)]
            assert got == ([] if told else bos) + [n for one in cut for n in one]
        assert [n for n in got if n in ids.values()] == [ids[p] for p in parts if p in ids]

    check()


def test_the_written_tokenizer_is_the_same(base, tmp_path):
    _, folder, model = base
    found, _ = with_tokens(model, ["<tool>", " lead", "日本", "a,b", "<too"])
    write_tokenizer(found.tokenizer, folder, 64, tmp_path)
    for text in ("hi<tool> leadhi<too<tool>", "日本 a,b", "<s>hi lead"):
        assert read_tokenizer(tmp_path).encode(text) == found.tokenizer.encode(text)


@pytest.mark.nightly
@pytest.mark.reference
def test_transformers_cuts_texts_into_the_same_ids(base, tmp_path):
    transformers = pytest.importorskip("transformers")
    _, folder, model = base

    @given(tokens, st.data())
    @settings(max_examples=40, deadline=None, database=None)
    def check(texts, data):
        texts = [text for text in texts if text != "İstanbul"] or ["<tool>"]
        found, _ = with_tokens(model, texts)
        write_tokenizer(found.tokenizer, folder, 64, tmp_path)
        theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), read_tokenizer(tmp_path)
        for text in data.draw(st.lists(texts_of(texts), min_size=5, max_size=5)):
            assert theirs(text).input_ids == ours.encode(text) == found.tokenizer.encode(text)

    check()


def test_what_is_one_token_already_or_blank_is_said(tmp_path):
    folder = folders.write(tmp_path, {"vocab_size": ROWS})
    vocabulary = {token: n for n, token in enumerate([*folders.VOCABULARY, "Ã", "©", "Ã©"])}
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    about = json.loads(tokenizer.to_str())
    about["model"] |= {"vocab": vocabulary, "merges": [["h", "i"], ["Ã", "©"]]}
    (folder / "tokenizer.json").write_text(json.dumps(about))
    model = load_huggingface(folder, scan_layers=True)
    for text, said in (("é", "'é' is a token of this model already, 18"), (" ", "one that is empty")):
        with pytest.raises(ValueError, match=said):
            with_tokens(model, [text])
