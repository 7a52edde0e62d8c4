"""Flax models of the `transformers` library, small and with random weights: nobody here wrote them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers

TOKENS = np.array([[1, 5, 7, 2, 9, 4]])
START = np.array([[1, 3, 8]])


@dataclasses.dataclass(frozen=True)
class Model:
    """A model as a function, with what a correct discovery leaves out.

    Attributes:
      fn: from (parameters, *args) to an array.
      other: leaves of two or more axes that are no weight of a product, a convolution or a look-up.
      materialised: the weights that have no low-rank form, with the primitive.
    """

    fn: Callable[..., Any]
    params: Any
    args: tuple
    other: tuple[str, ...] = ()
    materialised: tuple[tuple[str, str], ...] = ()


def random_like(shapes: Any) -> Any:
    """Return random parameters of the given shapes; variances are positive."""
    rng = np.random.default_rng(0)

    def one(path: Any, leaf: Any) -> np.ndarray:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        value = rng.normal(size=leaf.shape).astype(np.float32)
        if name.endswith(("scale", "gamma", "weight_g")):
            return 1 + 0.1 * value
        if name.endswith("var"):
            return 1 + 0.1 * np.abs(value)
        fan_in = max(1, np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 100
        return (value / np.sqrt(fan_in)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, shapes)


def load(name: str, config: Any, **options: Any) -> tuple[Any, Any]:
    """Return a model and random parameters for it; its own initialisation would be compiled."""
    model = getattr(transformers, name)(config, _do_init=False, **options)
    return model, random_like(model.params_shape_tree)


def of_tokens(name: str, config: Any, **options: Any) -> Model:
    model, params = load(name, config)
    return Model(lambda p, tokens: model(input_ids=tokens, params=p)[0], params, (TOKENS,), **options)


def sequence_to_sequence(name: str, config: Any, **options: Any) -> Model:
    model, params = load(name, config)
    call = lambda p, tokens, start: model(input_ids=tokens, decoder_input_ids=start, params=p)[0]
    return Model(call, params, (TOKENS, START), **options)


def of_images(name: str, config: Any, size: int = 8, **options: Any) -> Model:
    model, params = load(name, config)
    images = np.random.default_rng(1).normal(size=(1, 3, size, size)).astype(np.float32)
    return Model(lambda p, images: model(pixel_values=images, params=p)[0], params, (images,), **options)


def clip() -> Model:
    text = {**ENCODER, "num_hidden_layers": 1, "eos_token_id": 4}
    vision = {**VISION, "num_hidden_layers": 1}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    model, params = load("FlaxCLIPModel", config)
    images = np.random.default_rng(1).normal(size=(1, 3, 8, 8)).astype(np.float32)
    call = lambda p, tokens, images: model(input_ids=tokens, pixel_values=images, params=p)
    both = lambda p, tokens, images: jnp.concatenate(
        [call(p, tokens, images).text_embeds, call(p, tokens, images).image_embeds]
    )
    return Model(both, params, (TOKENS, images))


def whisper() -> Model:
    sizes = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16}
    model, params = load("FlaxWhisperForConditionalGeneration", transformers.WhisperConfig(**PAIR, **sizes))
    sound = np.random.default_rng(1).normal(size=(1, 8, 20)).astype(np.float32)
    call = lambda p, sound, start: model(input_features=sound, decoder_input_ids=start, params=p)[0]
    return Model(call, params, (sound, START))


def wav2vec2() -> Model:
    config = transformers.Wav2Vec2Config(
        **{**ENCODER, "num_hidden_layers": 1},
        conv_dim=(8, 8),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
    )
    model, params = load("FlaxWav2Vec2ForCTC", config, input_shape=(1, 64))
    sound = np.random.default_rng(1).normal(size=(1, 200)).astype(np.float32)
    position = "wav2vec2/encoder/pos_conv_embed/conv"
    # Its weight normalisation divides by the norm of the adapted weight, which has no low-rank form.
    normed = ((f"{position}/weight_v", "mul"),)
    call = lambda p, sound: model(input_values=sound, params=p)[0]
    return Model(call, params, (sound,), (f"{position}/weight_g",), normed)


ENCODER = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
DECODER = {**ENCODER, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 4}
GPT = {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
PAIR = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "decoder_start_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TRANSLATE = {**PAIR, "max_position_embeddings": 16, "forced_eos_token_id": 2}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
VISION = {
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
ResNet = {"num_channels": 3, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
LOGITS_BIAS = ("final_logits_bias",)

T = transformers
MODELS: dict[str, Callable[[], Model]] = {
    "GPT-2": lambda: of_tokens("FlaxGPT2LMHeadModel", T.GPT2Config(**GPT)),
    "GPT-J": lambda: of_tokens("FlaxGPTJForCausalLM", T.GPTJConfig(**GPT, rotary_dim=4)),
    "GPT-Neo": lambda: of_tokens(
        "FlaxGPTNeoForCausalLM",
        T.GPTNeoConfig(
            vocab_size=40,
            max_position_embeddings=16,
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            window_size=4,
            attention_types=[[["global", "local"], 1]],
        ),
    ),
    "Llama": lambda: of_tokens("FlaxLlamaForCausalLM", T.LlamaConfig(**DECODER)),
    "Mistral": lambda: of_tokens("FlaxMistralForCausalLM", T.MistralConfig(**DECODER)),
    "Gemma": lambda: of_tokens("FlaxGemmaForCausalLM", T.GemmaConfig(**DECODER, head_dim=4)),
    "OPT": lambda: of_tokens(
        "FlaxOPTForCausalLM",
        T.OPTConfig(
            vocab_size=40,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            word_embed_proj_dim=12,
        ),
    ),
    "BLOOM": lambda: of_tokens(
        "FlaxBloomForCausalLM", T.BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2)
    ),
    "XGLM": lambda: of_tokens(
        "FlaxXGLMForCausalLM",
        T.XGLMConfig(
            vocab_size=40, d_model=16, ffn_dim=24, num_layers=2, attention_heads=2, max_position_embeddings=16
        ),
    ),
    "BERT": lambda: of_tokens("FlaxBertForMaskedLM", T.BertConfig(**ENCODER)),
    "RoBERTa": lambda: of_tokens("FlaxRobertaForMaskedLM", T.RobertaConfig(**ENCODER)),
    "ALBERT": lambda: of_tokens("FlaxAlbertForMaskedLM", T.AlbertConfig(**ENCODER, embedding_size=12)),
    "ELECTRA": lambda: of_tokens("FlaxElectraForMaskedLM", T.ElectraConfig(**ENCODER, embedding_size=12)),
    "DistilBERT": lambda: of_tokens(
        "FlaxDistilBertForMaskedLM",
        T.DistilBertConfig(vocab_size=40, dim=16, hidden_dim=24, n_layers=2, n_heads=2, max_position_embeddings=16),
    ),
    "RoFormer": lambda: of_tokens("FlaxRoFormerForMaskedLM", T.RoFormerConfig(**ENCODER, embedding_size=12)),
    "BigBird": lambda: of_tokens("FlaxBigBirdForMaskedLM", T.BigBirdConfig(**ENCODER, attention_type="original_full")),
    "T5": lambda: sequence_to_sequence("FlaxT5ForConditionalGeneration", T.T5Config(**T5, decoder_start_token_id=0)),
    "LongT5": lambda: sequence_to_sequence(
        "FlaxLongT5ForConditionalGeneration", T.LongT5Config(**T5, decoder_start_token_id=0, local_radius=3)
    ),
    "BART": lambda: sequence_to_sequence(
        "FlaxBartForConditionalGeneration", T.BartConfig(**TRANSLATE), other=LOGITS_BIAS
    ),
    "Pegasus": lambda: sequence_to_sequence(
        "FlaxPegasusForConditionalGeneration", T.PegasusConfig(**TRANSLATE), other=LOGITS_BIAS
    ),
    "Marian": lambda: sequence_to_sequence(
        "FlaxMarianMTModel", T.MarianConfig(**TRANSLATE, decoder_vocab_size=40), other=LOGITS_BIAS
    ),
    "Blenderbot": lambda: sequence_to_sequence(
        "FlaxBlenderbotForConditionalGeneration", T.BlenderbotConfig(**TRANSLATE), other=LOGITS_BIAS
    ),
    "ViT": lambda: of_images(
        "FlaxViTForImageClassification",
        T.ViTConfig(**VISION),
        other=("vit/embeddings/cls_token", "vit/embeddings/position_embeddings"),
    ),
    "BEiT": lambda: of_images(
        "FlaxBeitForImageClassification",
        T.BeitConfig(**VISION, out_indices=[1, 2]),
        other=("beit/embeddings/cls_token",),
    ),
    "DINOv2": lambda: of_images(
        "FlaxDinov2ForImageClassification",
        T.Dinov2Config(**VISION),
        other=tuple(f"dinov2/embeddings/{n}" for n in ("cls_token", "mask_token", "position_embeddings")),
    ),
    "ResNet": lambda: of_images(
        "FlaxResNetForImageClassification", T.ResNetConfig(**ResNet, layer_type="basic"), size=32
    ),
    "RegNet": lambda: of_images("FlaxRegNetForImageClassification", T.RegNetConfig(**ResNet, groups_width=4), size=32),
    "CLIP": clip,
    "Whisper": whisper,
    "wav2vec 2.0": wav2vec2,
}
