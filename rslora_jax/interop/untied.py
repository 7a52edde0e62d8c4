"""Give a model whose token table is its head too a head of its own, with the same numbers.

What changes one use of the table alone, as an adapter of PEFT does, can then be added in, or put in the table's place.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from rslora_jax.interop.model import Model
from rslora_jax.layers import patterns_of
from rslora_jax.transform.uses import LOOKUP, PRODUCT
from rslora_jax.wrap import Adapters, Lora, wrap


def untie(model: Model) -> Model:
    """Return a model with a head of its own, a transposed copy of its table.

    Raises:
      ValueError: nothing is known of how models of this family are untied.
    """
    if model.family.untie is None:
        raise ValueError("the token table and the head of this model are one weight, and its family has no `untie`")
    own = model.family.untie(model.config, model.variables)
    return dataclasses.replace(
        model, config=own.config, variables=own.variables, changed={**model.changed, **own.changed}
    )


def untie_adapters(model: Model, lora: Lora, adapters: Adapters) -> tuple[Model, Lora, Adapters]:
    """Return a model with a head of its own, and the adapters on it that were those of one use of its table.

    Args:
      model: whose table is its head too.
      lora: the model with adapters.
      adapters: these. Where none is of one use ("path@lookup", "path@product"), all is given back as it is.

    Raises:
      ValueError: as `untie`.
    """
    if not any(site.use for site in lora.sites.values()):
        return model, lora, adapters
    own = untie(model)
    said = model.family.untie(model.config, model.variables)  # type: ignore[misc]
    of_use = {"": None, LOOKUP: said.table, PRODUCT: said.head}
    names = {path: of_use[site.use] or path for path, site in lora.sites.items()}
    config = dataclasses.replace(lora.config, **patterns_of({names[p]: site for p, site in lora.sites.items()}))
    tokens: Any = jax.ShapeDtypeStruct((1, 8), "int32")
    return own, wrap(own.apply, own.variables, tokens, config=config), {names[p]: adapters[p] for p in lora.sites}


def merge_model(model: Model, lora: Lora, adapters: Adapters) -> Model:
    """Return a model with its adapters added in, with a head of its own where an adapter is of one use of the table."""
    model, lora, adapters = untie_adapters(model, lora, adapters)
    return dataclasses.replace(model, variables=lora.merge(model.variables, adapters))
