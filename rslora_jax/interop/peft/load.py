"""Read a PEFT adapter's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rslora_jax.config import split_use
from rslora_jax.interop.decoder import DECODER
from rslora_jax.interop.names import Names
from rslora_jax.interop.peft.config import adapted_modules
from rslora_jax.interop.peft.files import CONFIG_NAME, PREFIX, WEIGHTS_NAME, PeftFolder, as_opened
from rslora_jax.interop.peft.layout import (
    by_layer,
    from_peft,
    peft_names,
    peft_shapes,
    refit,
    shared_with_head,
    site_modules,
    to_peft,
)
from rslora_jax.interop.peft.replaced import replaced_weights, split_layer
from rslora_jax.interop.peft.rows import take_rows
from rslora_jax.interop.peft.settings import PeftSettings, read_settings
from rslora_jax.pytrees import Params
from rslora_jax.shown import quoted, shown
from rslora_jax.sites import Site, named_leaves
from rslora_jax.wrap import Adapters, Lora

# What is kept for the backward pass alone: VeLoRA's.
_TRAINING = ".lora_velora_embed"


class Loaded(NamedTuple):
    """What `load_peft` reads: the adapters, and the weights that are to take the place of the base's, by path.

    What PEFT trains whole is among the adapters where the config has it (`LoraConfig.trained`), as `read_config`'s has.
    """

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

    Where the rank and scale of a weight's site, or of its layer, are the file's, as with the config from `read_config`,
    the numbers are the file's own. A smaller rank is filled up with zeros, exactly; where the scales differ, B is
    multiplied by their ratio, in float64, and rounded once. A layer that the adapter leaves out gets zeros.

    Args:
      folder: as PEFT saves it, with adapter_model.safetensors; or what `open_peft` read of it.
      lora: the base with adapters, from `wrap`, best with the config that `read_config` gives.
      names: the Hugging Face names of the base's parameters, and which are stored transposed.

    Returns:
      adapters: numpy arrays of the config's dtype, for `lora.apply` and `lora.merge`.
      replaced: other whole weights that the adapter brings, in the base's layout: the token table or the head where
        PEFT saved them along, and of `modules_to_save` what is a part of a parameter here. `replace` puts them into the
        parameters. Mostly empty. What replaces one use of a table that is the head too is at "path@lookup" or
        "path@product", and what replaces one layer of a stack at "path@2".

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
    left = {name.removeprefix(PREFIX): tensor for name, tensor in peft.tensors.items() if not name.endswith(_TRAINING)}
    places, modules = site_modules(lora, names)
    chosen = set(adapted_modules(peft, settings, places))
    known = {module for of in modules.values() for module in of}
    if extra := chosen - known:
        raise ValueError(f"{settings.where} adapts {min(extra)}, which this config does not: wrap with `read_config`'s")
    adapters: dict[str, Any] = {}
    for path in modules:
        site, own = lora.sites[path], by_layer(modules[path])
        shared = site.tied and not site.use  # one adapter for a table and its head
        if not chosen & {*own} or (shared and not chosen >= {*own}):
            raise ValueError(f"{settings.where} does not adapt {path}, as this config does: wrap with `read_config`'s")
        wanted = own[:1] if shared else own
        read = {
            modules[path][name]: _factors(settings, site, name, modules[path][name], left)
            for name in wanted
            if name in chosen
        }
        adapters[path] = _stacked(settings, site, read, jnp.dtype(lora.config.dtype))
        if shared:
            _check_tied_head(settings, left, own, site, adapters[path], where)
    dtype = jnp.dtype(lora.config.dtype)
    rows = take_rows(lora, left, places, settings)
    adapters |= {path: {name: np.asarray(array, dtype) for name, array in own.items()} for path, own in rows.items()}
    replaced = replaced_weights(settings, left, places, chosen, lora.tied, where)
    for path in (path for path, site in lora.sites.items() if site.kind == "trained"):
        if path not in replaced:
            raise ValueError(_not_trained(settings, path, replaced))
        adapters[path] = {"value": np.asarray(replaced.pop(path), dtype)}
    return Loaded({path: adapters[path] for path in lora.sites}, replaced)


def _not_trained(settings: PeftSettings, path: str, replaced: Mapping[str, Any]) -> str:
    """Say why an adapter does not train what a config trains whole."""
    if use := next((split_use(one)[1] for one in replaced if split_use(one)[0] == path), ""):
        return (
            f"{settings.where} brings another weight for the {use} of {path} alone: give the model a head of its own, "
            "with weights of its own"
        )
    return f"{settings.where} does not train {path}, as this config does: wrap with `read_config`'s"


def _take(settings: PeftSettings, left: dict[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Take a tensor out of those that are left."""
    where = settings.where.parent / WEIGHTS_NAME
    if name not in left:
        raise ValueError(f"{where} lacks {PREFIX}{name} of shape {shape}: save the adapter again")
    tensor = left.pop(name)
    if tensor.shape != shape:
        raise ValueError(
            f"{where}: {PREFIX}{name} has shape {quoted(tensor.shape)}, where the model and {CONFIG_NAME} ask for "
            f"{shape}"
        )
    return tensor


def _stacked(
    settings: PeftSettings, site: Site, read: Mapping[int | None, Mapping[str, np.ndarray]], dtype: Any
) -> dict[str, np.ndarray]:
    """Put the arrays of layers together, with zeros for one that has no adapter; a ValueError where that is no zero."""
    if not site.stack_axes:
        return {name: np.asarray(array, dtype) for name, array in read[None].items()}
    count = site.shape[0]
    if len(read) < count and not site.layers and site.method.needs_base:
        raise ValueError(
            f"{settings.where} adapts some layers of {site.path} alone, and a layer without an adapter has none of "
            f"{type(site.method).__name__}: wrap with `read_config`'s"
        )
    empty = {name: np.zeros(shape[len(site.stack_axes) :], dtype) for name, shape in site.factor_shapes.items()}
    return {name: np.stack([read.get(n, empty)[name] for n in range(count)]).astype(dtype) for name in site.factors}


def _factors(
    settings: PeftSettings, site: Site, module: str, layer: int | None, left: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Read one module's factors, with the rank of the site's arrays, and the site's scale or its layer's."""
    rank, _ = settings.rank_and_alpha(module)
    own = site if layer is None else site.of_layer(layer)
    if rank > own.rank:
        raise ValueError(f"{settings.where} has rank {rank} for {module}, and this config {own.rank}")
    names = peft_names(site)
    tensors = {
        name: _take(settings, left, f"{module}.{names[name]}", shape) for name, shape in peft_shapes(site, rank).items()
    }
    return refit(site, from_peft(site, tensors), site.rank, settings.gamma(module) / own.gamma)


def _check_tied_head(
    settings: PeftSettings,
    left: dict[str, np.ndarray],
    own: Sequence[str],
    site: Site,
    factors: Mapping[str, np.ndarray],
    where: Path,
) -> None:
    """Take the head's own factors out of the file; they must be the table's, which they are to share."""
    (table, head), names = own, peft_names(site)
    shared: Mapping[str, str] = shared_with_head(site)
    found = {name: left.pop(f"{head}.{name}", None) for name in shared}
    if all(one is None for one in found.values()) and settings.tie:
        return
    if settings.gamma(head) == settings.gamma(table):
        mine = {names[name]: tensor for name, tensor in to_peft(site, factors).items()}
        if all(one is not None and np.array_equal(one, mine[shared[name]].T) for name, one in found.items()):
            return
    raise ValueError(
        f"{where} adapts {table} and {head} each in its own way, and this config both in one: wrap with `read_config`'s"
    )


def replace(params: Params, replaced: Mapping[str, Any]) -> Params:
    """Return the parameters with whole weights replaced, or layers of stacked ones, in the dtypes of `params`.

    Raises:
      ValueError: a weight is none of the parameters, or one use of it alone is replaced; or a square one is nearer to
        the base turned round than as it came, so that the table of names is wrong.

    >>> replace({"w": jnp.ones(2), "b": jnp.ones(2)}, {"w": np.zeros(2)})["w"].tolist()
    [0.0, 0.0]
    >>> replace({"w": jnp.ones((3, 1))}, {"w@1": np.zeros(1)})["w"].tolist()
    [[1.0], [0.0], [1.0]]
    """
    leaves = named_leaves(params)
    for path, weight in replaced.items():
        whole, layer = split_layer(path)
        if whole not in leaves:
            raise ValueError(_no_parameter(path, leaves))
        was = leaves[whole]
        check_way_round(path, np.asarray(weight), was if layer is None else was[layer])
        now = jnp.asarray(weight, was.dtype)
        leaves[whole] = now if layer is None else jnp.asarray(was).at[layer].set(now)
    return jax.tree.unflatten(jax.tree.structure(params), list(leaves.values()))


def _no_parameter(path: str, leaves: Mapping[str, Any]) -> str:
    """Say what is wrong with a path at which nothing can be replaced."""
    whole, use = split_use(path)
    if whole in leaves:
        return (
            f"the adapter brings another weight for the {use} of {whole} alone: give the model a head of its own, with "
            "weights of its own"
        )
    return f"the parameters have no {path}"


def check_way_round(path: str, weight: np.ndarray, base: Any) -> None:
    """Refuse a square matrix of which only its transpose is a change of the base's: shapes cannot tell."""
    if weight.ndim < 2 or weight.shape[-1] != weight.shape[-2] or not isinstance(base, (jax.Array, np.ndarray)):
        return
    was, now = np.asarray(base, np.float32), weight.astype(np.float32)
    kept, turned = (np.linalg.norm(one - was) for one in (now, np.swapaxes(now, -1, -2)))
    if turned < 0.5 * kept:
        raise ValueError(
            f"{path} comes with its axes the other way round than the base's, as those of a Conv1D of transformers do "
            "where the table of names takes them for a linear layer's: give Weight(name, transposed=...) there"
        )
