"""Each kind of file: a valid one, how this library reads it, and what it holds by a reading that is not ours."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import tomllib
from collections.abc import Callable
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
from rslora_jax import cli
from rslora_jax.commands.prompts import read_prompts
from rslora_jax.interop import load_model, load_peft, read_config
from rslora_jax.interop.adapter_folder import open_adapters
from rslora_jax.interop.decoder_config import read_decoder_config
from rslora_jax.interop.peft import open_peft
from rslora_jax.models.decoder import Decoder
from rslora_jax.sites import named_leaves
from rslora_jax.store import checkpoint
from rslora_jax.stored import dense
from rslora_jax.train import read_examples
from tests.interop import bits, folders
from tests.readers import files
from tests.readers.damages import (
    Damage,
    array_file,
    blind,
    companions,
    gguf_parts_changed,
    json_lines,
    json_object,
    safetensors_header,
    within_safetensors,
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
      name: of the kind.
      make: writes a folder in which all is well.
      targets: a glob of the files in it that are damaged.
      read: reads the folder with this library.
      check: raises an AssertionError where what was read is not what the files hold.
      damages: what is done to a file.
    """

    name: str
    make: Callable[[Path], Any]
    targets: str
    read: Callable[[Path], Any]
    check: Callable[[Path, Any], Any]
    damages: tuple[Damage, ...]


# Models


def _read_model(folder: Path) -> Any:
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


def _check_model(folder: Path, found: Any) -> None:
    model, ids, stops, chat = found
    stored: dict[str, np.ndarray] = {}
    for path in folder.glob("*.safetensors"):
        stored |= _by_library(path)
    _same(_weights(model.variables), bits.numbers(stored), may_be_left=lambda name: name == "lm_head.weight")
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
    return json.loads(path.read_bytes().decode(), object_pairs_hook=_once) if path.exists() else {}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
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


def _same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], may_be_left: Any = lambda name: False) -> None:
    assert set(ours) <= set(theirs) and all(map(may_be_left, set(theirs) - set(ours))), set(ours) ^ set(theirs)
    for name, array in ours.items():
        wanted = theirs[name].astype(np.float32)
        sound = np.isfinite(wanted)  # where a packed weight is not, nothing is said of what it is but a warning
        np.testing.assert_array_equal(_flushed(array)[sound], _flushed(wanted)[sound], err_msg=name)


def _flushed(array: np.ndarray) -> np.ndarray:
    """Return an array with zero in place of what is smaller than a normal number: so XLA multiplies on CPUs."""
    return np.where(np.abs(array) < np.finfo(np.float32).tiny, np.float32(0), array)


def _read_config_alone(folder: Path) -> Any:
    from rslora_jax.interop.huggingface import read_model_config

    return read_model_config(folder)[1]


def _check_config_alone(folder: Path, config: Any) -> None:
    said = _json(folder / "config.json")
    assert config.num_layers == said["num_hidden_layers"] and config.width == said["hidden_size"]
    _check_finite(config)


def _other_family(folder: Path) -> None:
    folder.mkdir()
    said = files.MODEL | {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}
    said |= {"hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 4, "sliding_window": 8}
    said |= {"layer_types": ["sliding_attention", "full_attention"]}
    (folder / "config.json").write_text(json.dumps(said))


# GGUF


def _make_gguf(folder: Path) -> None:
    folder.mkdir()
    (folder / "a.gguf").write_bytes(files.gguf(*files.gguf_parts()))


def _read_gguf_model(folder: Path) -> Any:
    model = load_model(folder / "a.gguf", scan_layers=False)
    return model, model.tokenizer.encode("hi 12!"), model.tokenizer.stop_ids, _chat(model.tokenizer)


def _check_gguf_model(folder: Path, found: Any) -> None:
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
    _same(ours, theirs)


# Adapters


@functools.cache
def _base() -> tuple[Any, Any]:
    config = read_decoder_config(Path("config.json"), files.MODEL, scan_layers=True)
    model = Decoder(config)
    return model.apply, jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), "int32"))


_WRAPPED: dict[str, Any] = {}


def _read_peft(folder: Path) -> Any:
    peft = open_peft(folder)
    apply, shapes = _base()
    config = read_config(peft, shapes)
    lora = _WRAPPED.setdefault(repr(config), None) or rslora.wrap(
        apply, shapes, jnp.zeros((1, 4), "int32"), config=config
    )
    _WRAPPED[repr(config)] = lora
    return lora, load_peft(peft, lora)


def _check_peft(folder: Path, found: Any) -> None:
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


def _make_run(folder: Path) -> None:
    config = rslora.LoraConfig(rank=3, alpha=10)
    about = checkpoint.describe(config, {"w": np.ones((8, 5), "f4")}, {"model": "a", "learning_rate": 1e-3})
    with checkpoint.open_checkpoints(folder) as opened:
        checkpoint.save(opened, 3, _adapters(), {"step": np.zeros((), np.int32)}, about | {"data": {"batch": 3}}, 1.5)


def _adapters() -> Any:
    return {"w": {"a": np.arange(24, dtype="f4").reshape(8, 3), "b": np.ones((3, 5), "f4")}}


def _read_run(folder: Path) -> Any:
    return open_adapters(folder)


def _check_run(folder: Path, found: Any) -> None:
    assert found.config == rslora.LoraConfig(rank=3, alpha=10) and found.settings["learning_rate"] == 1e-3
    jax.tree.map(np.testing.assert_array_equal, found.adapters, _adapters())
    assert {path: text.split()[0] for path, text in found.base.items()} == {"w": "float32[8,5]"}


def _resealed(rng: Any, data: bytes) -> bytes:
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


def _check_resealed(folder: Path, found: Any) -> None:
    """Somebody wrote what is told on purpose: the arrays are those of the file all the same."""
    jax.tree.map(np.testing.assert_array_equal, found.adapters, _adapters())
    assert isinstance(found.config, rslora.LoraConfig) and isinstance(found.settings, dict)


# Data

_LINES = [
    {"prompt": "2 + 2 =", "completion": " 4", "id": 1},
    {"question": "Why?", "answer": "So."},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"text": "plain ü\u2028text"},
]


def _written(name: str, data: bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / name).write_bytes(data)

    return make


_JSONL = "".join(json.dumps(line) + "\n" for line in _LINES).encode()


def _make_parquet(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    folder.mkdir()
    keys = ("prompt", "completion", "messages", "text")
    rows = [{key: line.get(key) for key in keys} for line in _LINES if "answer" not in line]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")


def _of_record(record: dict[str, Any]) -> tuple[Any, str]:
    if record.get("messages") is not None:
        *before, last = [(turn["role"], turn["content"]) for turn in record["messages"]]
        return before, last[1]
    if record.get("question") is not None:
        return [("user", record["question"])], record["answer"]
    return ("", record["text"]) if record.get("text") is not None else (record["prompt"], record["completion"])


def _check_records(records: list[dict[str, Any]], found: Any) -> None:
    def plain(prompt: Any) -> Any:
        return prompt if isinstance(prompt, str) else [(turn.role, turn.content) for turn in prompt]

    assert [(plain(e.prompt), e.completion) for e in found] == [_of_record(record) for record in records]


def _check_jsonl(folder: Path, found: Any) -> None:
    lines = (folder / "a.jsonl").read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    _check_records([json.loads(line.decode(), object_pairs_hook=_once) for line in lines if line.strip()], found)


def _check_parquet(folder: Path, found: Any) -> None:
    from pyarrow import parquet

    _check_records(parquet.read_table(folder / "a.parquet").to_pylist(), found)


def _check_text(folder: Path, found: Any) -> None:
    text = (folder / "a.txt").read_bytes().decode().removeprefix("\ufeff")
    assert [(one.prompt, one.completion) for one in found] == [("", text)]


def _check_prompts(folder: Path, found: Any) -> None:
    lines = (folder / "p.jsonl").read_bytes().removeprefix(b"\xef\xbb\xbf").decode().split("\n")
    for line, prompt in zip([line for line in lines if line.strip()], found, strict=True):
        record = json.loads(line, object_pairs_hook=_once)
        value = next(record[key] for key in ("prompt", "question", "messages") if key in record)
        asked = value[:-1] if isinstance(value, list) and value[-1]["role"] == "assistant" else value
        assert prompt.prompt == (asked if isinstance(asked, str) else tuple(asked))


_TOML = b"""# settings
rank = 16
alpha = 8.0
"learning-rate" = 1e-3
targets = "all-linear"
steps = 30
optimizer = "adamw"
"""


def _read_toml(folder: Path) -> Any:
    return cli.parse(["train", "--config", str(folder / "a.toml")])[1]


def _check_toml(folder: Path, found: Any) -> None:
    said = tomllib.loads((folder / "a.toml").read_text(encoding="utf-8"))
    for name, value in said.items():
        assert getattr(found, name.lstrip("-").replace("-", "_")) == value, name


def _make_metrics(folder: Path) -> None:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": n, "loss": 1 / n}) + "\n" for n in range(1, 5)))


def _read_metrics(folder: Path) -> Any:
    from rslora_jax.train.metrics import read_metrics

    return read_metrics(folder / "metrics.jsonl", 3)


def _check_metrics(folder: Path, found: Any) -> None:
    lines = (folder / "metrics.jsonl").read_bytes().split(b"\n")
    for n, record in enumerate(found):
        assert any(_loads(line) == record for line in lines[n:]), record


def _loads(line: bytes) -> Any:
    try:
        return json.loads(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None


def _make_cache(folder: Path) -> None:
    folder.mkdir()
    arrays = {"ids_N": np.arange(7, dtype="i4"), "is_learnt_N": np.ones(7, bool)}
    np.savez(folder / "t.npz", **arrays, lengths_S=np.array([3, 4]), sequences_E=np.array([1, 1]))


def _read_cache(folder: Path) -> Any:
    from rslora_jax.train import cache

    tokens = cache.load(folder / "t.npz", 2)
    return tokens and [(one.ids_N, one.is_learnt_N) for group in tokens.by_example() for one in group]


def _check_cache(folder: Path, found: Any) -> None:
    assert found is None or [len(ids) for ids, _ in found] == [len(learnt) for _, learnt in found]


_CONFIG_KEYS = (
    *("rope_scaling", "rope_parameters", "layer_types", "sliding_window", "max_window_layers", "use_sliding_window"),
    *("quantization_config", "head_dim", "model_type", "num_hidden_layers", "rope_theta", "rms_norm_eps"),
    *("sliding_window_pattern", "rope_local_base_freq", "attn_logit_softcapping", "eos_token_id", "architectures"),
    *("num_key_value_heads", "vocab_size", "hidden_size", "attention_bias", "query_pre_attn_scalar"),
)
_TYPES = ("mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", math.inf, math.nan)
_ADAPTER_KEYS = (
    *("exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying", "use_dora", "rank_pattern"),
    *("modules_to_save", "alpha_pattern", "target_modules", "r", "lora_alpha", "init_lora_weights", "bias"),
)
_TOKENIZER_KEYS = (
    *("pad_token", "eos_token", "bos_token", "unk_token", "chat_template", "tokenizer_class", "add_bos_token"),
    *("added_tokens_decoder", "add_eos_token", "additional_special_tokens", "model_max_length"),
)
_TOKENIZER_ODD = (
    *("LlamaTokenizer", "</s>", "<pad>", {"2": {"content": "<pad>"}}, {"²": {"content": "a"}}, {"9" * 5000: {}}),
    *({"99": {"content": "new"}}, {"2": {"content": 5}}, [{"name": "default", "template": "{{ messages }}"}]),
    *([{"name": ["a"], "template": 3}], {"content": "<new>", "lstrip": "yes"}, "<one more>"),
)


def _both(*more: Damage) -> tuple[Damage, ...]:
    return (blind, *more)


_MODEL = functools.partial(Kind, make=files.model, read=_read_model, check=_check_model)
_SHARDS = functools.partial(Kind, make=functools.partial(files.model, shards=2), read=_read_model, check=_check_model)
_FEW = functools.partial(Kind, make=files.model_in_few_bits, read=_read_model, check=_check_model)
_STATE = within_safetensors("quant_state", json_object("nested_offset", "shape", "blocksize", "nested_blocksize"))
_BITS = _both(safetensors_header, _STATE, _STATE, companions, companions, companions)
_PEFT = functools.partial(Kind, make=files.adapter, read=_read_peft, check=_check_peft)
_DATA = functools.partial(Kind, read=lambda folder: read_examples(next(folder.glob("a.*"))))
_CONFIG = json_object(*_CONFIG_KEYS, values=_TYPES)

KINDS: tuple[Kind, ...] = (
    _MODEL("config.json", targets="config.json", damages=_both(_CONFIG, _CONFIG)),
    Kind("config.json alone", _other_family, "config.json", _read_config_alone, _check_config_alone, (_CONFIG,)),
    _MODEL("generation_config.json", targets="generation_config.json", damages=_both(json_object("eos_token_id"))),
    _MODEL("tokenizer.json", targets="tokenizer.json", damages=_both(json_object())),
    _MODEL(
        "tokenizer_config.json",
        targets="tokenizer_config.json",
        damages=_both(*[json_object(*_TOKENIZER_KEYS, values=_TOKENIZER_ODD)] * 2),
    ),
    _MODEL(
        "special_tokens_map.json",
        targets="special_tokens_map.json",
        damages=_both(json_object(*_TOKENIZER_KEYS, values=_TOKENIZER_ODD)),
    ),
    _MODEL("chat template", targets="chat_template.jinja", damages=(blind,)),
    _MODEL("safetensors", targets="model.safetensors", damages=_both(*[safetensors_header] * 3)),
    _FEW("bitsandbytes", targets="model.safetensors", damages=_BITS),
    _FEW("bitsandbytes' config.json", targets="config.json", damages=_both(_CONFIG, _CONFIG)),
    _SHARDS("index", targets="model.safetensors.index.json", damages=_both(json_object("weight_map"))),
    _SHARDS("shard", targets="model-00001-of-00002.safetensors", damages=_both(safetensors_header)),
    Kind("GGUF", _make_gguf, "a.gguf", _read_gguf_model, _check_gguf_model, _both(*[gguf_parts_changed] * 4)),
    _PEFT("adapter_config.json", targets="adapter_config.json", damages=_both(*[json_object(*_ADAPTER_KEYS)] * 3)),
    _PEFT("adapter weights", targets="adapter_model.safetensors", damages=_both(*[safetensors_header] * 3)),
    Kind("checkpoint", _make_run, "checkpoints/3/**/*", _read_run, _check_run, (blind,)),
    Kind("about", _make_run, "checkpoints/3/about/metadata", _read_run, _check_run, _both(json_object())),
    Kind("about, sealed", _make_run, "checkpoints/3/about/metadata", _read_run, _check_resealed, (_resealed,)),
    _DATA("JSONL", make=_written("a.jsonl", _JSONL), targets="a.jsonl", check=_check_jsonl, damages=_both(json_lines)),
    _DATA("Parquet", make=_make_parquet, targets="a.parquet", check=_check_parquet, damages=(blind,)),
    _DATA("text", make=_written("a.txt", _JSONL), targets="a.txt", check=_check_text, damages=(blind,)),
    Kind(
        "prompts",
        _written("p.jsonl", _JSONL.splitlines()[0] + b"\n" + b"\n".join(_JSONL.splitlines()[1:3])),
        "p.jsonl",
        lambda folder: read_prompts(str(folder / "p.jsonl")),
        _check_prompts,
        _both(json_lines),
    ),
    Kind("TOML", _written("a.toml", _TOML), "a.toml", _read_toml, _check_toml, (blind,)),
    Kind("metrics", _make_metrics, "metrics.jsonl", _read_metrics, _check_metrics, _both(json_lines)),
    Kind("token cache", _make_cache, "t.npz", _read_cache, _check_cache, _both(array_file)),
)
_ = folders
