"""One checkpoint: its items read back, and checked against what was saved and what is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from rslora_jax.config import LoraConfig
from rslora_jax.pytrees import PyTree
from rslora_jax.sites import named_leaves, path_name
from rslora_jax.store.checksum import checksums
from rslora_jax.store.keys import as_data

# What a checkpoint's "about" is told by: 0, or none, before configs named a method; 1 since.
FORMAT = 1


class Damaged(ValueError):
    """A checkpoint cannot be read, or does not hold what was saved."""


def read_about(where: Path) -> dict[str, Any]:
    """Read the item "about" of one checkpoint.

    Raises:
      Damaged: it cannot be read.
      ValueError: a later version wrote it, in a form that this one does not know.
    """
    about = _read(where, "about", lambda: ocp.JsonCheckpointHandler().restore(where / "about"))
    if about.get("format", 0) > FORMAT:
        raise ValueError(
            f"{where} is of format {about['format']}, and this version reads up to {FORMAT}: install a newer rslora_jax"
        )
    # What a config did not have yet, it has by default.
    return about | {"config": LoraConfig().to_dict() | about["config"]} if "config" in about else about


def shapes_of(where: Path, item: str) -> Any:
    """Read the shapes and dtypes of an item's arrays, as a tree."""
    return _read(where, item, lambda: ocp.StandardCheckpointHandler().metadata(where / item).tree)


def as_saved(example: Any, impls: Mapping[str, str]) -> tuple[Any, dict[str, str]]:
    """Return an example's shapes as a checkpoint holds them, and the implementation of each key: the saved one's."""
    arrays, own = as_data(example)
    # Before implementations were saved, they were those of the run.
    impls = {path: impls.get(path, impl) for path, impl in own.items()}

    def one(path: Any, leaf: Any) -> Any:
        abstract, name = ocp.utils.to_shape_dtype_struct(leaf), path_name(path)
        if name not in impls:
            return abstract
        shape = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=impls[name]))).shape
        return jax.ShapeDtypeStruct((*abstract.shape[:-1], *shape), abstract.dtype, sharding=abstract.sharding)

    return jax.tree_util.tree_map_with_path(one, arrays), impls


def without_empty(tree: PyTree) -> PyTree:
    """Return a tree without its arrays of no elements, which orbax cannot write."""
    return jax.tree.map(lambda leaf: leaf if leaf.size else None, tree)


def read_arrays(where: Path, about: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Read items as arrays like the examples, and check that they hold what was saved."""

    def one(item: str) -> Any:
        arguments = ocp.args.StandardRestore(without_empty(like[item]))
        read = iter(jax.tree.leaves(ocp.StandardCheckpointHandler().restore(where / item, args=arguments)))

        def whole(leaf: Any) -> Any:
            return next(read) if leaf.size else jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)

        return jax.tree.map(whole, like[item])

    read = {item: _read(where, item, functools.partial(one, item)) for item in like}
    for path, word in checksums(read).items():
        if about["checksums"].get(path) != word:
            raise Damaged(f"{where} is damaged: {path} is not what was saved")
    return read


def _read(where: Path, item: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # orbax lets through what tensorstore, json and the system raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise Damaged(f"{where / item} is damaged ({reason})") from error


def check_same(where: Path, found: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise a ValueError that names what differs in the config or the base."""
    for name, what in (("config", "LoraConfig"), ("base", "base")):
        if name not in here or found[name] == here[name]:
            continue
        both = {**found[name], **here[name]}
        differing = [key for key in both if found[name].get(key) != here[name].get(key)]
        first = differing[0]
        theirs, ours = (str(side[name].get(first, "missing")) for side in (found, here))
        if name == "base" and theirs.split()[0] == ours.split()[0]:
            said = f"{first} has other values"
        else:
            said = f"{first} is {theirs} there, {ours} here"
        more = f", and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise ValueError(f"{where} was trained with another {what} ({said}{more}): give it the same one")


def check_shapes(where: Path, item: str, saved: Any, wanted: Any) -> None:
    """Raise a ValueError that names the first array whose path or shape is not the checkpoint's."""
    saved, wanted = named_leaves(saved), named_leaves(wanted)
    for name, leaf in wanted.items():
        shape = tuple(leaf.shape)
        if name not in saved:
            raise ValueError(f"{where} has no {item} for {name}, which this run needs with shape {shape}")
        if tuple(saved[name].shape) != shape:
            raise ValueError(
                f"{where} holds {item}/{name} with shape {tuple(saved[name].shape)}, where this run needs {shape}: "
                "it was trained with another config or on another base"
            )
    if extra := sorted(set(saved) - set(wanted)):
        raise ValueError(f"{where} holds {item}/{extra[0]}, which this run has no place for: is its config another?")
