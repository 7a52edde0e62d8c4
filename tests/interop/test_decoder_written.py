"""A config.json that is written for a decoder reads as the same decoder, or the decoder is refused."""

import dataclasses
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from rslora_jax.interop.decoder_config import read_decoder_config
from rslora_jax.interop.decoder_written import write_decoder_config
from rslora_jax.models import DecoderConfig, RopeScaling, rope

pytestmark = pytest.mark.by_day_on("newest")

PLAIN = DecoderConfig(
    vocab_size=61, width=24, mlp_width=40, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=8, rope_base=700.0
)
GEMMA = dict(norm_offset=1.0, activation="gelu_tanh", embed_scale=24**0.5)
SCALINGS = (
    None,
    rope.linear(8, 8.0),
    rope.dynamic(8, 2.0, 1024),
    rope.yarn(8, 700.0, 4.0, original_max_len=512),
    rope.llama3(8, 700.0, 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_len=512),
    RopeScaling(divisors=(1.0, 2.0, 3.0, 4.5)),
    rope.longrope([1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0], 4.0, original_max_len=2048),
)
WINDOWS = ((None, None), (5, None), (5, (True, False, True)))
FAMILIES = {
    "llama": ({}, (None, None)),
    "mistral": ({}, (5, None)),
    "qwen2": (dict(qkv_bias=True), None),
    "qwen3": (dict(qk_norm=True), None),
    "gemma": (GEMMA, (None, None)),
    "gemma2": (GEMMA | dict(post_norms=True, score_size=5.0, score_cap=3.5, logit_cap=None), None),
    "gemma3_text": (GEMMA | dict(post_norms=True, score_size=5.5, qk_norm=True, window_rope_base=33.0), None),
}


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(FAMILIES)), st.sampled_from(SCALINGS), st.sampled_from(WINDOWS), st.booleans(), st.booleans()
)
def test_what_is_written_reads_as_the_same(kind, scaling, windows, tied, scan):
    parts, fixed = FAMILIES[kind]
    window, layers = windows if fixed is None else fixed
    config = dataclasses.replace(
        PLAIN, rope_scaling=scaling, window=window, window_layers=layers, tie_head=tied, scan_layers=scan, **parts
    )
    about = write_decoder_config(config, "bfloat16")
    assert (about["model_type"], about["torch_dtype"]) == (kind, "bfloat16")
    assert read_decoder_config(Path("config.json"), about, scan_layers=scan) == config


MIXED = {
    "windows": dict(window=5, window_layers=(True, False, True)),
    "biases and norms": dict(qkv_bias=True, qk_norm=True),
    "cap": dict(logit_cap=3.0),
    "offset": dict(norm_offset=1.0),
    "scale": dict(embed_scale=3.0),
    "two lengths": dict(rope_scaling=RopeScaling(divisors=(1.0,) * 4, long_divisors=(2.0,) * 4, original_max_len=77)),
}


@pytest.mark.parametrize("case", MIXED)
def test_what_no_family_has_is_refused(case):
    with pytest.raises(ValueError, match=r"cannot be written in a config\.json here: load the base from"):
        write_decoder_config(dataclasses.replace(PLAIN, **MIXED[case]), "float32")
