"""Finding the output head by how it is used, not by what it is called."""

from collections.abc import Mapping, Sequence, Set
from typing import Any

import jax.numpy as jnp

from rslora_jax.transform import compat

MIXED = object()  # the tag of a value in which more than one source meets


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

    def join(tags: Sequence[Any]) -> Any:
        found = {t for t in tags if t is not None}
        return found.pop() if len(found) == 1 else MIXED if found else None

    def run(jaxpr: compat.Jaxpr, tags: Sequence[Any]) -> list[Any]:
        jaxpr, _ = compat.opened(jaxpr)
        env = dict(zip(jaxpr.invars, tags, strict=True))
        read = lambda atom: None if compat.is_literal(atom) else env.get(atom)
        for eqn in jaxpr.eqns:
            ins = [read(v) for v in eqn.invars]
            if id(eqn) in products:
                fed.update(t for t in ins if t is not None)
                sites = products[id(eqn)]
                outs = [next(iter(sites)) if len(sites) == 1 else MIXED]
            else:
                outs = enter(eqn, ins)
            for var, tag in zip(eqn.outvars, outs, strict=True):
                env[var] = tag if jnp.issubdtype(var.aval.dtype, jnp.inexact) else None
        return [read(v) for v in jaxpr.outvars]

    def enter(eqn: compat.Eqn, ins: list[Any]) -> list[Any]:
        name, p = eqn.primitive.name, eqn.params
        if name == "scan":
            num_consts, num_carry = compat.scan_counts(eqn)
            return loop(p["jaxpr"], ins[:num_consts], ins[num_consts:], num_carry)
        if name == "while":
            first = p["cond_nconsts"] + p["body_nconsts"]
            return loop(p["body_jaxpr"], ins[p["cond_nconsts"] : first], ins[first:], len(ins) - first)
        if name == "cond":
            return [join(tags) for tags in zip(*(run(b, ins[1:]) for b in p["branches"]), strict=True)]
        inner = p.get("jaxpr", p.get("call_jaxpr"))
        if inner is not None and len(compat.opened(inner)[0].invars) == len(ins):
            return run(inner, ins)
        return [join(ins)] * len(eqn.outvars)

    def loop(body: compat.Jaxpr, consts: list[Any], rest: list[Any], num_carry: int) -> list[Any]:
        carry, xs = rest[:num_carry], rest[num_carry:]
        for _ in range(3):  # none -> one source -> mixed: a tag changes at most twice
            outs = run(body, [*consts, *carry, *xs])
            carry = [join(pair) for pair in zip(carry, outs[:num_carry], strict=True)]
        return [*carry, *outs[num_carry:]]

    inner, _ = compat.opened(jaxpr)
    return {t for t in run(jaxpr, [None] * len(inner.invars)) if isinstance(t, str)} - fed
