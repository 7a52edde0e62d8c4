"""GGUF files of every architecture, written from transformers' models, against these models' logits."""

from __future__ import annotations

import functools
import os
import random

import jax
import numpy as np
import pytest

import rslora_jax as rslora
from rslora_jax.interop.decoder_gguf import FORM
from rslora_jax.interop.gguf import load_gguf
from rslora_jax.interop.merged import write_merged
from rslora_jax.models.decoder import Decoder

from .test_gguf_vocabulary import sentencepiece
from .test_huggingface import SIZES

os.environ["HF_HUB_OFFLINE"] = "1"
gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.reference,
    pytest.mark.xdist_group("reference"),
    pytest.mark.usefixtures("compile_fast"),
    pytest.mark.by_day_on("oldest"),
]

LINEAR = dict(rope_type="linear", factor=8.0)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
BETAS = dict(beta_fast=2.0, beta_slow=0.2)
LLAMA3 = dict(
    rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=20
)
GEMMA = dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=5, num_hidden_layers=7)
CAPS = dict(attn_logit_softcapping=1.5, final_logit_softcapping=2.5)
# transformers' class, what is changed in its configuration, and the name of the architecture in the file.
MODELS = {
    "llama 2": ("Llama", dict(num_key_value_heads=6), "llama"),
    "llama 3.1": ("Llama", dict(rope_theta=500.0, rope_scaling=LLAMA3, tie_word_embeddings=True), "llama"),
    "llama stretched": ("Llama", dict(rope_scaling=LINEAR), "llama"),
    "mistral": ("Mistral", dict(sliding_window=None, head_dim=16), "llama"),
    "qwen 2": ("Qwen2", dict(tie_word_embeddings=True, rms_norm_eps=1e-6), "qwen2"),
    "qwen 2 stretched": ("Qwen2", dict(head_dim=16, rope_scaling=YARN), "qwen2"),
    "qwen 2 further": ("Qwen2", dict(head_dim=16, rope_scaling=YARN | BETAS), "qwen2"),
    "qwen 3": ("Qwen3", dict(head_dim=128), "qwen3"),
    "gemma": ("Gemma", dict(head_dim=16), "gemma"),
    "gemma 2": ("Gemma2", GEMMA | CAPS, "gemma2"),
    "gemma 3": ("Gemma3", GEMMA, "gemma3"),
    "gemma 3 stretched": ("Gemma3", GEMMA | dict(rope_scaling=LINEAR), "gemma3"),
}
BY_DAY = ("llama 3.1", "qwen 2", "gemma 2", "gemma 3 stretched")
# Where transformers' own reader heeds all that is in the file: not a stretched rope, and of Gemma not a query's size.
READS = ("llama 2", "mistral", "qwen 2", "qwen 3")


@functools.cache
def model_of(case):
    """Give transformers' model with all its weights drawn."""
    name, changes, _ = MODELS[case]
    vocabulary = len(sentencepiece()["tokenizer.ggml.tokens"])
    named = {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
    sizes = SIZES | dict(vocab_size=vocabulary, num_hidden_layers=2) | changes
    config = getattr(transformers, named)(**sizes, attn_implementation="eager")
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            scale = 0.3 if weight.ndim == 1 else 1.5 / weight.shape[1] ** 0.5
            weight.copy_(torch.randn(weight.shape) * scale + ("norm" in path))
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    config.rope_scaling = getattr(config, "rope_scaling", None) or {}
    return model


def interleaved(weight, heads):
    """Put the rows of a Llama's q and k as llama.cpp's converter does (`LlamaModel.permute`)."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def entries(config, arch):
    """Give the figures as llama.cpp's converter writes them, by the names of the library `gguf`."""
    k, scaling = gguf.Keys, config.rope_scaling
    found = {
        k.LLM.CONTEXT_LENGTH: config.max_position_embeddings,
        k.LLM.EMBEDDING_LENGTH: config.hidden_size,
        k.LLM.BLOCK_COUNT: config.num_hidden_layers,
        k.LLM.FEED_FORWARD_LENGTH: config.intermediate_size,
        k.Attention.HEAD_COUNT: config.num_attention_heads,
        k.Attention.HEAD_COUNT_KV: config.num_key_value_heads,
        k.Attention.LAYERNORM_RMS_EPS: float(config.rms_norm_eps),
        k.Attention.KEY_LENGTH: config.head_dim,
        k.Attention.VALUE_LENGTH: config.head_dim,
        k.Rope.FREQ_BASE: float(config.rope_theta),
    }
    if arch in ("gemma2", "gemma3"):
        found[k.Attention.SLIDING_WINDOW] = config.sliding_window
    if arch == "gemma2":
        found[k.LLM.ATTN_LOGIT_SOFTCAPPING] = config.attn_logit_softcapping
        found[k.LLM.FINAL_LOGIT_SOFTCAPPING] = config.final_logit_softcapping
    if arch == "llama":
        found |= {k.LLM.VOCAB_SIZE: config.vocab_size, k.Rope.DIMENSION_COUNT: config.head_dim}
    if scaling and scaling["rope_type"] != "llama3":
        found |= {k.Rope.SCALING_TYPE: scaling["rope_type"], k.Rope.SCALING_FACTOR: scaling["factor"]}
    if "yarn" in scaling.values():
        found[k.Rope.SCALING_ORIG_CTX_LEN] = scaling["original_max_position_embeddings"]
        found |= {f"{arch}.rope.scaling.yarn_{name}": scaling[name] for name in BETAS if name in scaling}
    return {name.format(arch=arch): value for name, value in found.items()}


def write(path, case):
    """Write a model as llama.cpp's converter does, tensors by the names of the library `gguf`."""
    model, arch = model_of(case), MODELS[case][2]
    config = model.config
    kind = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, arch)
    vocabulary = sentencepiece(add_space_prefix=not arch.startswith("gemma"), bos_token_id=1, eos_token_id=2)
    for name, value in (entries(config, arch) | vocabulary).items():
        if name != "general.architecture":
            writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = tensor.numpy()
        if arch == "llama" and "q_proj" in name:
            weight = interleaved(weight, config.num_attention_heads)
        if arch == "llama" and "k_proj" in name:
            weight = interleaved(weight, config.num_key_value_heads)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            weight = weight + np.float32(1)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(weight))
    if "llama3" in config.rope_scaling.values():
        plain, stretched = (
            transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[kind](config, "cpu")[0].numpy()
            for kind in ("default", "llama3")
        )
        writer.add_tensor("rope_freqs.weight", plain / stretched)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


TOKENS = np.random.default_rng(0).integers(0, 300, (2, 30))


def logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("case", [c if c in BY_DAY else pytest.param(c, marks=pytest.mark.nightly) for c in MODELS])
def test_a_file_computes_what_transformers_does(case, tmp_path):
    path, model = write(tmp_path / "model.gguf", case), model_of(case)
    want = logits(model)
    assert np.abs(want).max() > 1
    for scan in (False, True):
        config, variables, _ = load_gguf(path, scan_layers=scan)
        got = jax.jit(Decoder(config).apply)(variables, TOKENS)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == sum(w.numel() for w in model.parameters())


@pytest.mark.nightly
@pytest.mark.parametrize("case", READS)
def test_transformers_reads_the_same_model_from_the_file(case, tmp_path):
    path = write(tmp_path / "model.gguf", case)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    want = logits(theirs.eval())
    config, variables, _ = load_gguf(path)
    got = jax.jit(Decoder(config).apply)(variables, TOKENS)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


@pytest.mark.nightly
def test_transformers_reads_the_same_tokens_from_the_file(tmp_path):
    path = write(tmp_path / "model.gguf", "llama 2")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    ours, rng = load_gguf(path).tokenizer, random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices(["the", "then", "lower", "aaa", " ", "  ", "\n", "🎉", "xyz", "</s>"], k=9))
        assert ours.encode(text)[1:] == theirs(text, add_special_tokens=False).input_ids, text


def test_the_sizes_whose_queries_are_divided_otherwise(tmp_path):
    for arch, layers, size in (
        ("gemma2", 46, 144.0),
        ("gemma2", 42, 128.0),
        ("gemma3", 62, 144.0),
        ("gemma3", 26, 128.0),
    ):
        config = dict(
            hidden_size=4608, intermediate_size=8, num_attention_heads=32, num_key_value_heads=16, head_dim=128
        )
        theirs = transformers.Gemma2Config(**config, num_hidden_layers=layers)
        theirs.rope_scaling = {}
        metadata = entries(theirs, arch) | {"general.architecture": arch} | sentencepiece()
        found = FORM.read_config(tmp_path, metadata, {})
        assert found.score_size == size


@pytest.mark.nightly
@pytest.mark.parametrize("case", MODELS)
def test_a_file_merged_is_read_by_transformers(case, tmp_path):
    loaded = load_gguf(write(tmp_path / "model.gguf", case), scan_layers=True)
    lora = rslora.wrap(loaded.apply, loaded.variables, TOKENS, config=rslora.LoraConfig(rank=3, alpha=7))
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda leaf: 0.1 * rng.standard_normal(leaf.shape).astype("float32"), lora.init(jax.random.key(0))
    )
    about = dict(config=loaded.config, tokenizer=loaded.tokenizer, family=loaded.family, dtype="float32")
    write_merged(tmp_path / "out", lora, loaded.variables, adapters, **about)
    got = logits(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    )
    want = jax.jit(lora.apply)(loaded.variables, adapters, TOKENS)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
    assert np.abs(got - logits(model_of(case))).max() > 1e-2 * np.abs(got).max()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("then the lower", "  aaa\n🎉 ", "</s>the<|x|>then"):
        assert theirs(text).input_ids == loaded.tokenizer.encode(text)
