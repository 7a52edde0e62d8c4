"""Every way to stretch rotary embedding against transformers: its frequencies, and the logits of whole models."""

from __future__ import annotations

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rslora_jax.interop.huggingface import read_model_config
from rslora_jax.interop.load import load_model
from rslora_jax.models.decoder import Decoder
from rslora_jax.models.rope import dynamic, rotary

from . import folders
from .test_huggingface import SIZES, small_tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.reference,
    pytest.mark.xdist_group("reference"),
    pytest.mark.usefixtures("compile_fast"),
    pytest.mark.by_day_on("oldest"),
]

HEAD_DIM, MAX_LEN = 8, 24
SHORT, LONG = [1.0, 1.1, 1.3, 2.0], [1.5, 3.0, 7.0, 40.0]
YARN = dict(rope_type="yarn", factor=4.0)
LONGROPE = dict(rope_type="longrope", short_factor=SHORT, long_factor=LONG)
# What is in `rope_scaling`, and beside it.
CASES = {
    "default": (dict(rope_type="default"), {}),
    "linear": (dict(rope_type="linear", factor=8.0), {}),
    "linear of old": (dict(type="linear", factor=3), {}),
    "dynamic": (dict(rope_type="dynamic", factor=2.5), {}),
    "yarn": (YARN, {}),
    "yarn of a length": (YARN | dict(original_max_position_embeddings=11), {}),
    "yarn of factor 1": (YARN | dict(factor=1.0), {}),
    "yarn amplified": (YARN | dict(attention_factor=0.7, beta_fast=5.0, beta_slow=0.5), {}),
    "yarn of DeepSeek": (YARN | dict(mscale=0.707, mscale_all_dim=1.3, beta_fast=4, beta_slow=0.3), {}),
    "yarn not truncated": (YARN | dict(truncate=False, beta_fast=2.0, beta_slow=0.5), {}),
    "longrope": (LONGROPE, dict(original_max_position_embeddings=10)),
    "longrope of factor 1": (LONGROPE | dict(factor=1.0), {}),
    "longrope of a factor": (LONGROPE | dict(factor=6.0), dict(max_position_embeddings=60)),
    "longrope amplified": (LONGROPE | dict(attention_factor=1.7), dict(original_max_position_embeddings=10)),
    "llama3": (
        dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
        | dict(original_max_position_embeddings=20),
        {},
    ),
}
BY_DAY = ("dynamic", "longrope")
LENGTHS = (9, 11, 24, 25, 40)


def config_of(case):
    """Give transformers' configuration of a case."""
    scaling, changes = CASES[case]
    sizes = SIZES | dict(max_position_embeddings=MAX_LEN, head_dim=HEAD_DIM, rope_theta=50.0, num_hidden_layers=2)
    return transformers.LlamaConfig(**sizes | changes, rope_scaling=dict(scaling), attn_implementation="eager")


@pytest.mark.parametrize("case", CASES)
def test_cosines_and_sines_are_those_of_transformers(case, tmp_path):
    theirs = config_of(case)
    theirs.save_pretrained(tmp_path)
    config = read_model_config(tmp_path)[1]
    init = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[theirs.rope_scaling["rope_type"]]
    assert config.max_len == theirs.max_position_embeddings * (2.5 if case == "dynamic" else 1)
    for length in LENGTHS:
        frequencies, amplitude = init(theirs, "cpu", seq_len=length)
        angles = np.arange(length)[:, None] * frequencies.numpy().astype(np.float64)
        found = rotary(jnp.arange(length)[None], config.head_dim, config.rope_base, config.rope_scaling)
        for ours, want in zip(found, (np.cos(angles), np.sin(angles)), strict=True):
            np.testing.assert_allclose(ours[0], amplitude * want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", [c if c in BY_DAY else pytest.param(c, marks=pytest.mark.nightly) for c in CASES])
def test_logits_are_those_of_transformers(case, tmp_path):
    torch.manual_seed(0)
    # Fresh for each length: transformers' dynamic kind remembers the longest row that it saw.
    model = transformers.LlamaForCausalLM(config_of(case))
    model.apply(lambda part: [torch.nn.init.normal_(w, std=0.5) for w in part.parameters(False) if w.ndim > 1])
    model.save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    config, variables, _ = load_model(tmp_path)
    apply = jax.jit(Decoder(config).apply)
    rng, longest = np.random.default_rng(0), min(40, config.max_len)
    lengths = [length for length in LENGTHS if length <= longest]
    tokens = rng.integers(0, SIZES["vocab_size"], (len(lengths), longest))
    # Padded rows side by side, each as if alone.
    positions = np.where(np.arange(longest) < np.array(lengths)[:, None], np.arange(longest), -1)
    together = np.asarray(apply(variables, tokens, positions))
    for row, length in enumerate(lengths):
        fresh = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
        with torch.no_grad():
            want = fresh(torch.tensor(tokens[row : row + 1, :length])).logits[0].numpy()
        assert np.abs(want).max() > 1
        np.testing.assert_allclose(together[row, :length], want, rtol=0, atol=2e-4)


def test_packed_rows_are_stretched_by_their_own_length():
    scaling = dynamic(HEAD_DIM, 2.5, 24)
    positions = np.concatenate([np.arange(30), np.arange(9)])[None]
    segments = np.repeat([1, 2], [30, 9])[None]
    found = rotary(positions, HEAD_DIM, 50.0, scaling, segments)
    for start, length in ((0, 30), (30, 9)):
        alone = rotary(np.arange(length)[None], HEAD_DIM, 50.0, scaling)
        for ours, want in zip(found, alone, strict=True):
            np.testing.assert_allclose(ours[0, start : start + length], want[0], rtol=0, atol=1e-6)


GEMMA3 = dict(model_type="gemma3_text", architectures=["Gemma3ForCausalLM"], hidden_act=None, rope_theta=folders.ABSENT)
FULL, NEAR = dict(rope_type="linear", factor=8.0, rope_theta=7e5), dict(rope_type="default", rope_theta=3e3)
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]


def ours_of(tmp_path, **changes):
    about = {name: value for name, value in (folders.CONFIG | changes).items() if value is not folders.ABSENT}
    (tmp_path / "config.json").write_text(json.dumps(about))
    return read_model_config(tmp_path)[1]


def test_gemma_3_as_both_versions_of_transformers_write_it(tmp_path):
    gemma = GEMMA3 | dict(layer_types=TYPES, sliding_window=5)
    four = dict(rope_theta=7e5, rope_local_base_freq=3e3, rope_scaling=dict(rope_type="linear", factor=8.0))
    five = dict(rope_parameters=dict(full_attention=FULL, sliding_attention=NEAR))
    config = ours_of(tmp_path, **gemma | five)
    assert config == ours_of(tmp_path, **gemma | four)
    assert (config.rope_base, config.window_rope_base, config.rope_scaling.divisors) == (7e5, 3e3, (8.0,) * 4)
    plain = ours_of(tmp_path, **gemma | dict(rope_parameters=dict(full_attention=dict(rope_type="default"))))
    assert (plain.rope_base, plain.window_rope_base, plain.rope_scaling) == (1e6, 1e4, None)


OF_FIVE = dict(original_max_position_embeddings=16)


def test_transformers_5_has_the_first_length_among_its_parameters(tmp_path):
    for name, other in (("rope_parameters", {}), ("rope_scaling", OF_FIVE)):
        found = ours_of(tmp_path, **other, **{name: LONGROPE | OF_FIVE | dict(factor=4.0)}).rope_scaling
        assert (found.original_max_len, found.amplitude) == (16, pytest.approx(1.5**0.5))
    found = ours_of(tmp_path, rope_parameters=LONGROPE | OF_FIVE).rope_scaling  # of 64
    assert found.amplitude == pytest.approx(1.5**0.5)


DIFFER = "versions of transformers read this differently"
WRONG = {
    "kind": (
        dict(rope_scaling=dict(rope_type="su", factor=2.0)),
        "rope_type 'su': only default, linear, dynamic, yarn,",
    ),
    "no kind": (dict(rope_scaling=dict(rope_type=["yarn"], factor=2.0)), r"rope_type \['yarn'\]: only"),
    "field": (dict(rope_scaling=dict(rope_type="linear", factor=2.0, mscale=3)), "mscale.*known for 'linear'"),
    "no factor": (dict(rope_scaling=dict(rope_type="linear")), "factor=None among its rope parameters: a number above"),
    "infinite": (dict(rope_scaling=dict(rope_type="yarn", factor=float("inf"))), "factor=inf"),
    "list": (dict(rope_scaling=dict(rope_type="yarn", factor=[4.0])), r"factor=\[4.0\]"),
    "truth": (dict(rope_scaling=dict(rope_type="linear", factor=True)), "factor=True"),
    "negative": (dict(rope_scaling=LONGROPE | dict(factor=2.0, short_factor=[1.0, -1.0, 1.0, 1.0])), "above 0"),
    "short": (dict(rope_scaling=LONGROPE | dict(factor=2.0, long_factor=[1.0])), "long_factor is to be 4 numbers"),
    "no list": (dict(rope_parameters=LONGROPE | dict(long_factor=None)), "long_factor is to be 4 numbers"),
    "truncate": (dict(rope_scaling=YARN | dict(truncate=1)), "truncate=1 is to be true or false"),
    "dynamic": (dict(rope_scaling=dict(rope_type="dynamic", factor=2.0, **OF_FIVE)), DIFFER),
    "yarn": (dict(rope_scaling=YARN, **OF_FIVE), DIFFER),
    "longrope": (dict(rope_scaling=LONGROPE | OF_FIVE | dict(factor=4.0)), DIFFER),
    "factor": (dict(rope_scaling=LONGROPE | dict(factor=3.0), **OF_FIVE), DIFFER),
    "layers": (dict(rope_parameters=dict(full_attention=FULL)), "full_attention"),
    "windows": (
        GEMMA3 | dict(rope_parameters=dict(full_attention=FULL, sliding_attention=FULL)),
        "for windows: only 'default' is computed there",
    ),
    "two": (dict(rope_parameters=YARN, rope_scaling=LONGROPE), "one table of the two is read"),
    "no table": (dict(rope_scaling=[1]), "one table of the two is read"),
    "base 1": (dict(rope_theta=1.0, rope_scaling=YARN), "yarn.*division by zero"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_computed_is_refused(case, tmp_path):
    changes, message = WRONG[case]
    with pytest.raises(ValueError, match=message) as caught:
        ours_of(tmp_path, **changes)
    assert str(caught.value).startswith(str(tmp_path / "config.json")) and "\n" not in str(caught.value)
