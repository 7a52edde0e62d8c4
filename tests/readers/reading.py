"""Files of models and adapters: how this library reads them, and what they hold by a reading that is not ours."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import tokenizers
from gguf import GGUFReader
from gguf.quants import dequantize

import rslora_jax as rslora
from rslora_jax.interop import load_model, load_peft, read_config
from rslora_jax.interop.adapter_folder import open_adapters
from rslora_jax.interop.decoder_config import read_decoder_config
from rslora_jax.interop.peft import open_peft
from rslora_jax.models.decoder import Decoder
from rslora_jax.sites import named_leaves
from rslora_jax.store import checkpoint
from rslora_jax.stored import dense
from tests.interop import bits
from tests.readers import files
from tests.readers.damages import (
    json_object,
)

# Models


def read_model(folder: Path) -> Any:
    found = load_model(folder, scan_layers=False)
    ids = found.tokenizer.encode(files.TEXT)
    return found, ids, found.tokenizer.stop_ids, _chat(found.tokenizer)


def _chat(tokenizer: Any) -> str | None:
    try:
        return tokenizer.chat([{"role": "user", "content": "hi"}])
    except ValueError as error:  # it speaks of a template, whatever file that is from
        assert len(str(error)) <= 300 and str(error).isprintable(), str(error)[:1000]
        return None


def _by_library(path: Path) -> dict[str, np.ndarray]:
    """Read a safetensors file by the format's own library."""
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16, "U8": "u1", "I8": "i1"}
    found = safetensors.deserialize(path.read_bytes())
    return {name: np.frombuffer(t["data"], kinds[t["dtype"]]).reshape(t["shape"]) for name, t in found}


def _weights(variables: Any) -> dict[str, np.ndarray]:
    """Name a model's weights as Hugging Face does, and lay them as there."""
    names = {"embed/embedding": "model.embed_tokens.weight", "norm/scale": "model.norm.weight"}
    names |= {"lm_head/kernel": "lm_head.weight"}
    found = {}
    for path, leaf in named_leaves(variables["params"]).items():
        name = names.get(path)
        if name is None:
            number, own = re.fullmatch(r"layers_(\d+)/(.*)", path).groups()
            own = own.replace("attn_norm/scale", "input_layernorm.weight")
            own = own.replace("mlp_norm/scale", "post_attention_layernorm.weight")
            own = own.replace("attn/", "self_attn.").replace("mlp/", "mlp.").replace("/kernel", ".weight")
            name = f"model.layers.{number}.{own}"
        array = np.asarray(dense(leaf))
        found[name] = array.T if path.endswith("kernel") else array
    return found


def check_model(folder: Path, found: Any) -> None:
    model, ids, stops, chat = found
    stored: dict[str, np.ndarray] = {}
    for path in folder.glob("*.safetensors"):
        stored |= _by_library(path)
    same(
        _weights(model.variables),
        bits.numbers(stored),
        may_be_left=lambda name: name == "lm_head.weight",
        is_packed=lambda name: f"{name}.absmax" in stored,
    )
    _check_figures(_json(folder / "config.json"), model.config)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    bare = backend.encode(files.TEXT, add_special_tokens=False).ids
    assert ids in (bare, [model.tokenizer.bos_id, *bare]), (ids, bare)
    eos = _json(folder / "generation_config.json").get("eos_token_id")
    wanted = {i for i in (eos if isinstance(eos, list) else [eos]) if type(i) is int and i >= 0}
    assert wanted <= set(stops), (wanted, stops)
    assert chat is None or isinstance(chat, str)


def _json(path: Path) -> Any:
    return json.loads(path.read_bytes().decode(), object_pairs_hook=once) if path.exists() else {}


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Readers take the first or the last of a key that is there twice: such a file holds nothing that is right."""
    found = dict(pairs)
    assert len(found) == len(pairs), "a key is there twice"
    return found


def _check_figures(said: dict[str, Any], config: Any) -> None:
    pairs = {"vocab_size": "vocab_size", "hidden_size": "width", "intermediate_size": "mlp_width"}
    pairs |= {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads", "head_dim": "head_dim"}
    pairs |= {"rms_norm_eps": "norm_eps", "max_position_embeddings": "max_len", "tie_word_embeddings": "tie_head"}
    for theirs, ours in pairs.items():
        if said.get(theirs) is not None:
            assert getattr(config, ours) == said[theirs], theirs
    rope = said.get("rope_parameters") or said.get("rope_scaling") or {}
    assert config.rope_base == rope.get("rope_theta", said.get("rope_theta", 10000.0))
    _check_finite(config)


def _check_finite(config: Any) -> None:
    for value in jax.tree.leaves(dataclasses.asdict(config)):
        assert not isinstance(value, float) or math.isfinite(value), config
    assert config.rope_base > 0 and config.norm_eps > 0, config


def same(
    ours: dict[str, np.ndarray],
    theirs: dict[str, np.ndarray],
    may_be_left: Any = lambda name: False,
    is_packed: Any = lambda name: False,
) -> None:
    assert set(ours) <= set(theirs) and all(map(may_be_left, set(theirs) - set(ours))), set(ours) ^ set(theirs)
    for name, array in ours.items():
        wanted = theirs[name].astype(np.float32)
        # Where a packed weight is not finite, a warning says so, and nothing says what it is.
        sound = np.isfinite(wanted) | (not is_packed(name))
        np.testing.assert_array_equal(_flushed(array)[sound], _flushed(wanted)[sound], err_msg=name)


def _flushed(array: np.ndarray) -> np.ndarray:
    """Return an array with zero in place of what is smaller than a normal number: so XLA multiplies on CPUs."""
    return np.where(np.abs(array) < np.finfo(np.float32).tiny, np.float32(0), array)


def read_config_alone(folder: Path) -> Any:
    from rslora_jax.interop.huggingface import read_model_config

    return read_model_config(folder)[1]


def check_config_alone(folder: Path, config: Any) -> None:
    said = _json(folder / "config.json")
    assert config.num_layers == said["num_hidden_layers"] and config.width == said["hidden_size"]
    _check_finite(config)


def other_family(folder: Path) -> None:
    folder.mkdir()
    said = files.MODEL | {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}
    said |= {"hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 4, "sliding_window": 8}
    said |= {"layer_types": ["sliding_attention", "full_attention"]}
    (folder / "config.json").write_text(json.dumps(said))


# GGUF


def make_gguf(folder: Path) -> None:
    folder.mkdir()
    (folder / "a.gguf").write_bytes(files.gguf(*files.gguf_parts()))


def read_gguf_model(folder: Path) -> Any:
    model = load_model(folder / "a.gguf", scan_layers=False)
    return model, model.tokenizer.encode("hi 12!"), model.tokenizer.stop_ids, _chat(model.tokenizer)


def check_gguf_model(folder: Path, found: Any) -> None:
    model, config = found[0], found[0].config
    reader = GGUFReader(folder / "a.gguf")
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert said["llama.embedding_length"] == config.width and said["llama.block_count"] == config.num_layers
    assert said.get("llama.rope.freq_base", 10000.0) == config.rope_base
    _check_finite(config)
    theirs, end = {}, 0
    for tensor in reader.tensors:  # the format's own readers ask for one after the other
        assert tensor.data_offset - reader.data_offset == end, tensor.name
        end += -(-int(tensor.n_bytes) // int(reader.alignment)) * int(reader.alignment)
        shape = tuple(reversed(tensor.shape.tolist()))
        theirs[tensor.name] = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    own = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    own |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    own |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {f"model.layers.0.{one}": f"blk.0.{other}" for one, other in own.items()}
    ours = {names[name.removesuffix(".weight")] + ".weight": w for name, w in _weights(model.variables).items()}
    for name in ("blk.0.attn_q.weight", "blk.0.attn_k.weight"):
        halves = ours[name].reshape(-1, 2, config.head_dim // 2, config.width)
        ours[name] = halves.swapaxes(1, 2).reshape(ours[name].shape)
    same(ours, theirs)


# Adapters


@functools.cache
def _base() -> tuple[Any, Any]:
    config = read_decoder_config(Path("config.json"), files.MODEL, scan_layers=True)
    model = Decoder(config)
    return model.apply, jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), "int32"))


_WRAPPED: dict[str, Any] = {}


def read_peft(folder: Path) -> Any:
    peft = open_peft(folder)
    apply, shapes = _base()
    config = read_config(peft, shapes)
    lora = _WRAPPED.setdefault(repr(config), None) or rslora.wrap(
        apply, shapes, jnp.zeros((1, 4), "int32"), config=config
    )
    _WRAPPED[repr(config)] = lora
    return lora, load_peft(peft, lora)


def check_peft(folder: Path, found: Any) -> None:
    """Compare what each module adds to its weight, by PEFT's own rules."""
    lora, loaded = found
    said = _json(folder / "adapter_config.json")
    tensors = {n.removeprefix("base_model.model."): t for n, t in _by_library(folder / files_of("adapter")).items()}
    whole = [path for path, site in lora.sites.items() if not site.scaled]
    for path, site in ((path, site) for path, site in lora.sites.items() if site.scaled):
        product = np.einsum("lir,lro->loi", *(loaded.adapters[path][n].astype("f8") for n in "ab"))
        delta = [site.of_layer(layer).gamma * product[layer] for layer in range(2)]
        for layer in range(2):
            own = path.replace("/kernel", "").rpartition("layers/")[2].replace("attn/", "self_attn.").replace("/", ".")
            module = f"model.layers.{layer}.{own}"
            if f"{module}.lora_A.weight" not in tensors:
                np.testing.assert_array_equal(delta[layer], 0)
                continue
            a, b = (tensors.pop(f"{module}.lora_{factor}.weight").astype("f8") for factor in "AB")
            rank = _of_pattern(said.get("rank_pattern"), module, said["r"])
            alpha = _of_pattern(said.get("alpha_pattern"), module, said["lora_alpha"])
            assert rank == len(a)
            gamma = alpha / (math.sqrt(rank) if said.get("use_rslora") else rank)
            np.testing.assert_allclose(delta[layer], gamma * b @ a, rtol=1e-5, atol=1e-6, err_msg=module)
    left = {n for n in tensors if n.removesuffix(".weight") not in ("lm_head", "model.embed_tokens")}
    assert len(left) == len(loaded.replaced) == 0 or loaded.replaced or whole, left
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tuple(loaded)))


def files_of(kind: str) -> str:
    """Name the file of the weights."""
    return "adapter_model.safetensors" if kind == "adapter" else "model.safetensors"


def _of_pattern(patterns: Any, module: str, default: Any) -> Any:
    return next((v for k, v in (patterns or {}).items() if re.match(rf"(.*\.)?({k})$", module)), default)


# What this library writes itself


def make_run(folder: Path) -> None:
    config = rslora.LoraConfig(rank=3, alpha=10)
    about = checkpoint.describe(config, {"w": np.ones((8, 5), "f4")}, {"model": "a", "learning_rate": 1e-3})
    with checkpoint.open_checkpoints(folder) as opened:
        checkpoint.save(opened, 3, _adapters(), {"step": np.zeros((), np.int32)}, about | {"data": {"batch": 3}}, 1.5)


def _adapters() -> Any:
    return {"w": {"a": np.arange(24, dtype="f4").reshape(8, 3), "b": np.ones((3, 5), "f4")}}


def read_run(folder: Path) -> Any:
    return open_adapters(folder)


def check_run(folder: Path, found: Any) -> None:
    assert found.config == rslora.LoraConfig(rank=3, alpha=10) and found.settings["learning_rate"] == 1e-3
    jax.tree.map(np.testing.assert_array_equal, found.adapters, _adapters())
    assert {path: text.split()[0] for path, text in found.base.items()} == {"w": "float32[8,5]"}


def resealed(rng: Any, data: bytes) -> bytes:
    """Damage what a checkpoint tells, and give it a checksum again, or the form of before there was one."""
    from rslora_jax.store.about import sealed

    changed = json_object("config", "base", "settings", "checksums", "keys", "data", "heldout_loss", "course")(
        rng, data
    )
    try:
        told = json.loads(changed)
        told.pop("checksum", None)
        return json.dumps(sealed(told) if rng.random() < 0.5 else {**told, "format": 0}).encode()
    except (ValueError, TypeError, RecursionError, AttributeError):
        return changed


def check_resealed(folder: Path, found: Any) -> None:
    """Somebody wrote what is told on purpose: the arrays are those of the file all the same."""
    jax.tree.map(np.testing.assert_array_equal, found.adapters, _adapters())
    assert isinstance(found.config, rslora.LoraConfig) and isinstance(found.settings, dict)
