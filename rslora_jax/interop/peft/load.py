"""Read a PEFT adapter's weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rslora_jax.interop.decoder import DECODER
from rslora_jax.interop.names import Names, Place, shown
from rslora_jax.interop.peft.config import HEAD, adapted_modules, places_of_modules, tied_table
from rslora_jax.interop.peft.files import CONFIG_NAME, PREFIX, WEIGHTS_NAME, PeftFolder, as_opened
from rslora_jax.interop.peft.layout import (
    by_path,
    from_peft,
    is_table,
    peft_names,
    peft_shapes,
    refit,
    site_modules,
    sorted_layers,
    to_peft,
    weight_from_torch,
)
from rslora_jax.interop.peft.settings import PeftSettings, read_settings
from rslora_jax.pytrees import Params
from rslora_jax.sites import Site, named_leaves
from rslora_jax.wrap import Adapters, Lora


class Loaded(NamedTuple):
    """What `load_peft` reads: the adapters, and the weights that are to take the place of the base's, by path."""

    adapters: Adapters
    replaced: dict[str, np.ndarray]


def open_peft(folder: str | Path) -> PeftFolder:
    """Read a folder once; raise the errors of `read_config` and `load_peft` that need no model."""
    peft = as_opened(folder)
    read_settings(peft)
    _ = peft.tensors
    return peft


def load_peft(folder: str | Path | PeftFolder, lora: Lora, names: Names = DECODER.names) -> Loaded:
    """Read (adapters, replaced) from a PEFT adapter's folder.

    Where the rank and scale of a weight's site are the file's, as with the config from `read_config`, the numbers are
    the file's own. A smaller rank is filled up with zeros, exactly; where the scales differ, B is multiplied by their
    ratio, in float64, and rounded once. A layer of a scanned weight that the adapter leaves out gets zeros.

    Args:
      folder: as PEFT saves it, with adapter_model.safetensors; or what `open_peft` read of it.
      lora: the base with adapters, from `wrap`, best with the config that `read_config` gives.
      names: the Hugging Face names of the base's parameters, and which are stored transposed.

    Returns:
      adapters: numpy arrays of the config's dtype, for `lora.apply` and `lora.merge`.
      replaced: whole weights that the adapter brings (`modules_to_save`, and the token table or the head where PEFT
        saved them along), in the base's layout; `replace` puts them into the parameters. Mostly empty.

    Raises:
      ValueError: a file is damaged, or a tensor is unknown, missing or of the wrong shape; it is named.

    >>> import tempfile, rslora_jax as rslora
    >>> from rslora_jax.interop.peft import save_peft
    >>> params, names = {"w": jnp.ones((6, 4))}, {"w": "up.weight"}
    >>> lora = rslora.wrap(lambda p, x: x @ p["w"], params, jnp.ones((2, 6)), config=rslora.LoraConfig(rank=3))
    >>> adapters = lora.init(jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_peft(folder, lora, adapters, names, base_model="me/base")
    ...     back, replaced = load_peft(folder, lora, names)
    >>> bool((back["w"]["a"] == adapters["w"]["a"]).all()), replaced
    (True, {})
    """
    peft = as_opened(folder)
    settings, where = read_settings(peft), peft.folder / WEIGHTS_NAME
    for name in peft.tensors:
        if not name.startswith(PREFIX):
            raise ValueError(f"{where} holds {shown(name)}, which does not begin with {PREFIX} as PEFT's names do")
    left = {name.removeprefix(PREFIX): tensor for name, tensor in peft.tensors.items()}
    found, shapes, modules = site_modules(lora, names)
    table = tied_table(names, found)
    chosen = set(adapted_modules(peft, settings, places_of_modules(found, shapes), table))
    known = {module: place for of in modules.values() for place, module in of.items()}
    if extra := chosen - set(known):
        raise ValueError(f"{settings.where} adapts {min(extra)}, which this config does not: wrap with `read_config`'s")
    adapters: dict[str, Any] = {}
    for path, site in lora.sites.items():
        if not chosen & set(modules[path].values()):
            raise ValueError(f"{settings.where} does not adapt {path}, as this config does: wrap with `read_config`'s")
        layers = [_factors(settings, site, modules[path][n], chosen, left) for n in sorted_layers(modules[path])]
        adapters[path] = {
            name: np.asarray(np.stack(of) if site.stack_axes else of[0], jnp.dtype(lora.config.dtype))
            for name, of in ((name, [layer[name] for layer in layers]) for name in site.factors)
        }
    if table is not None and table in chosen:
        path = found[f"{table}.weight"].path
        _check_tied_head(settings, left, table, lora.sites[path], adapters[path], where)
    return Loaded(adapters, _replaced(settings, left, found, shapes, table, where))


def _take(settings: PeftSettings, left: dict[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Take a tensor out of those that are left."""
    where = settings.where.parent / WEIGHTS_NAME
    if name not in left:
        raise ValueError(f"{where} lacks {PREFIX}{name} of shape {shape}: save the adapter again")
    tensor = left.pop(name)
    if tensor.shape != shape:
        raise ValueError(
            f"{where}: {PREFIX}{name} has shape {tensor.shape}, where the model and {CONFIG_NAME} ask for {shape}"
        )
    return tensor


def _factors(
    settings: PeftSettings, site: Site, module: str, chosen: set[str], left: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Read one module's factors, with the site's rank and scale."""
    if module not in chosen:
        stack = len(site.stack_axes)
        return {name: np.zeros(shape[stack:], np.float32) for name, shape in site.factor_shapes.items()}
    rank, _ = settings.rank_and_alpha(module)
    if rank > site.rank:
        raise ValueError(f"{settings.where} has rank {rank} for {module}, and this config {site.rank}")
    names = peft_names(site)
    tensors = {
        name: _take(settings, left, f"{module}.{names[name]}", shape) for name, shape in peft_shapes(site, rank).items()
    }
    return refit(site, from_peft(site, tensors), site.rank, settings.gamma(module) / site.gamma)


def _check_tied_head(
    settings: PeftSettings,
    left: dict[str, np.ndarray],
    table: str,
    site: Site,
    factors: Mapping[str, np.ndarray],
    where: Path,
) -> None:
    """Take the head's own factors out of the file; they must be the table's, which they are to share."""
    head, names = HEAD.removesuffix(".weight"), peft_names(site)
    shared: Mapping[str, str] = site.method.peft_head  # type: ignore[attr-defined]
    found = {name: left.pop(f"{head}.{name}", None) for name in shared}
    if all(one is None for one in found.values()) and settings.tie:
        return
    if settings.gamma(head) == settings.gamma(table):
        own = {names[name]: tensor for name, tensor in to_peft(site, factors).items()}
        if all(one is not None and np.array_equal(one, own[shared[name]].T) for name, one in found.items()):
            return
    raise ValueError(
        f"{where} adapts {table} and {head} each in its own way, and they share one weight here: train the adapter "
        "with ensure_weight_tying"
    )


def _replaced(
    settings: PeftSettings,
    left: dict[str, np.ndarray],
    found: Mapping[str, Place],
    shapes: Mapping[str, tuple[int, ...]],
    table: str | None,
    where: Path,
) -> dict[str, np.ndarray]:
    """Read the whole weights that are left in the file."""
    weights: dict[str, np.ndarray] = {}
    tied: list[np.ndarray] = []
    for name, tensor in left.items():
        # PEFT calls the weight of an adapted table base_layer, and saves a table that was resized under its own name.
        plain = name.replace(".base_layer.", ".")
        module = plain.rpartition(".")[0]
        if plain == HEAD and table is not None:
            tied.append(tensor)
        elif plain in found and (
            plain != name or settings.saves(module) or plain == HEAD or is_table(found[plain].path)
        ):
            weights[plain] = tensor
        else:
            raise ValueError(f"{where} holds {shown(PREFIX + name)}, for which the model or {CONFIG_NAME} has no place")
    for tensor in tied:
        if not np.array_equal(weights.setdefault(f"{table}.weight", tensor), tensor):
            raise ValueError(f"{where} holds a head that is not the token table, and they share one weight here")
    for name in found:
        if settings.saves(name.rpartition(".")[0]) and name not in weights:
            raise ValueError(f"{where} lacks {PREFIX}{name}, which modules_to_save names: save the adapter again")
    return {
        path: _whole(path, layers, shapes[path], found, weights, where)
        for path, layers in by_path({name: found[name] for name in weights}).items()
    }


def _whole(
    path: str,
    layers: Mapping[int | None, str],
    shape: tuple[int, ...],
    found: Mapping[str, Place],
    weights: Mapping[str, np.ndarray],
    where: Path,
) -> np.ndarray:
    """Put one weight together, of one tensor or of one for each layer."""
    if None not in layers and len(layers) != shape[0]:
        raise ValueError(f"{where} replaces some layers of {path} alone: load a base whose layers are not stacked")
    parts = []
    for n in sorted_layers(layers):
        name = layers[n]
        part = weight_from_torch(found[name], found[name].one(shape), weights[name])
        if part is None:
            raise ValueError(
                f"{where}: {PREFIX}{name} has shape {weights[name].shape}, which does not fit {path} of shape "
                f"{found[name].one(shape)}"
            )
        parts.append(part)
    return parts[0] if None in layers else np.stack(parts)


def replace(params: Params, replaced: Mapping[str, Any]) -> Params:
    """Return the parameters with whole weights replaced, in the dtypes of `params`.

    >>> replace({"w": jnp.ones(2), "b": jnp.ones(2)}, {"w": np.zeros(2)})["w"].tolist()
    [0.0, 0.0]
    """
    leaves = named_leaves(params)
    if unknown := sorted(set(replaced) - set(leaves)):
        raise ValueError(f"the parameters have no {unknown[0]}")
    put = leaves | {path: jnp.asarray(weight, leaves[path].dtype) for path, weight in replaced.items()}
    return jax.tree.unflatten(jax.tree.structure(params), list(put.values()))
