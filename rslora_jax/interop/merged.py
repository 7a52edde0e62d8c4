"""Write a model with its adapters added in, as the folder that Hugging Face's tools load."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from rslora_jax.interop.names import LLAMA, Names, Place, places
from rslora_jax.interop.new_folder import written_whole
from rslora_jax.interop.safetensors import DTYPES, write_shards
from rslora_jax.interop.tokenizer import Tokenizer
from rslora_jax.models.decoder import DecoderConfig
from rslora_jax.sites import Site, named_leaves
from rslora_jax.table import shared_name
from rslora_jax.wrap import Adapters, Lora

# What a Hugging Face folder holds beside its weights and config.json, and what is copied as it is.
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclasses.dataclass(frozen=True)
class Rounding:
    """What rounding did to one adapted matrix, or to several: Frobenius norms, in float64.

    Attributes:
      name: the Hugging Face name, or what several names share.
      count: how many matrices.
      error: ||merged - exact||, where exact = W + gamma A B and W is the base as the adapters were trained on it.
      update: ||gamma A B||.
      weight: ||W||.

    >>> Rounding("w", 1, error=0.5, update=2.0, weight=4.0).relative
    0.25
    """

    name: str
    count: int
    error: float
    update: float
    weight: float

    @property
    def relative(self) -> float:
        """||merged - exact|| / ||update||; NaN where there is no update."""
        return self.error / self.update if self.update else math.nan


def write_merged(
    folder: str | Path,
    lora: Lora,
    variables: Any,
    adapters: Adapters,
    *,
    config: DecoderConfig,
    tokenizer: Tokenizer,
    dtype: str = "bfloat16",
    names: Names = LLAMA,
    base: str | Path | None = None,
    max_shard_size: int = 5_000_000_000,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> list[Rounding]:
    """Write W + gamma A B for every adapted weight, and all other weights, as a Hugging Face folder.

    One tensor is made at a time: its sum is formed in float64 and rounded once to `dtype`. The folder is written whole
    or not at all.

    Args:
      folder: where to write; it must be new or empty.
      lora: from `wrap`, on the model of `config`.
      variables: the base, in the dtype in which it was trained on.
      adapters: the adapters, in any layout that `lora` takes.
      config, tokenizer: the model's own, from `load_model`.
      dtype: "bfloat16", "float16" or "float32".
      names: the Hugging Face name of every weight.
      base: the Hugging Face folder that the base was loaded from, if it was: its config.json, with only the dtype
        changed, its generation_config.json and the files of its tokenizer are taken in place of ones made here.
      max_shard_size: bytes in a file of weights.
      progress: told the number of tensors done and their number in all.

    Returns:
      What rounding did to each adapted matrix, in the order of the base.

    Raises:
      ValueError: a weight is not finite or overflows `dtype` (it is named), the adapters do not fit, a weight has no
        Hugging Face name, or the folder is not free.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known: use {', '.join(DTYPES)}")
    base = None if base is None else Path(base)
    lora.check(variables, adapters)
    leaves = named_leaves(variables)
    found = places(names, {path: tuple(leaf.shape) for path, leaf in leaves.items()})
    shapes = {name: _shape(leaves[place.path].shape, place) for name, place in found.items()}
    roundings: list[Rounding] = []
    done = 0

    def make(name: str) -> np.ndarray:
        nonlocal done
        place = found[name]
        leaf = leaves[place.path]
        weight = np.asarray(leaf if place.layer is None else leaf[place.layer])
        if place.path in lora.sites:
            merged, rounding = merge_one(name, weight, lora.sites[place.path], adapters[place.path], place.layer, dtype)
            roundings.append(rounding)
        else:
            merged = rounded(name, weight, dtype)
        done += 1
        progress(done, len(found))
        return merged.T if _turned(place, weight.ndim) else merged

    with written_whole(folder) as draft:
        progress(0, len(found))
        write_shards(draft, shapes, dtype, make, most=max_shard_size)
        for file, content in _files(config, tokenizer, dtype, base).items():
            (draft / file).write_text(content, encoding="utf-8")
        for file in _COPIED:
            if base is not None and (base / file).is_file():
                shutil.copyfile(base / file, draft / file)
    return roundings


def merge_one(
    name: str, weight: np.ndarray, site: Site, factors: Mapping[str, Any], layer: int | None, dtype: str
) -> tuple[np.ndarray, Rounding]:
    """Return W + gamma A B in `dtype`, in the layout of W, and what rounding did to it.

    Args:
      name: what an error calls it.
      weight: the weight; that of one layer where `layer` is a number.
      site, factors: the adapter of the whole weight.
      layer: the place on the weight's first axis, where layers are stacked there.
      dtype: what to round to.

    >>> site = Site("w", (2, 2), (0,), (1,), (), "linear", rank=1, alpha=1.0, gamma=1.0)
    >>> factors = {"a": np.ones((2, 1)), "b": np.full((1, 2), 2.0**-9)}
    >>> merged, rounding = merge_one("w", np.ones((2, 2)), site, factors, None, "bfloat16")
    >>> float(merged[0, 0]), rounding.relative  # next to 1 there is 1 + 2^-7: nothing is left of the update
    (1.0, 1.0)
    """
    update = update_of(site, factors, layer)
    sizes = float(np.linalg.norm(update)), float(np.linalg.norm(weight.astype(np.float64)))
    exact = np.add(update, weight.astype(np.float64), out=update)
    merged = rounded(name, exact, dtype)
    error = float(np.linalg.norm(np.subtract(exact, merged.astype(np.float64), out=exact)))
    return merged, Rounding(name, 1, error, *sizes)


def update_of(site: Site, factors: Mapping[str, Any], layer: int | None = None) -> np.ndarray:
    """Return gamma A B in float64 in the layout of the weight, or of one element of its first axis."""
    a, b = factors["a"], factors["b"]
    stack, drop = site.stack_axes, 0
    if layer is not None:
        if stack[:1] != (0,):
            raise ValueError(f"{site.path} holds layers on its first axis, but its adapter is one for all of them")
        a, b, stack, drop = a[layer], b[layer], stack[1:], 1
    sizes = site.sizes(stack)
    a = np.asarray(a).astype(np.float64).reshape(*sizes, site.in_size, site.rank)
    b = np.asarray(b).astype(np.float64).reshape(*sizes, site.rank, site.out_size)
    product = a @ (site.gamma * b)
    order = (*stack, *site.in_axes, *site.out_axes)
    return product.reshape(site.sizes(order)).transpose(np.argsort([axis - drop for axis in order]))


def rounded(name: str, weight: np.ndarray, dtype: str) -> np.ndarray:
    """Round to a dtype.

    Raises:
      ValueError: a number is not finite, before or after.
    """
    with np.errstate(over="ignore"):
        cast = weight.astype(jnp.dtype(dtype))
    if np.isfinite(cast).all():
        return cast
    wide = weight.astype(np.float64)
    if not np.isfinite(wide).all():
        raise ValueError(f"{name} holds numbers that are not finite: the base or the adapters are broken")
    raise ValueError(
        f"{name} overflows {dtype}: its largest number is {np.abs(wide).max():.3g}; merge in bfloat16 or float32"
    )


def by_kind(roundings: Iterable[Rounding]) -> list[Rounding]:
    """Put together the layers of each kind of weight.

    >>> layers = [Rounding(f"layers.{n}.w", 1, error=3.0 + n, update=10.0, weight=1.0) for n in range(2)]
    >>> [(kind.name, kind.count, kind.error) for kind in by_kind(layers)]
    [('layers.{0..1}.w', 2, 5.0)]
    """
    kinds: dict[str, list[Rounding]] = {}
    for rounding in roundings:
        kinds.setdefault(re.sub(r"\d+", "*", rounding.name), []).append(rounding)
    return [together(shared_name([one.name for one in group]), group) for group in kinds.values()]


def together(name: str, roundings: Iterable[Rounding]) -> Rounding:
    """Put roundings together as if their matrices were one."""
    group = list(roundings)
    norm = lambda field: math.hypot(*(getattr(one, field) for one in group))
    return Rounding(name, sum(one.count for one in group), norm("error"), norm("update"), norm("weight"))


def meaning(total: Rounding, dtype: str) -> str:
    """Say in a sentence what the rounding of all matrices together means.

    >>> meaning(Rounding("all", 3, error=0.1, update=1.0, weight=9.0), "float16")
    'rounding to float16 moves the merged weights by 0.1 of the update'
    """
    if not total.update:
        return "the update is zero: the merged model is the base"
    said = f"rounding to {dtype} moves the merged weights by {total.relative:.2g} of the update"
    if total.relative <= 0.5:
        return said
    wider = "" if dtype == "float32" else ", or merge in " + ("float16 or " if dtype == "bfloat16" else "") + "float32"
    return f"{said}: most of what was learned may be rounded away; keep the adapters apart from the base{wider}"


def _shape(shape: tuple[int, ...], place: Place) -> tuple[int, ...]:
    shape = tuple(shape) if place.layer is None else tuple(shape[1:])
    return shape[::-1] if _turned(place, len(shape)) else shape


def _turned(place: Place, ndim: int) -> bool:
    """Say whether a weight is stored the other way round: kernels are (in, out) in Flax, (out, in) in torch."""
    return ndim == 2 and place.path.rsplit("/", 1)[-1] == "kernel"


def _files(config: DecoderConfig, tokenizer: Tokenizer, dtype: str, base: Path | None) -> dict[str, str]:
    """Return the text of the files beside the weights that are not copied, by name."""
    if base is not None:
        return {"config.json": _json(_with_dtype(json.loads((base / "config.json").read_text("utf-8")), dtype))}
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    ids = {name: number for name, number in ids.items() if number is not None}
    return {
        "config.json": _json(llama_config(config, dtype) | {"bos_token_id": None} | ids),
        "generation_config.json": _json(ids),
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": _json(tokenizer_config(tokenizer, config.max_len)),
    }


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    # transformers 5 writes "dtype", and reads both.
    fields = [name for name in ("torch_dtype", "dtype") if name in config] or ["torch_dtype"]
    return config | dict.fromkeys(fields, dtype)


def llama_config(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """Return the config.json of a model, without the ids of its special tokens.

    Raises:
      ValueError: the model has what this does not write.
    """
    c = config
    here = {"param_dtype", "dtype", "remat", "scan_layers"}  # how it is run and held, not what it computes
    written = {
        "vocab_size": "vocab_size",
        "width": "hidden_size",
        "mlp_width": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "max_len": "max_position_embeddings",
        "norm_eps": "rms_norm_eps",
        "rope_base": "rope_theta",
        "tie_head": "tie_word_embeddings",
    }
    for field in dataclasses.fields(c):
        if field.name not in {*here, *written} and getattr(c, field.name) != field.default:
            raise ValueError(
                f"{field.name}={getattr(c, field.name)!r} cannot be written in a config.json here: load the base "
                "from a Hugging Face folder, whose own is then taken"
            )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(c, ours) for ours, theirs in written.items()},
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype,
    }


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """Return the tokenizer as Hugging Face's `tokenizer.json`, which puts in front what `Tokenizer.encode` does."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import processors

    backend = Backend.from_str(tokenizer.backend.to_str())
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        bos = backend.id_to_token(tokenizer.bos_id)
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, tokenizer.bos_id)]
        )
    return backend.to_str(pretty=True)


def tokenizer_config(tokenizer: Tokenizer, max_len: int) -> dict[str, Any]:
    """Return the `tokenizer_config.json` to it."""
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    found = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokenizer.backend.id_to_token(number) for name, number in ids.items() if number is not None},
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_len,
        "model_input_names": ["input_ids", "attention_mask"],  # by default there is one that Llama refuses
    }
    return found if tokenizer.chat_template is None else found | {"chat_template": tokenizer.chat_template}
