"""Finding a program's weights: the same walk as in training, on abstract values and without factors."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from rslora_jax.transform import compat
from rslora_jax.transform.head import last_products
from rslora_jax.transform.interpreter import as_arrays
from rslora_jax.transform.log import Log, Meeting, Use, beginning
from rslora_jax.transform.probe import Probe
from rslora_jax.transform.scout import scouting


@dataclasses.dataclass(frozen=True)
class Found:
    """What a program does with its parameters.

    Attributes:
      uses: every use of a weight in a product or a look-up.
      heads: the paths of the weights whose product is an output of the program.
      meetings: by path, where a weight meets data in an operation that does not tell its axes.
      apart: the axes, as (path, axis), that a scan takes apart.
      used: the paths of the parameters on which an output or an effect depends.
    """

    uses: Sequence[Use]
    heads: set[str]
    meetings: Mapping[str, Sequence[Meeting]]
    apart: set[tuple[str, int]]
    used: set[str]


def discover(jaxpr: compat.Jaxpr, names: Sequence[str], arrays: Sequence[Any]) -> Found:
    """Return what a program does with its parameters.

    Args:
      jaxpr: the program; its first inputs are the parameters.
      names: the parameters' paths, in the order of the program's inputs.
      arrays: all inputs, or their shapes.
    """
    log = Log()
    walk = scouting(log)

    def scout(arrays: Sequence[Any]) -> list[Any]:
        weights: list[Probe] = [beginning(w, name) for w, name in zip(arrays, names, strict=False)]
        return as_arrays(walk, walk.run(jaxpr, [*weights, *arrays[len(names) :]]))

    jax.eval_shape(scout, list(arrays))
    uses = [use for number, use in enumerate(log.uses) if number not in log.withdrawn]
    products: dict[int, set[str]] = {}
    for use in uses:
        if use.kind == "product":
            products.setdefault(id(use.eqn), set()).add(use.site)
    used = {name for name, yes in zip(names, compat.used_inputs(jaxpr), strict=False) if yes}
    return Found(uses, last_products(jaxpr, products), log.meetings, log.apart, used)


def roles(shapes: Mapping[str, tuple[int, ...]], found: Found) -> dict[str, dict[str, Any]]:
    """Give every axis of every weight used as a matrix its role, from all the uses.

    A table that is looked up has its indexed axis as the in-axis, also where it serves a second time as a
    tied head. Otherwise the first product that data meet decides. An axis that no use sees whole, because a scan or an
    index has taken it apart, is stacked.
    """
    given: dict[str, dict[str, Any]] = {}
    for path in dict.fromkeys(use.site for use in found.uses):
        own = [use for use in found.uses if use.site == path]
        # A stack of which an index picks a matrix for each row of the data is no table, nor is what a scan takes apart.
        apart = (n for site, n in found.apart if site == path)
        shared = frozenset().union(*(use.batch for use in own), apart)
        lookups = [use for use in own if use.kind == "lookup" and not use.contracted <= shared]
        met = [use for use in own if use.kind != "lookup"]
        use = (lookups or [use for use in met if not use.summed] or met or own)[0]
        if use.kind == "lookup" and not lookups:
            continue  # one row of a stack at a time, as a vector
        ins, outs = _sides(shapes[path], use)
        if not ins or not outs:
            continue  # a vector, with nothing to factor
        kinds = {"lookup": "embedding", "convolution": "convolution"}
        given[path] = {
            "in_axes": ins,
            "out_axes": outs,
            "stack_axes": tuple(n for n in range(len(shapes[path])) if n not in (*ins, *outs)),
            "kind": kinds.get(use.kind) or ("expert" if use.batch else "linear"),
        }
    return given


def _sides(shape: tuple[int, ...], use: Use) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return a weight's in-axes and out-axes, by one use of it."""
    axes = range(len(shape))
    ins = tuple(n for n in axes if n in use.contracted)
    outs = tuple(n for n in axes if n in use.free and n not in use.contracted)
    # A weight that meets its own transpose, or that was flattened, has the same axes on both sides: the last is left.
    both = [n for n in ins if n in use.free]
    if not outs and len(both) > 1:
        return tuple(n for n in ins if n != both[-1]), (both[-1],)
    # What another weight has summed over lies on the side of that weight; an axis of size 1 (the one output of a
    # reward head) may be gone by the time that the weight is used.
    rest = [n for n in axes if n not in (*ins, *outs, *use.batch)]
    inner = tuple(n for n in rest if n in use.summed) or tuple(n for n in rest if shape[n] == 1)
    return ins or inner, outs or (inner if ins else ())
