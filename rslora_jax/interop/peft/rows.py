"""Trained rows of tables and heads, as PEFT has them: its `trainable_token_indices`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rslora_jax.interop.peft.layout import is_table
from rslora_jax.interop.peft.settings import PeftSettings
from rslora_jax.interop.peft.tied import Places
from rslora_jax.interop.peft.whole import names_of_trained
from rslora_jax.methods.rows import Rows
from rslora_jax.shown import quoted, shown
from rslora_jax.wrap import Adapters, Lora

# The rows' values, though it is called a difference, behind the module's name.
ROWS = ".token_adapter.trainable_tokens_delta"


def trained_rows(settings: PeftSettings, places: Places) -> dict[str, tuple[int, ...]]:
    """Return the numbers of the rows that an adapter trains, by the path of the table or the head.

    PEFT trains those of the head with the table's where both are one weight.

    Raises:
      ValueError: it is not known which module is meant, or it is one use of such a weight.
    """
    named = settings.rows if isinstance(settings.rows, Mapping) else {_table(settings, places): settings.rows}
    of_module: dict[str, tuple[int, ...]] = {}
    for wanted, ids in named.items() if settings.rows else ():
        modules = [n.removesuffix(".weight") for n in places.found if n.endswith(f"{wanted}.weight")]
        if not modules:
            raise ValueError(
                f"{settings.where} has trainable_token_indices for {shown(wanted)}, which is no module of this model"
            )
        of_module |= dict.fromkeys(modules, tuple(ids))
    for table, head in places.heads.items():
        if head in of_module and of_module.pop(head) != of_module.get(table):
            raise ValueError(
                f"{settings.where} trains other rows of {head} than of {table}, and both are one weight: give the "
                "model a head of its own"
            )
    return {places.found[f"{module}.weight"].path: ids for module, ids in of_module.items()}


def _table(settings: PeftSettings, places: Places) -> str:
    """Return the module of the table that tokens are looked up in."""
    tables = [name.removesuffix(".weight") for name, place in places.found.items() if is_table(place.path)]
    if settings.rows and len(tables) != 1:
        raise ValueError(
            f"{settings.where} has trainable_token_indices={quoted(settings.rows)}, and the model has {len(tables)} "
            "tables: say of which, {name: indices}"
        )
    return tables[0] if tables else ""


def row_tensors(lora: Lora, adapters: Adapters, places: Places) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
    """Give the trained rows as PEFT names them, and its `trainable_token_indices`.

    Raises:
      ValueError: PEFT has no module for a table.
    """
    tensors, indices = dict[str, np.ndarray](), dict[str, list[int]]()
    for path, site in lora.sites.items():
        if isinstance(site.method, Rows):
            module = names_of_trained(lora, path, places)[0].removesuffix(".weight")
            rows = np.asarray(adapters[path]["rows"])
            tensors[f"{module}{ROWS}"] = rows.reshape(len(rows), -1)
            indices[module] = list(site.method.ids)
    return tensors, indices


def take_rows(
    lora: Lora, left: dict[str, np.ndarray], places: Places, settings: PeftSettings
) -> dict[str, dict[str, np.ndarray]]:
    """Take the rows of a model's sites out of the tensors that are left of a file.

    Raises:
      ValueError: the adapter trains other rows than the config, or lacks them.
    """
    there = trained_rows(settings, places)
    here = {path: site.method.ids for path, site in lora.sites.items() if isinstance(site.method, Rows)}
    for path in there.keys() | here.keys():
        if there.get(path) != here.get(path):
            raise ValueError(
                f"{settings.where} trains the rows {quoted(list(there.get(path, ())))} of {path}, and this config "
                f"{quoted(list(here.get(path, ())))}: wrap with `read_config`'s"
            )
    found = {}
    for path in here:
        name = names_of_trained(lora, path, places)[0].removesuffix(".weight") + ROWS
        shape = lora.sites[path].factor_shapes["rows"]
        if name not in left or left[name].size != np.prod(shape) or len(left[name]) != shape[0]:
            raise ValueError(f"{settings.where.parent} lacks {name}, the rows of {path}, or has them in another shape")
        found[path] = {"rows": left.pop(name).reshape(shape)}
        if head := places.heads.get(name.removesuffix(ROWS)):
            left.pop(f"{head}{ROWS}", None)  # the same again, where a table that was resized is saved along
    return found
