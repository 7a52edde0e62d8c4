"""Folders that transformers wrote, of every family, against transformers and torch on the same weights."""

from __future__ import annotations

import functools
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from rslora_jax.interop.load import load_model
from rslora_jax.interop.tokenizer_files import read_tokenizer
from rslora_jax.models.decoder import Decoder, init_cache
from rslora_jax.models.generation import generate

from .folders import TEMPLATE, VOCABULARY

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.reference, pytest.mark.xdist_group("reference"), pytest.mark.usefixtures("compile_fast")]

SIZES = dict(
    vocab_size=97,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    eos_token_id=None,
    bos_token_id=None,
    pad_token_id=None,
)
# Of so few positions that all three kinds of frequencies are there: kept, divided and mixed.
LLAMA3 = dict(
    rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=20
)
SOME_WINDOWS = dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "llama 2": ("Llama", dict(num_key_value_heads=6)),
    "llama 3.2": ("Llama", dict(rope_theta=500.0, rope_scaling=LLAMA3, tie_word_embeddings=True, head_dim=16)),
    "tinyllama": ("Llama", dict(rms_norm_eps=1e-5)),
    "smollm2": ("Llama", dict(num_attention_heads=3, num_key_value_heads=1, rope_theta=1e5, tie_word_embeddings=True)),
    "mistral 0.1": ("Mistral", dict(sliding_window=5)),
    "mistral 0.3": ("Mistral", dict(sliding_window=None, head_dim=16, rope_theta=1e6)),
    "qwen 2": ("Qwen2", dict(**SOME_WINDOWS)),
    "qwen 2.5": ("Qwen2", dict(tie_word_embeddings=True, rms_norm_eps=1e-6)),
    "qwen 3": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True)),
    "qwen 3 windows": ("Qwen3", dict(head_dim=8) | SOME_WINDOWS | dict(layer_types=ALTERNATING)),
    "gemma": ("Gemma", dict(head_dim=16)),
    # Caps and windows small enough to be felt; a query is scaled by neither the head's size nor the width.
    "gemma 2": (
        "Gemma2",
        dict(head_dim=8, query_pre_attn_scalar=5, sliding_window=5, attn_logit_softcapping=1.5)
        | dict(final_logit_softcapping=2.5),
    ),
    "gemma 3": ("Gemma3", dict(head_dim=16, query_pre_attn_scalar=5, sliding_window=5, layer_types=ALTERNATING)),
    "gemma 3 of windows": ("Gemma3", dict(head_dim=8, query_pre_attn_scalar=9, sliding_window=5)),
}
BY_DAY = {
    ("llama 3.2", "scanned"),
    ("mistral 0.1", "scanned"),
    ("qwen 2", "scanned"),
    ("qwen 3 windows", "looped"),
    ("gemma 2", "looped"),
    ("gemma 3", "scanned"),
}
CASES = [
    pytest.param(*case, marks=() if case in BY_DAY else pytest.mark.nightly)
    for case in itertools.product(FAMILIES, ("looped", "scanned"))
]
PROMPTS = [[5, 90, 3, 17, 17, 60, 2, 41, 8], [33], [1, 2, 3, 96]]


def small_tokenizer(bos=True):
    backend = Tokenizer(models.BPE({token: n for n, token in enumerate(VOCABULARY)}, [("h", "i")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", additional_special_tokens=["<tool>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **names)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Give a function from a family to transformers' model and the folder it was saved in, in several files."""

    @functools.cache
    def make(family):
        name, changes = FAMILIES[family]
        # Gemma 3's other class has pictures too. Only "eager" knows Gemma 2's caps.
        named = {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
        config = getattr(transformers, named)(**SIZES | changes, attn_implementation="eager")
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        torch.manual_seed(0)
        with torch.no_grad():
            for path, weight in model.named_parameters():
                # All of them, biases and norms too: at their start these would do nothing.
                drawn = torch.randn(weight.shape)
                scale = 0.3 if weight.ndim == 1 else 1.5 / weight.shape[1] ** 0.5
                weight.copy_(drawn * scale + ("norm" in path))
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder, max_shard_size="20KB")
        small_tokenizer().save_pretrained(folder)
        assert len(list(folder.glob("*.safetensors"))) > 1
        return model, folder

    return make


def expected_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_a_family_computes_what_transformers_does(folder_of, family, layout):
    model, folder = folder_of(family)
    config, variables, _ = load_model(folder, scan_layers=layout == "scanned")
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == sum(w.numel() for w in model.parameters())
    apply = jax.jit(Decoder(config).apply)

    width = max(map(len, PROMPTS))
    tokens, positions = np.zeros((2, len(PROMPTS), width), np.int32)
    positions -= 1
    for row, ids in enumerate(PROMPTS):
        tokens[row, : len(ids)], positions[row, : len(ids)] = ids, range(len(ids))
    logits = np.asarray(apply(variables, tokens, positions))
    for row, ids in enumerate(PROMPTS):
        want = expected_logits(model, ids)
        assert np.abs(want).max() > 1
        np.testing.assert_allclose(logits[row, : len(ids)], want, rtol=0, atol=1e-4)

    new = 12  # enough for the cache to be longer than the windows
    ours = generate(Decoder(config).apply, variables, PROMPTS, config, max_new=new, bucket=4)
    for ids, got in zip(PROMPTS, ours, strict=True):
        mask = torch.ones(1, len(ids), dtype=torch.long)
        out = model.generate(
            torch.tensor([ids]), attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=0
        )
        assert got == out[0, len(ids) :].tolist()

    # Through the cache, in pieces, the logits are the same as at once.
    ids = np.array([PROMPTS[0] + ours[0]])
    cache, outs, start = init_cache(config, 1, 24), [], 0
    for size in (10, 10, 1):
        logits, cache = apply(variables, ids[:, start : start + size], cache=cache)
        outs.append(logits)
        start += size
    want = expected_logits(model, ids[0].tolist())
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1)[0], want, rtol=0, atol=1e-4)


def test_a_model_saved_in_bfloat16_is_read_as_it_is(folder_of, tmp_path):
    model, folder = folder_of("qwen 3")
    half = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.bfloat16)
    half.save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    want = expected_logits(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, torch_dtype=torch.float32), [5, 9]
    )
    config, variables, _ = load_model(tmp_path)
    np.testing.assert_allclose(Decoder(config).apply(variables, jnp.array([[5, 9]]))[0], want, rtol=0, atol=1e-4)
    assert np.abs(want - expected_logits(model, [5, 9])).max() > 1e-3


TEXTS = ["hi", "", "hi ahi 12!", "<s>hi</s>", "hi<tool>hi", "</s><pad> hi", "user: hi"]
CHAT = [{"role": "user", "content": "hi 12"}, {"role": "assistant", "content": "a! <tool>"}]


def same_tokens(folder):
    ours, theirs = read_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (theirs.bos_token_id, theirs.eos_token_id, len(theirs))
    assert ours.pad_id == theirs.pad_token_id
    for text in TEXTS:
        ids = theirs(text).input_ids
        # Where the text itself begins so, theirs would begin twice.
        ids = ids[1:] if ids[:2] == [ours.bos_id] * 2 else ids
        assert ours.encode(text) == ids, text
        for skip in (False, True):
            want = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special=skip) == want
    for ask in (False, True):
        text = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=ask)
        assert ours.chat(CHAT, add_generation_prompt=ask) == text
        assert ours.encode(text) == theirs.apply_chat_template(CHAT, add_generation_prompt=ask)
    return ours


@pytest.mark.parametrize("jinja", [True, False])
def test_ids_and_chats_equal_transformers(tmp_path, jinja):
    small_tokenizer().save_pretrained(tmp_path, save_jinja_files=jinja)
    assert (tmp_path / "chat_template.jinja").exists() is jinja
    assert same_tokens(tmp_path).add_bos


def test_a_tokenizer_that_begins_nothing_equals_transformers(tmp_path):
    tokenizer = small_tokenizer(bos=False)
    tokenizer.chat_template = "{% for m in messages %}{{ m | tojson }}{{ tools is none }}{{ unk_token }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    assert not same_tokens(tmp_path).add_bos


@pytest.mark.parametrize("add_bos", [True, False])
def test_a_tokenizer_of_the_llama_class_equals_transformers(tmp_path, add_bos):
    words = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "▁", "h", "i", "hi", "▁hi", "a", "1", "2"]
    merges = [("h", "i"), ("▁", "hi")]
    vocabulary = {word: n for n, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = transformers.LlamaTokenizerFast(tokenizer_object=backend, add_bos_token=add_bos, legacy=False)
    tokenizer.pad_token = "</s>"
    tokenizer.add_tokens(["<tool>"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    if not add_bos:
        tokenizer.chat_template = TEMPLATE.replace("{{ bos_token }}", "")
        tokenizer.save_pretrained(tmp_path)
    assert same_tokens(tmp_path).add_bos is add_bos
