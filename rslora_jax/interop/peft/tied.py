"""A table that is also the head, and what of PEFT's it is: two modules, an embedding and a linear layer.

PEFT's adapter of one of the two changes that one alone, though both hold one weight; so does its whole copy
(`modules_to_save`). With ensure_weight_tying both have the one adapter, or the one copy.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from rslora_jax.interop.names import Names, Place, places, row_of
from rslora_jax.interop.peft.settings import PeftSettings
from rslora_jax.sites import Site
from rslora_jax.transform.uses import LOOKUP, PRODUCT

# By these last parts of names, and no others, PEFT tells that a table or its head is among what it adapts.
_OF_TABLES = ("embed_tokens", "lm_head")


class Places(NamedTuple):
    """Where the weights of PEFT's modules are in a model.

    Attributes:
      found: the place of every parameter by its name, and of the heads that a table serves as ("path@product").
      shapes: the shapes at these places' paths.
      heads: the head's module by that of the table that serves as it.
      names: the table of names.
    """

    found: dict[str, Place]
    shapes: dict[str, tuple[int, ...]]
    heads: dict[str, str]
    names: Names


def places_of_uses(names: Names, shapes: Mapping[str, tuple[int, ...]]) -> Places:
    """Return the places of a model's parameters, of these shapes by path, in PEFT.

    The head of such a table is in no file of weights. It has a place where the table of names has a row for the
    product, such as `"params/embed/embedding@product": Weight("lm_head.weight")`, and no parameter has that name.
    """
    found = places(names, shapes)
    all_shapes, heads = dict(shapes), {}
    for name, place in list(found.items()):
        row = row_of(names, f"{place.path}@{PRODUCT}")
        if row is not None and row not in found:
            found[row] = Place(f"{place.path}@{PRODUCT}", None, False)
            all_shapes[f"{place.path}@{PRODUCT}"] = shapes[place.path]
            heads[name.removesuffix(".weight")] = row.removesuffix(".weight")
    return Places(found, all_shapes, heads, names)


def ties(settings: PeftSettings, table: str, head: str, in_file: Collection[str]) -> bool:
    """Say whether PEFT has one adapter for a table and its head; `in_file`: the modules of which it saved factors."""
    if not settings.tie:
        return False
    named = isinstance(settings.targets, str) and any(map(settings.targeted, _OF_TABLES))
    # PEFT takes the head out of the targets that it saves, and saves its factors all the same.
    return named or settings.adapts(head) or head in in_file or table.rpartition(".")[2] in _OF_TABLES


def ties_copies(settings: PeftSettings) -> bool:
    """Say whether PEFT has one copy for a table and its head."""
    return settings.tie and any(name.rpartition(".")[2] in _OF_TABLES for name in settings.to_save)


def modules_of(site: Site, module: str, heads: Mapping[str, str], names: Names) -> list[str]:
    """Return PEFT's modules for an adapted table whose own module is `module`: its look-up's, its head's, or both.

    Raises:
      ValueError: it is not known what module that is, or PEFT has none.
    """
    lookups = site.uses.count(LOOKUP)
    own = row_of(names, f"{site.weight}@{LOOKUP}")
    found = []
    if site.use != PRODUCT:
        if lookups > 1 and own is None:
            raise ValueError(
                f"{site.weight} is looked up in {lookups} places, and in torch each may be a module of its own: PEFT's "
                f"adapter of {module} may change none of them; where all are one module, say so in the table of "
                f'names, "{site.weight}@{LOOKUP}": "{module}.weight"'
            )
        found.append(own.removesuffix(".weight") if own else module)
    if site.use == PRODUCT or (site.tied and not site.use):
        if module not in heads:
            raise ValueError(
                f"{site.weight} is multiplied as well as looked up, and PEFT has an adapter for each: give the table "
                f'of names the head\'s, "{site.weight}@{PRODUCT}": "lm_head.weight", or adapt @{LOOKUP} alone'
            )
        found.append(heads[module])
    return found
