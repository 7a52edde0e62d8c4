"""What a PEFT adapter's configuration means for a model: which of its weights it adapts, of which rank and scale."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rslora_jax.config import LoraConfig, literal, split_use
from rslora_jax.interop.decoder import DECODER
from rslora_jax.interop.hub import with_revision
from rslora_jax.interop.names import Names, Place
from rslora_jax.interop.peft.files import WEIGHTS_NAME, PeftFolder, adapted_in, as_opened, tables_in
from rslora_jax.interop.peft.replaced import trained_paths
from rslora_jax.interop.peft.rows import trained_rows
from rslora_jax.interop.peft.settings import PeftSettings, read_settings
from rslora_jax.interop.peft.tied import Places, places_of_uses, ties
from rslora_jax.layers import pattern_of_layer
from rslora_jax.pytrees import Params
from rslora_jax.shown import quoted
from rslora_jax.transform.uses import LOOKUP
from rslora_jax.wrap import array_leaves


def base_of(folder: str | Path | PeftFolder) -> str | None:
    """Return what an adapter's configuration calls its base: a folder or a name on the hub; None where it does not.

    A name has the revision behind it that the configuration says, as owner/name@revision.
    """
    fields = as_opened(folder).fields
    name, revision = fields.get("base_model_name_or_path"), fields.get("revision")
    if not isinstance(name, str) or not name:
        return None
    return with_revision(name, revision if isinstance(revision, str) else None)


def places_of_modules(found: Mapping[str, Place], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """Return the places of modules that could have adapters, by their Hugging Face names: matrices and kernels."""
    matrices = {n: p for n, p in found.items() if len(shapes[p.path]) - (p.layer is not None) >= 2}
    return {n.removesuffix(".weight"): place for n, place in matrices.items() if n.endswith(".weight")}


def adapted_modules(peft: PeftFolder, settings: PeftSettings, places: Places) -> dict[str, str]:
    """Return the modules that an adapter adapts, of those that the model has, each with what it adapts here.

    That is the path of a weight; or "path@lookup" or "path@product" where PEFT's module is one use of it: its layers of
    a table that is the head too, and any embedding, of which the program tells whether it has another use.

    Raises:
      ValueError: there is none.
    """
    there = settings.all_linear or (peft.folder / WEIGHTS_NAME).is_file()  # a configuration is read without them too
    in_file, tables = (adapted_in(peft), tables_in(peft)) if there else (set(), set())
    modules = places_of_modules(places.found, places.shapes)
    known = {split_use(path)[0] for path in places.shapes if split_use(path)[1]}

    def adapts(module: str) -> bool:
        return module in in_file if settings.all_linear else settings.adapts(module)

    chosen: dict[str, str] = {}
    for module in (module for module in modules if adapts(module)):
        path = modules[module].path
        is_table = module in places.heads or (module in tables and path not in known)
        chosen[module] = f"{path}@{LOOKUP}" if is_table else path
    for table, head in places.heads.items():
        if (table in chosen or head in chosen) and ties(settings, table, head, in_file):
            chosen[table] = chosen[head] = modules[table].path
    if not chosen:
        asked_for = quoted(settings.targets)
        raise ValueError(f"{settings.where} adapts no module of this model: its target_modules are {asked_for}")
    return chosen


def read_config(folder: str | Path | PeftFolder, params: Params, names: Names = DECODER.names) -> LoraConfig:
    """Read a PEFT adapter's configuration as the `LoraConfig` that gives these parameters its adapters.

    Every adapted weight is named by its path, with its own rank and alpha where PEFT's patterns give it one; so are the
    layers of a weight that holds several ("params/layers/up/kernel/{3}"), where these differ or have no adapter.
    An adapter of a table that is the head too is that of its look-up alone, "*@lookup", and one of the head that of its
    product alone, as PEFT has them, but with ensure_weight_tying. What PEFT trains whole (modules_to_save, and biases
    by `bias`) is named by `trained`, but for single layers of a stack, and one use of such a table; the rows of
    `trainable_token_indices` by `trained_rows`.

    Args:
      folder: with adapter_config.json, as PEFT saves it; or what `open_peft` read of it.
      params: the base's parameters, arrays or shapes.
      names: their Hugging Face names.

    Raises:
      ValueError: the configuration is damaged, asks for what this library does not compute, or does not fit the model.
    """
    peft = as_opened(folder)
    settings = read_settings(peft)
    places = places_of_uses(names, {path: tuple(leaf.shape) for path, leaf in array_leaves(params).items()})
    modules = places_of_modules(places.found, places.shapes)
    adapted = adapted_modules(peft, settings, places)
    own: dict[str, dict[int | None, tuple[int, float]]] = {}
    for module, path in adapted.items():
        own.setdefault(path, {})[modules[module].layer] = settings.rank_and_alpha(module)
    named = dict[tuple[str, int | None], tuple[int, float]]()
    for path, layers in own.items():
        alike = None in layers or (len(layers) == places.shapes[path][0] and len({*layers.values()}) == 1)
        named |= {(path, None if alike else n): pair for n, pair in layers.items()}

    def pattern(path: str, layer: int | None) -> str:
        """Return what matches an adapter's path, whether or not the program has another use of its weight."""
        whole, _ = split_use(path)
        both = [other for other in own if split_use(other)[0] == whole]
        return pattern_of_layer(literal(path if len(both) > 1 else whole), layer)

    return LoraConfig(
        rank=settings.r,
        alpha=settings.alpha,
        scaling=settings.scaling,
        targets=[pattern_of_layer(literal(path), layer) for path, layer in named],
        trained=[literal(path) for path in trained_paths(settings, places, adapted)],
        trained_rows={literal(path): ids for path, ids in trained_rows(settings, places).items()},
        rank_pattern=[(pattern(*key), rank) for key, (rank, _) in named.items() if rank != settings.r],
        alpha_pattern=[(pattern(*key), alpha) for key, (_, alpha) in named.items() if alpha != settings.alpha],
        allow_large_rank=True,  # PEFT sets no bound
        method="dora" if settings.dora else "lora",
        dropout=settings.dropout,
    )
