"""The arrays of a checkpoint: of which form they are, and whether they hold what was saved."""

from __future__ import annotations

import functools
import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from rslora_jax.pytrees import PyTree
from rslora_jax.shown import reason_of
from rslora_jax.sites import named_leaves, path_name
from rslora_jax.store.checksum import checksums, form_of
from rslora_jax.store.damage import Damaged, read_or_say
from rslora_jax.store.keys import as_data
from rslora_jax.store.quiet import quiet_closed_loops


def without_empty(tree: PyTree) -> PyTree:
    """Return a tree without its arrays of no elements, which orbax cannot write."""
    return jax.tree.map(lambda leaf: leaf if leaf.size else None, tree)


# What every version writes; others are tried.
_PLAIN = {
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
}


def check_dtypes(tree: PyTree) -> None:
    """Raise a ValueError that names the first array of a dtype that a checkpoint cannot hold, such as uint4.

    >>> check_dtypes({"w": jnp.zeros(3), "codes": jnp.zeros(3, "int4"), "key": jax.random.key(0)})
    """
    # Of a stored weight, each of its arrays.
    arrays = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(as_data(tree)[0])}
    named = {str(leaf.dtype): name for name, leaf in reversed(arrays.items()) if hasattr(leaf, "dtype")}
    for dtype, name in named.items():
        if dtype not in _PLAIN and (reason := _refusal(dtype)):
            raise ValueError(
                f"{name} is of {dtype}, which a checkpoint cannot hold ({reason}): hold it in another dtype"
            )


@functools.cache
def _refusal(dtype: str) -> str:
    """Say why arrays of a dtype cannot be written and read again; nothing where they can."""
    if jax.process_count() > 1:  # orbax would have all of them write one folder, and each has its own here
        return ""
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True  # orbax logs the traceback of what is told here
    quiet_closed_loops()
    try:
        array = {"x": jnp.ones(3, dtype)}
        with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(Path(folder) / "x", array)
            checkpointer.wait_until_finished()
            read = checkpointer.restore(Path(folder) / "x", array)
        return "" if checksums(read) == checksums(array) else "it is read as other numbers"
    except Exception as error:  # what orbax, tensorstore or JAX raise
        return reason_of(error)
    finally:
        logger.disabled = before


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


def shapes_of(where: Path, item: str, about: Mapping[str, Any]) -> Any:
    """Read the shapes and dtypes of an item's arrays, as a tree.

    Raises:
      Damaged: it cannot be read, or tells of other arrays than "about" does.
    """
    tree = read_or_say(where / item, lambda: ocp.StandardCheckpointHandler().metadata(where / item).tree)
    told, here = _forms_in(about, item), {name: form_of(leaf) for name, leaf in named_leaves(tree).items()}
    for name in {**told, **here}:
        if told.get(name) != here.get(name) and not _holds_nothing(told.get(name, "")):
            raise Damaged(f"{where / item} is damaged: {name} is not what was saved")
    return tree


def _holds_nothing(text: str) -> bool:
    """Say whether a form is that of an array of no elements, of which orbax writes nothing.

    >>> _holds_nothing("float32[3,0]"), _holds_nothing("float32[10]"), _holds_nothing("int32[]")
    (True, False, False)
    """
    return bool(re.search(r"[\[,]0[\],]", text))


def _forms_in(about: Mapping[str, Any], item: str) -> dict[str, str]:
    """Return the dtype and shape of each of an item's arrays, by its path there.

    >>> _forms_in({"checksums": {"adapters/w/a": "float32[8,3] 5d0c", "training/step": "int32[] 11"}}, "adapters")
    {'w/a': 'float32[8,3]'}
    """
    named = {name: text.rpartition(" ")[0] for name, text in about["checksums"].items()}
    return {name.removeprefix(f"{item}/"): text for name, text in named.items() if name.startswith(f"{item}/")}


def check_shapes(where: Path, item: str, about: Mapping[str, Any], wanted: Any) -> None:
    """Raise a ValueError that names the first array whose path, shape or dtype is not the checkpoint's."""
    saved, named = _forms_in(about, item), named_leaves(wanted)
    for name, leaf in named.items():
        if name not in saved:
            raise ValueError(f"{where} has no {item} for {name}, which this run needs as {form_of(leaf)}")
        dtype, shape = saved[name].rstrip("]").split("[")
        its, own = form_of(leaf).rstrip("]").split("[")
        if shape != own:
            raise ValueError(
                f"{where} holds {item}/{name} with shape ({shape}), where this run needs ({own}): "
                "it was trained with another config or on another base"
            )
        if dtype != its:
            raise ValueError(
                f"{where} holds {item}/{name} in {dtype}, where this run needs {its}: give the optimiser and the "
                "adapters the dtypes that they had"
            )
    if extra := sorted(set(saved) - set(named)):
        raise ValueError(f"{where} holds {item}/{extra[0]}, which this run has no place for: is its config another?")


def read_arrays(where: Path, about: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Read items as arrays like the examples, and check that they hold what was saved.

    Raises:
      Damaged: they do not.
      ValueError: they do, and cannot be brought to where the examples lie; or they cannot be read now.
    """
    try:
        read = {
            item: read_or_say(where / item, functools.partial(_read_item, where, item, like[item])) for item in like
        }
    except Damaged as error:
        _read_plainly(where, about, like)  # raises where it is damaged indeed
        why = reason_of(error.__cause__ or error)
        raise ValueError(f"{where} is whole, but cannot be read for this run ({why})") from error
    _check_words(where, about, read)
    return read


def _read_item(where: Path, item: str, like: Any) -> Any:
    arguments = ocp.args.StandardRestore(without_empty(like))
    read = iter(jax.tree.leaves(ocp.StandardCheckpointHandler().restore(where / item, args=arguments)))

    def whole(leaf: Any) -> Any:
        return next(read) if leaf.size else jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)

    return jax.tree.map(whole, like)


def _read_plainly(where: Path, about: Mapping[str, Any], items: Mapping[str, Any]) -> None:
    """Read items as they are, into the host's memory, and raise Damaged where they are not what was saved."""
    for item in items:
        like = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes_of(where, item, about))
        _check_words(where, about, {item: read_or_say(where / item, functools.partial(_read_item, where, item, like))})


def _check_words(where: Path, about: Mapping[str, Any], read: Mapping[str, Any]) -> None:
    for path, word in checksums(read).items():
        if about["checksums"].get(path) != word:
            raise Damaged(f"{where} is damaged: {path} is not what was saved")
