"""SmolLM2 against transformers and torch, in float32, both reading the same GGUF file."""

from __future__ import annotations

import functools
import gc
import json
import os
import random
import unicodedata

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rslora_jax.models.decoder import Decoder, init_cache
from rslora_jax.models.generation import generate

from .test_tokenizer import TEXTS

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
# In one process: torch and two copies of the weights.
pytestmark = [pytest.mark.reference, pytest.mark.xdist_group("reference")]

PROSE = (
    "Water moves around the Earth in a cycle that has no beginning and no end. The heat of the sun turns "
    "water from the oceans, lakes and rivers into vapor, which rises into the air. Plants also give off "
    "water through their leaves. As the vapor rises it cools, and it forms small drops that we see as "
    "clouds. When the drops become large and heavy enough, they fall to the ground as rain or snow. Some of "
    "this water flows over the land into streams and rivers, which carry it back to the sea. Some of it "
    "sinks into the soil, where the roots of plants take it up, or fills the spaces between rocks far below "
    "the surface. This groundwater can stay there for many years before it comes out again in a spring. In "
    "cold places the snow does not melt, and over a long time it is pressed into ice. People depend on this "
    "cycle for the water that they drink and for the food that they grow. When too much water is taken from "
    "a river, or when it is polluted, the plants and animals that live along the river suffer as well."
)
CODE = """import math

class Circle:
    def __init__(self, radius: float = 1.0):
        self.radius = radius

    def area(self) -> float:
        return math.pi * self.radius ** 2  # 3.14159... times r squared

circles = [Circle(r) for r in range(10)]
print(sum(c.area() for c in circles if c.radius % 2 == 0))
"""
CHAT = [
    {"role": "system", "content": "You are a patient gardener. Answer in two sentences."},
    {"role": "user", "content": "When should I plant tulips?"},
    {"role": "assistant", "content": "Plant the bulbs in autumn, about 15 cm deep. They need a cold winter."},
    {"role": "user", "content": "And how much water do they need?\n\nMy soil is sandy."},
]
FOREIGN = (
    "Der Zug nach Zürich fährt heute erst um halb neun, weil es in der Nacht geschneit hat. "
    "Les enfants jouaient déjà dans la cour, où l'on avait oublié une échelle. "
    "私たちは駅の前で一時間待ちました。Потом мы пошли домой пешком. 🎉"
)


@pytest.fixture(scope="module")
def prompts(smollm2):
    """Token ids by kind of text."""
    tok = smollm2.tokenizer
    texts = {"prose": PROSE, "code": CODE, "chat": tok.chat(CHAT), "foreign": FOREIGN}
    return {name: tok.encode(text) for name, text in texts.items()}


@pytest.fixture(scope="module", autouse=True)
def parsed_once():
    """Parse the file once: transformers does so for the config, for the weights and twice for the tokenizer."""
    import gguf

    with pytest.MonkeyPatch.context() as patch:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        yield


@pytest.fixture(scope="module")
def reference(smollm2_path):
    """Give transformers' model, its weights read by transformers' own code."""
    # `from_pretrained(gguf_file=...)` makes these same calls, but wants one more package, accelerate.
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.AutoConfig.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    model = transformers.LlamaForCausalLM(config)
    tensors = load_gguf_checkpoint(str(smollm2_path), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (missing, unexpected, config.tie_word_embeddings) == (["lm_head.weight"], [], True)
    model.tie_weights()
    assert model.dtype == torch.float32
    yield model.eval()
    del model, tensors
    gc.collect()


@pytest.fixture(scope="module")
def reference_tokenizer(smollm2_path):
    return transformers.AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)


@pytest.fixture(scope="module")
def logits_of(reference):
    """Give a function from token ids to transformers' logits (tokens, vocabulary)."""

    def run(ids):
        with torch.no_grad():
            return reference(torch.tensor([ids])).logits[0].numpy()

    return run


@pytest.fixture(scope="module")
def expected(prompts, logits_of):
    return {name: logits_of(ids) for name, ids in prompts.items()}


def _nll(logits_TxV, ids):
    """Give the mean negative log likelihood of each token after the first."""
    wide = np.asarray(logits_TxV, np.float64)[:-1]
    top = wide.max(axis=1)
    picked = wide[np.arange(len(ids) - 1), ids[1:]]
    return float(np.mean(np.log(np.exp(wide - top[:, None]).sum(axis=1)) + top - picked))


@pytest.mark.parametrize("layout", ["smollm2", "smollm2_scanned"])
def test_logits_equal_transformers_at_every_token(request, prompts, expected, layout):
    config, variables, _ = request.getfixturevalue(layout)
    longest = max(map(len, prompts.values()))
    tokens, positions = np.zeros((2, len(prompts), longest), np.int32)
    positions -= 1
    for row, ids in enumerate(prompts.values()):
        tokens[row, : len(ids)], positions[row, : len(ids)] = ids, range(len(ids))
    logits = np.asarray(jax.jit(Decoder(config).apply)(variables, tokens, positions))
    for row, (name, want) in enumerate(expected.items()):
        gap = float(np.abs(logits[row, : len(want)] - want).max())
        print(f"{layout}, {name}: {len(want)} tokens, largest difference of a logit {gap:.1e}")
        assert gap <= 1e-3, name


def test_decoding_through_the_cache_equals_the_whole_forward(smollm2_scanned, prompts, expected):
    config, variables, _ = smollm2_scanned
    apply = jax.jit(Decoder(config).apply)
    ids, want = np.array(prompts["chat"])[None], expected["chat"]
    head = ids.shape[1] - 12
    logits, cache = apply(variables, ids[:, :head], cache=init_cache(config, 1, ids.shape[1] + 4))
    outs = [logits]
    for t in range(head, ids.shape[1]):
        logits, cache = apply(variables, ids[:, t : t + 1], cache=cache)
        outs.append(logits)
    cached = np.concatenate(outs, axis=1)
    np.testing.assert_allclose(cached, apply(variables, ids), rtol=0, atol=1e-3)
    np.testing.assert_allclose(cached[0], want, rtol=0, atol=1e-3)


def test_greedy_continuations_equal_transformers(smollm2_scanned, reference, logits_of):
    config, variables, tok = smollm2_scanned
    question = tok.chat([{"role": "user", "content": "What is the capital of France?"}])
    starts = [tok.encode(question), tok.encode("Once upon a time there was a small house at the edge of")]
    ours = generate(Decoder(config).apply, variables, starts, config, max_new=20, eos_id=tok.eos_id)
    for start, got in zip(starts, ours, strict=True):
        ids = torch.tensor([start])
        out = reference.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
        want = out[0, len(start) :].tolist()
        print(repr(tok.decode(got)))
        if got != want:
            # They may part only where two tokens are all but equally likely.
            same = next(i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b)
            first, second = np.sort(logits_of(start + want[:same])[-1])[:-3:-1]
            assert first - second < 1e-3, (got, want)
    assert "Paris" in tok.decode(ours[0])


def test_perplexity_is_low_on_prose_high_on_shuffled_words_and_equal_to_transformers(smollm2, logits_of):
    config, variables, tok = smollm2
    words = PROSE.split()
    assert len(words) >= 150
    random.Random(0).shuffle(words)
    figures = []
    for text in (PROSE, " ".join(words)):
        ids = tok.encode(text)
        ours = float(np.exp(_nll(Decoder(config).apply(variables, jnp.array([ids]))[0], ids)))
        theirs = float(np.exp(_nll(logits_of(ids), ids)))
        print(f"perplexity {ours:.4f}, by transformers {theirs:.4f}, over {len(ids)} tokens")
        assert ours == pytest.approx(theirs, rel=1e-3)
        figures.append(ours)
    assert 6 < figures[0] < 25 and figures[1] > 10 * figures[0]


@pytest.mark.parametrize("ask", [False, True])
@pytest.mark.parametrize("messages", [CHAT, CHAT[1:], CHAT[:2]])
def test_chats_equal_transformers(smollm2, reference_tokenizer, messages, ask):
    want = reference_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    assert smollm2.tokenizer.chat(messages, add_generation_prompt=ask) == want


def _is_number(char):
    return unicodedata.category(char)[0] == "N"


def _random_texts(count):
    rng = random.Random(0)
    # Planes of private use and of characters to come are left out: libraries differ on what they are.
    assigned = [chr(i) for i in range(0x110000) if unicodedata.category(chr(i)) not in ("Cn", "Co", "Cs")]
    pools = (assigned, [chr(i) for i in range(0x250)], " \n\t\r\u00a0\u2003'sdrelvtm12½.,-(é漢<|>")
    return ["".join(rng.choices(pools[i % 3], k=rng.randint(1, 60))) for i in range(count)]


@pytest.fixture(scope="module")
def slow_ids(smollm2_path, smollm2, tmp_path_factory):
    """Give a function from text to ids by the pure Python GPT-2 tokenizer, told to cut out digits."""
    from gguf import GGUFReader

    fields, folder = GGUFReader(smollm2_path).fields, tmp_path_factory.mktemp("gpt2")
    tokens = fields["tokenizer.ggml.tokens"].contents()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    merges = "\n".join(["#version: 0.2", *fields["tokenizer.ggml.merges"].contents(), ""])
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    slow = transformers.GPT2Tokenizer(folder / "vocab.json", folder / "merges.txt", unk_token="<|endoftext|>")

    def run(text):
        runs = [""]
        for char in text:
            if _is_number(char):
                runs += [char, ""]
            else:
                runs[-1] += char
        ids = []
        for word in (word for part in runs for word in slow.pat.findall(part)):
            # Bytes without a token are left out before pairs are merged, so that their neighbours meet.
            symbols = [slow.byte_encoder[byte] for byte in word.encode()]
            known = "".join(symbol for symbol in symbols if symbol in slow.encoder)
            ids += slow.convert_tokens_to_ids(slow.bpe(known).split(" ") if known else [])
        return ids

    return run


def test_ids_equal_those_of_a_tokenizer_in_pure_python(smollm2, slow_ids):
    tok = smollm2.tokenizer
    plain = [text for text in TEXTS if "<|im_start|>" not in text]
    for text in [*plain, PROSE, CODE, FOREIGN, *_random_texts(3000)]:
        assert tok.encode(text) == slow_ids(text), repr(text)


def test_ids_equal_transformers_conversion_where_that_is_right(smollm2, reference_tokenizer):
    # The published tokenizer cuts out every digit, then runs of the GPT-2 pattern, and leaves out the bytes
    # it has no token for. transformers' conversion from GGUF keeps only the GPT-2 pattern, so that the blanks
    # before a digit come out in other pieces, and puts the unknown token for those bytes; so these are left
    # out here. That the first is right also shows in the vocabulary: no token holds a digit and more.
    backend, tok = smollm2.tokenizer.backend, smollm2.tokenizer
    assert not any(any(map(_is_number, t)) for t in backend.get_vocab() if t.isascii() and len(t) > 1)
    lacking = {chr(i) for i in range(128) if not tok.encode(chr(i))}
    assert lacking == set("\x04\x06\x13\x14\x16\x1d")
    texts = [*TEXTS, PROSE, CODE, FOREIGN, *map(tok.chat, (CHAT, CHAT[:1])), *_random_texts(3000)]
    for text in texts:
        text = "".join(char for char in text if char not in lacking and not _is_number(char))
        assert tok.encode(text) == reference_tokenizer(text, add_special_tokens=False).input_ids, repr(text)
    theirs = reference_tokenizer("a\n\n1", add_special_tokens=False).input_ids
    assert tok.encode("a\n\n1") == [*tok.encode("a"), *tok.encode("\n\n"), *tok.encode("1")] != theirs
