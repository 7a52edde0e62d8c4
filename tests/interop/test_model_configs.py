"""`config.json` of each family: what is read of it, and what is refused."""

import json

import pytest

from rslora_jax.interop.huggingface import read_model_config
from rslora_jax.models import rope

from . import folders
from .folders import FAMILIES

pytestmark = pytest.mark.by_day_on("newest")


def config_of(tmp_path, **changes):
    config = {name: value for name, value in (folders.CONFIG | changes).items() if value is not folders.ABSENT}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return read_model_config(tmp_path)[1]


def test_the_configuration_of_each_family(tmp_path):
    c = config_of(tmp_path)
    assert (c.width, c.mlp_width, c.num_layers, c.num_heads, c.num_kv_heads, c.head_dim) == (16, 40, 3, 4, 2, 8)
    assert (c.rope_base, c.norm_eps, c.max_len, c.tie_head, c.window, c.qkv_bias) == (500, 1e-5, 64, False, None, False)
    about = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    factors = dict(low_freq_factor=1, high_freq_factor=4.0, original_max_len=16)
    scaling = rope.llama3(8, 500.0, 8, **factors)
    assert config_of(tmp_path, rope_scaling=about | {"rope_type": "llama3"}).rope_scaling == scaling
    assert config_of(tmp_path, rope_scaling=about | {"type": "llama3"}).rope_scaling == scaling
    c = config_of(tmp_path, rope_parameters=about | {"rope_type": "llama3", "rope_theta": 7e3})  # of transformers 5
    assert (c.rope_scaling, c.rope_base) == (rope.llama3(8, 7e3, 8, **factors), 7e3)
    c = config_of(tmp_path, head_dim=None, num_key_value_heads=None)
    assert (c.head_dim, c.num_kv_heads) == (4, 4)
    assert config_of(tmp_path, **FAMILIES["mistral"]).window == 5
    assert config_of(tmp_path, **FAMILIES["mistral"] | {"sliding_window": None}).window is None
    qwen = FAMILIES["qwen2"] | {"sliding_window": 6, "max_window_layers": 2}
    c = config_of(tmp_path, **qwen)
    assert (c.qkv_bias, c.qk_norm, c.window) == (True, False, None)
    c = config_of(tmp_path, **qwen, use_sliding_window=True)
    assert (c.window, c.window_layers) == (6, (False, False, True))
    c = config_of(tmp_path, **qwen | {"max_window_layers": 0}, use_sliding_window=True)
    assert (c.window, c.window_layers) == (6, None)
    assert config_of(tmp_path, **qwen | {"max_window_layers": 3}, use_sliding_window=True).window is None
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    c = config_of(tmp_path, **FAMILIES["qwen3"], sliding_window=6, use_sliding_window=True, layer_types=types)
    assert (c.qk_norm, c.qkv_bias, c.window, c.window_layers) == (True, False, 6, (True, False, True))


def test_the_configurations_of_gemma(tmp_path):
    def named(kind, name):
        return {"model_type": kind, "architectures": [f"{name}ForCausalLM"], "hidden_act": None}

    one, two, three = named("gemma", "Gemma"), named("gemma2", "Gemma2"), named("gemma3_text", "Gemma3")
    c = config_of(tmp_path, **one, tie_word_embeddings=True)
    assert (c.activation, c.norm_offset, c.embed_scale, c.window) == ("gelu_tanh", 1, 4, None)
    assert (c.post_norms, c.qk_norm, c.score_size, c.score_cap, c.logit_cap) == (False, False, None, None, None)
    for left_out in ("tie_word_embeddings", "head_dim", "max_position_embeddings", "rope_theta"):
        one[left_out] = folders.ABSENT
    c = config_of(tmp_path, **one)
    assert (c.tie_head, c.head_dim, c.max_len, c.rope_base) == (True, 256, 8192, 1e4)
    c = config_of(tmp_path, **two, query_pre_attn_scalar=144)
    assert (c.score_size, c.score_cap, c.logit_cap, c.post_norms, c.qk_norm) == (144, 50, 30, True, False)
    assert (c.window, c.window_layers, c.window_rope_base) == (4096, (True, False, True), None)
    c = config_of(tmp_path, **two, attn_logit_softcapping=None, sliding_window=7)
    assert (c.score_cap, c.logit_cap, c.score_size, c.window) == (None, 30, 256, 7)
    c = config_of(tmp_path, **three, sliding_window=5, sliding_window_pattern=2, rope_local_base_freq=33.0)
    assert (c.qk_norm, c.logit_cap, c.window_layers) == (True, None, (True, False, True))
    assert (c.rope_base, c.window_rope_base) == (500, 33)
    c = config_of(tmp_path, **three | {"rope_theta": folders.ABSENT}, num_hidden_layers=7)
    assert c.window_layers == (True,) * 5 + (False, True) and (c.rope_base, c.window_rope_base) == (1e6, 1e4)
    c = config_of(tmp_path, **three, rope_local_base_freq=33.0)  # all of its three layers have a window
    assert (c.window_layers, c.rope_base, c.window_rope_base) == (None, 33, None)
    for changes in (
        two | {"hidden_activation": "gelu"},
        one | {"hidden_act": "silu"},
        one | {"query_pre_attn_scalar": 8},
        three | {"final_logit_softcapping": 30.0},
    ):
        with pytest.raises(ValueError, match=r"only .* (is|are) computed here"):
            config_of(tmp_path, **changes)


MISTRAL = FAMILIES["mistral"]
WRONG_CONFIGS = {
    "family": (
        {"model_type": "gemma4"},
        "model_type 'gemma4': only llama, mistral, qwen2, qwen3, gemma, gemma2, .* are read",
    ),
    "no family": ({"model_type": None}, "model_type None"),
    "head": ({"architectures": ["LlamaForSequenceClassification"]}, "Classification.*: only LlamaForCausalLM"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act='gelu': only 'silu'"),
    "bias": ({"attention_bias": True}, "attention_bias=True: only False"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias=True"),
    "part rope": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: only 1"),
    "half rope": ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "lacks original_max.* number above 0"),
    "mrope": ({"rope_scaling": {"type": "default", "mrope_section": [1]}}, "mrope_section.*: only factor, .* known"),
    "order": (
        {
            "rope_scaling": dict(rope_type="llama3", factor=8.0, low_freq_factor=4, high_freq_factor=4)
            | {"original_max_position_embeddings": 8}
        },
        "low_freq_factor=4.0, high_freq_factor=4.0: the first is to be less",
    ),
    "quantised": (
        {"quantization_config": {"bits": 4}},
        "quantization_config with quant_method=None, and only bitsandbytes is read",
    ),
    "softcap": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0: only None"),
    "experts": ({"num_local_experts": 8}, "num_local_experts=8"),
    "window of llama": ({"sliding_window": 8}, "sliding_window .* 'llama' computes without"),
    "window of none": (MISTRAL | {"sliding_window": 0}, "sliding_window=0: it is to be a int, and above 0"),
    "layers": (MISTRAL | {"layer_types": ["full_attention"] * 3}, "layer_types .* contradict"),
    "chunks": ({"layer_types": ["chunked_attention"] * 3}, "layer_types .*: 3 of full_attention or sliding"),
    "text": ({"hidden_size": "16"}, "hidden_size='16': it is to be a int"),
    "none": ({"intermediate_size": None}, "intermediate_size=None"),
    "zero": ({"num_attention_heads": 0}, "num_attention_heads=0"),
    "heads": ({"num_key_value_heads": 3}, "num_kv_heads=3: every key-value head"),
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_a_configuration_that_would_be_computed_wrongly_is_refused(tmp_path, case):
    changes, message = WRONG_CONFIGS[case]
    with pytest.raises(ValueError, match=message) as caught:
        config_of(tmp_path, **changes)
    assert str(caught.value).startswith(str(tmp_path / "config.json")) and "\n" not in str(caught.value)
