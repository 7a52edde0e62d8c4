"""Which parameters a config trains whole, and of which it trains rows, beside the weights that it adapts."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from rslora_jax.config import LoraConfig, matches, near_misses, split_use
from rslora_jax.methods.rows import Rows, row_axis
from rslora_jax.methods.trained import Trained
from rslora_jax.sites import Site
from rslora_jax.transform.discover import Found


def trained_whole(config: LoraConfig, paths: Iterable[str]) -> list[str]:
    """Return those of the adapters' paths that hold values, of a whole parameter or of rows.

    >>> trained_whole(LoraConfig(trained="*/norm/scale"), ["up/kernel", "up/norm/scale"])
    ['up/norm/scale']
    """
    rows: Any = config.trained_rows
    patterns = [*config.trained, *(pattern for pattern, _ in rows)]
    return [path for path in paths if any(matches(path, pattern) for pattern in patterns)]


def trained_sites(
    config: LoraConfig,
    leaves: Mapping[str, Any],
    found: Found,
    roles: Mapping[str, Mapping[str, Any]],
    others: Mapping[str, str],
) -> dict[str, Site]:
    """Return the sites of the parameters that are trained whole, in the order of the parameters.

    Args:
      config: its `trained` names them.
      leaves: the parameters, or their shapes, by path.
      found: what the program does with them.
      roles: the roles of the axes of those that are weights.
      others: those that are no parameters, by path, with their kind.

    Raises:
      ValueError: a pattern matches no parameter, or one that cannot be trained.
    """
    chosen: set[str] = set()
    for pattern in config.trained:
        hit = [path for path in leaves if matches(path, pattern)]
        if not hit:
            raise ValueError(_no_match(pattern, leaves))
        for path in hit:
            _check(pattern, path, leaves[path], found, others)
        chosen |= set(hit)
    return {path: _site(path, tuple(leaf.shape), found, roles) for path, leaf in leaves.items() if path in chosen}


def row_sites(
    config: LoraConfig,
    shapes: Mapping[str, tuple[int, ...]],
    weights: Mapping[str, Mapping[str, Any]],
    taken: Collection[str],
) -> dict[str, Site]:
    """Return the sites of the tables of which rows are trained.

    Args:
      config: its `trained_rows` names them.
      shapes: the shapes of the parameters by path.
      weights: the roles of the axes of those that are weights.
      taken: the paths of what is adapted, or trained whole.

    Raises:
      ValueError: a pattern matches nothing, what is no table, or what is adapted too; or a table lacks a row.
    """
    sites: dict[str, Site] = {}
    named: Any = config.trained_rows
    for pattern, ids in named:
        hit = [path for path in shapes if matches(path, pattern)]
        if not hit:
            raise ValueError(
                f"trained_rows {pattern!r} matches no parameter: did you mean {near_misses(pattern, list(weights))}?"
            )
        for path in hit:
            what = f"trained_rows {pattern!r} matches {path}"
            if path in sites:
                raise ValueError(f"{what}, and so does another pattern: name its rows in one")
            if other := next((one for one in taken if split_use(one)[0] == path), None):
                raise ValueError(
                    f"{what}, which is adapted or trained whole too ({other}): leave it out of one of them"
                )
            sites[path] = _table(what, path, shapes[path], weights.get(path), ids)
    return sites


def _table(what: str, path: str, shape: tuple[int, ...], role: Mapping[str, Any] | None, ids: tuple[int, ...]) -> Site:
    """Return the site of a table of which rows are trained."""
    axes = () if role is None else role["in_axes"] if role["kind"] == "embedding" else role["out_axes"]
    if role is None or role["stack_axes"] or len(axes) != 1 or role["kind"] not in ("embedding", "linear"):
        raise ValueError(f"{what}, which is neither a table that is looked up by one axis nor a head: train it whole")
    site = Site(path, shape, **role, rank=len(ids), alpha=1.0, gamma=1.0, method=Rows(ids))
    size = shape[row_axis(site)]
    if max(ids) >= size:
        raise ValueError(f"{what} of {size} rows, and names row {max(ids)}: they are numbered from 0 to {size - 1}")
    return site


def _site(path: str, shape: tuple[int, ...], found: Found, roles: Mapping[str, Mapping[str, Any]]) -> Site:
    """Return the site of a parameter: what is stacked in front of it by a scan is told, all else is its own."""
    stacked = {n for n in range(len(shape)) if (path, n) in found.apart} | {*roles.get(path, {}).get("stack_axes", ())}
    front = next((n for n in range(len(shape)) if n not in stacked), len(shape))
    axes: dict[str, Any] = {"in_axes": (), "out_axes": tuple(range(front, len(shape)))}
    axes["stack_axes"] = tuple(range(front))
    axes["layer_axis"] = next((n for n in range(front) if (path, n) in found.apart), 0) if front else None
    return Site(path, shape, **axes, kind="trained", rank=0, alpha=1.0, gamma=1.0, method=Trained())


def _check(pattern: str, path: str, leaf: Any, found: Found, others: Mapping[str, str]) -> None:
    """Refuse what cannot be trained."""
    if path in others:
        why = f"is no parameter but of the kind {others[path]}"
    elif not jnp.issubdtype(leaf.dtype, jnp.floating):
        why = f"holds {leaf.dtype}, and only floating numbers are trained"
    elif path not in found.used:
        why = "is not used: no output depends on it"
    else:
        return
    raise ValueError(f"trained {pattern!r} matches {path}, which {why}: give a pattern that leaves it out")


def _no_match(pattern: str, leaves: Mapping[str, Any]) -> str:
    """Say that a pattern names nothing, and what would."""
    whole, use = split_use(pattern)
    if use and any(matches(path, whole) for path in leaves):
        return (
            f"trained {pattern!r} names one use of a weight, and a parameter is trained whole: leave out @{use}, or "
            "give the model a head of its own"
        )
    return f"trained {pattern!r} matches no parameter: did you mean {near_misses(pattern, list(leaves))}?"
