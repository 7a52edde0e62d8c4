"""Finding the output head by how it is used, not by what it is called."""

import functools
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import jax.numpy as jnp

from rslora_jax.transform import compat
from rslora_jax.transform.programs import Inner, fold, held

_MIXED = object()  # the tag of a value in which more than one source meets


def last_products(jaxpr: compat.Jaxpr, products: Mapping[int, Set[str]]) -> set[str]:
    """Return the weights whose product is an output of the program, alone and last.

    Every float value is tagged with the one weight's product that it is made of, or as mixed (a residual
    stream is). Integers, constants and parameters bring no tag: labels and masks do not hide a head. A
    weight counts if its tag reaches an output and no other product.

    Args:
      jaxpr: the program.
      products: the paths of the weights used by an equation, by the equation's id.
    """
    fed: set[Any] = set()

    def tag(eqn: compat.Eqn, tags: list[Any]) -> list[Any]:
        if id(eqn) in products:
            fed.update(t for t in tags if t is not None)
            outs = [_join(products[id(eqn)])]
        else:
            outs = _through(eqn, tags, run)
        floating = (jnp.issubdtype(var.aval.dtype, jnp.inexact) for var in eqn.outvars)
        return [out if yes else None for out, yes in zip(outs, floating, strict=True)]

    run = functools.partial(fold, equation=tag, constant=_untagged, literal=_untagged)
    inputs = compat.opened(jaxpr)[0].invars
    return {t for t in run(jaxpr, [None] * len(inputs)) if isinstance(t, str)} - fed


def _through(eqn: compat.Eqn, tags: Sequence[Any], run: Any) -> list[Any]:
    """Return the tags of an equation's outputs: of all its inputs together, or by the programs that it holds."""
    programs = held(eqn)
    if programs is None:
        return [_join(tags)] * len(eqn.outvars)
    each = [_turned(inner, [tags[n] for n in inner.inputs], run) for inner in programs.inner if inner.gives]
    return [_join(of_one) for of_one in zip(*each, strict=True)]


def _turned(inner: Inner, tags: list[Any], run: Any) -> list[Any]:
    """Run a program on tags; a loop's as long as what it carries changes."""
    outs = run(inner.jaxpr, tags)
    for _ in range(2 if inner.carried else 0):  # none -> one source -> mixed: a tag changes at most twice
        for n, out in zip(inner.carried, outs, strict=False):
            tags[n] = _join([tags[n], out])
        outs = run(inner.jaxpr, tags)
    carry = [_join([tags[n], out]) for n, out in zip(inner.carried, outs, strict=False)]
    return [*carry, *outs[len(carry) :]]


def _join(tags: Iterable[Any]) -> Any:
    found = {t for t in tags if t is not None}
    return found.pop() if len(found) == 1 else _MIXED if found else None


def _untagged(constant: Any) -> None:
    """Give a constant no tag."""
