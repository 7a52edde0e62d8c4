"""The Flax models of `transformers`, tiny and with random parameters."""

import functools
import importlib
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax.core import unfreeze

from tests.zoo.model import Model, filled

# T5 calls jnp.clip by the names of its arguments before JAX 0.4.27.
for family in ("t5", "longt5"):
    module: Any = importlib.import_module(f"transformers.models.{family}.modeling_flax_{family}")

    def clip(x, a_min=None, a_max=None):
        return jnp.clip(x, a_min, a_max)

    module.jnp = types.SimpleNamespace(**{**vars(jnp), "clip": clip})

RNG = np.random.default_rng(1)
TOKENS = RNG.integers(3, 40, (2, 6)).astype(np.int32)
LONG = RNG.integers(3, 40, (1, 16)).astype(np.int32)  # enough blocks for attention by blocks
ANSWER = RNG.integers(3, 40, (2, 4)).astype(np.int32)
PIXELS = RNG.standard_normal((1, 3, 8, 8)).astype(np.float32)
SOUND = RNG.standard_normal((1, 64)).astype(np.float32)
MELS = RNG.standard_normal((2, 6, 10)).astype(np.float32)
MAX = 8  # places in a cache

VOCABULARY = {"vocab_size": 41, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = VOCABULARY | {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 12}
LLAMA = VOCABULARY | {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}
BERT = VOCABULARY | {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
    "type_vocab_size": 5,
}
BART = VOCABULARY | {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 12,
    "decoder_start_token_id": 1,
}
T5 = VOCABULARY | {
    "d_model": 16,
    "d_kv": 5,
    "d_ff": 24,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
    "decoder_start_token_id": 0,
}
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 5,
}
CONVOLUTIONS = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 5}
TURNED = {"*/kernel": ((1,), (0,))}  # GPT-2 stores (out, in)


def load(kind: str, config: str, options: dict) -> tuple[Any, Any]:
    model = getattr(transformers, f"Flax{kind}")(getattr(transformers, f"{config}Config")(**options), _do_init=False)
    return model, filled(unfreeze(model.params_shape_tree))


def arrays(outputs: Any) -> list[Any]:
    return [v for k, v in outputs.items() if hasattr(v, "shape") and k != "encoder_last_hidden_state"]


def plain(kind: str, config: str, options: dict, *args: Any, **known: Any) -> Model:
    """A model without a decoder, or one whose decoder is run without a cache."""
    model, params = load(kind, config, options)
    return Model(lambda params, *args: arrays(model(*args, params=params)), params, args, **known)


def zeros(make: Callable[[], Any]) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(make))


def decoder_step(model: Any, params: Any, tokens: Any, cache: Any, at: Any, _: None = None) -> tuple[Any, Any]:
    """Return the logits of some more tokens, and the cache with them."""
    batch, length = tokens.shape
    places = {"position_ids": jnp.broadcast_to(at + jnp.arange(length), (batch, length))}
    mask = jnp.ones((batch, MAX), "int32")
    if type(model).__name__.startswith("FlaxBloom"):  # its positions are in its mask
        places = {}
    out = model(tokens, attention_mask=mask, past_key_values=cache, params=params, **places)
    return out.logits, out.past_key_values


def decoder(kind: str, config: str, options: dict, **known: Any) -> Model:
    """A decoder: all tokens at once, and from a cache."""
    model, params = load(kind, config, options)

    def start(params):
        return (zeros(lambda: model.init_cache(2, MAX)), None)

    step = functools.partial(decoder_step, model)
    return Model(lambda params, x: arrays(model(x, params=params)), params, (TOKENS,), start=start, step=step, **known)


def answer_step(model: Any, params: Any, tokens: Any, cache: Any, at: Any, encoded: Any) -> tuple[Any, Any]:
    """Return the logits of some more tokens of the answer, and the cache with them."""
    batch, length = tokens.shape
    places = {"decoder_position_ids": jnp.broadcast_to(at + jnp.arange(length), (batch, length))}
    if "T5" in type(model).__name__:  # its positions are relative
        places = {}
    mask = jnp.ones((batch, MAX), "int32")
    out = model.decode(tokens, encoded, decoder_attention_mask=mask, past_key_values=cache, params=params, **places)
    return out.logits, out.past_key_values


def start_answer(model: Any, params: Any, source: Any) -> tuple[Any, Any]:
    encoded = model.encode(source, params=params)
    return zeros(lambda: model.init_cache(2, MAX, encoded)), encoded


def encoder_decoder(kind: str, config: str, options: dict, source: Any = TOKENS, **known: Any) -> Model:
    """An encoder and a decoder: all tokens at once, and from a cache."""
    model, params = load(kind, config, options)

    def fn(params, x, y):
        return arrays(model(x, decoder_input_ids=y, params=params))

    start, step = functools.partial(start_answer, model), functools.partial(answer_step, model)
    return Model(fn, params, (source, ANSWER), start=start, step=step, **known)


BIAS = {"no_weights": ("final_logits_bias",)}
PATCHES = {"no_weights": ("*_token", "*/position_embeddings")}
CLIP = {
    "text_config": BERT | {"projection_dim": 8},
    "vision_config": VIT | {"projection_dim": 8},
    "projection_dim": 8,
}
WAV2VEC2 = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "conv_dim": (8, 8),
    "conv_stride": (4, 2),
    "conv_kernel": (8, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "do_stable_layer_norm": True,
    "feat_extract_norm": "layer",
    "pad_token_id": 0,
}

DECODERS: dict[str, Callable[[], Model]] = {
    "GPT-2": lambda: decoder("GPT2LMHeadModel", "GPT2", GPT2, axes=TURNED),
    "GPT-J": lambda: decoder("GPTJForCausalLM", "GPTJ", GPT2 | {"n_layer": 1, "rotary_dim": 2}, head="lm_head/kernel"),
    "GPT-Neo": lambda: decoder(
        "GPTNeoForCausalLM",
        "GPTNeo",
        VOCABULARY
        | {"hidden_size": 16, "num_layers": 2, "num_heads": 4, "window_size": 3, "max_position_embeddings": 12}
        | {"attention_types": [[["global", "local"], 1]], "intermediate_size": 24},
    ),
    "Llama": lambda: decoder("LlamaForCausalLM", "Llama", LLAMA, head="lm_head/kernel"),
    "Mistral": lambda: decoder(
        "MistralForCausalLM", "Mistral", LLAMA | {"num_hidden_layers": 1, "sliding_window": 4}, head="lm_head/kernel"
    ),
    "Gemma": lambda: decoder(
        "GemmaForCausalLM",
        "Gemma",
        LLAMA | {"num_hidden_layers": 1, "head_dim": 6, "hidden_activation": "gelu_pytorch_tanh"},
    ),
    "OPT": lambda: decoder(
        "OPTForCausalLM",
        "OPT",
        VOCABULARY
        | {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 12}
        | {"ffn_dim": 24, "word_embed_proj_dim": 12, "do_layer_norm_before": False},
    ),
    "BLOOM": lambda: decoder("BloomForCausalLM", "Bloom", VOCABULARY | {"hidden_size": 16, "n_layer": 1, "n_head": 4}),
    "XGLM": lambda: decoder(
        "XGLMForCausalLM",
        "XGLM",
        VOCABULARY
        | {"d_model": 16, "num_layers": 1, "attention_heads": 4, "ffn_dim": 24, "max_position_embeddings": 12},
    ),
}

ENCODERS: dict[str, Callable[[], Model]] = {
    "BERT": lambda: plain("BertForMaskedLM", "Bert", BERT, TOKENS),
    "RoBERTa": lambda: plain("RobertaForSequenceClassification", "Roberta", BERT | {"num_labels": 4}, TOKENS),
    "ALBERT": lambda: plain(
        "AlbertForMaskedLM", "Albert", BERT | {"num_hidden_layers": 2, "embedding_size": 12}, TOKENS
    ),
    "ELECTRA": lambda: plain("ElectraForMaskedLM", "Electra", BERT | {"embedding_size": 12}, TOKENS),
    "DistilBERT": lambda: plain(
        "DistilBertForMaskedLM",
        "DistilBert",
        VOCABULARY | {"dim": 16, "n_layers": 1, "n_heads": 4, "hidden_dim": 24, "max_position_embeddings": 12},
        TOKENS,
    ),
    "RoFormer": lambda: plain("RoFormerForMaskedLM", "RoFormer", BERT, TOKENS),
    "BigBird": lambda: plain(
        "BigBirdForMaskedLM",
        "BigBird",
        BERT
        | {"max_position_embeddings": 20}
        | {"attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1},
        LONG,
    ),
}

ENCODER_DECODERS: dict[str, Callable[[], Model]] = {
    "T5": lambda: encoder_decoder("T5ForConditionalGeneration", "T5", T5),
    "mT5": lambda: encoder_decoder(
        "MT5ForConditionalGeneration",
        "MT5",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        head="lm_head/kernel",
    ),
    "LongT5": lambda: encoder_decoder(
        "LongT5ForConditionalGeneration",
        "LongT5",
        T5 | {"local_radius": 2, "encoder_attention_type": "transient-global", "global_block_size": 2},
    ),
    "BART": lambda: encoder_decoder("BartForConditionalGeneration", "Bart", BART, **BIAS),
    "Pegasus": lambda: encoder_decoder("PegasusForConditionalGeneration", "Pegasus", BART, **BIAS),
    "Marian": lambda: encoder_decoder("MarianMTModel", "Marian", BART, **BIAS),
    "Blenderbot": lambda: encoder_decoder("BlenderbotForConditionalGeneration", "Blenderbot", BART, **BIAS),
    "Whisper": lambda: encoder_decoder(
        "WhisperForConditionalGeneration",
        "Whisper",
        BART | {"num_mel_bins": 6, "max_source_positions": 5, "max_target_positions": 8},
        MELS,
    ),
}

OTHERS: dict[str, Callable[[], Model]] = {
    "ViT": lambda: plain("ViTForImageClassification", "ViT", VIT, PIXELS, **PATCHES),
    "BEiT": lambda: plain(
        "BeitForImageClassification",
        "Beit",
        VIT | {"use_relative_position_bias": True},
        PIXELS,
        no_weights=("*_token",),
    ),
    "DINOv2": lambda: plain("Dinov2ForImageClassification", "Dinov2", VIT, PIXELS, **PATCHES),
    "CLIP": lambda: plain("CLIPModel", "CLIP", CLIP, TOKENS[:1], PIXELS),
    "RegNet": lambda: plain("RegNetForImageClassification", "RegNet", CONVOLUTIONS | {"groups_width": 4}, PIXELS),
    "ResNet": lambda: plain("ResNetForImageClassification", "ResNet", CONVOLUTIONS, PIXELS),
    "Wav2Vec2": lambda: plain(
        "Wav2Vec2ForCTC", "Wav2Vec2", WAV2VEC2, SOUND, no_weights=("*/weight_g",), axes={"*/weight_v": ((1, 2), (0,))}
    ),
}

MODELS = DECODERS | ENCODERS | ENCODER_DECODERS | OTHERS
