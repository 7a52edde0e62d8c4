"""Equations that hold programs of their own, and the one way to go through a program and into them.

The table is keyed by the primitives themselves: one that JAX renames or takes away is an error at import, and not an
equation that is passed over. `calls.RULES` has a rule for each, by which a view is carried in.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jax.extend.core import primitives

from rslora_jax.transform import compat


@dataclasses.dataclass(frozen=True)
class Inner:
    """Describe one of the programs that an equation holds, and what of the equation is its.

    Attributes:
      jaxpr: the program.
      inputs: which of the equation's inputs it takes, by number.
      carried: which of its own inputs are, in the next turn, its first outputs; nothing where it is no loop's body.
      times: how often it runs, on all devices; 1 where that is not known.
      gives: whether its outputs are the equation's, as those of a loop's condition are not.
    """

    jaxpr: compat.Jaxpr
    inputs: range | tuple[int, ...]
    carried: range = range(0)
    times: int = 1
    gives: bool = True


@dataclasses.dataclass(frozen=True)
class Held:
    """Describe the programs that an equation holds.

    Attributes:
      inner: the programs.
      call: whether values go into the one program, and come out of it, as they are.
      own_derivative: whether the derivative is not that of the program.
      one_of: whether one of the programs is run, by the equation's first input.
    """

    inner: tuple[Inner, ...]
    call: bool = False
    own_derivative: bool = False
    one_of: bool = False


def call(name: str, own_derivative: bool = False) -> Callable[[compat.Eqn], Held]:
    """Return how a primitive holds a program that it calls; `name` is that of its parameter."""

    def held(eqn: compat.Eqn) -> Held:
        inner = Inner(eqn.params[name], range(len(eqn.invars)))
        return Held((inner,), call=True, own_derivative=own_derivative)

    return held


def _scan(eqn: compat.Eqn) -> Held:
    """Take a scan's body as its loop; the scanned inputs lose their first axis on the way in."""
    num_consts, num_carry = compat.scan_counts(eqn)
    carried = range(num_consts, num_consts + num_carry)
    return Held((Inner(eqn.params["jaxpr"], range(len(eqn.invars)), carried, eqn.params["length"]),))


def _while_(eqn: compat.Eqn) -> Held:
    """Take a while loop's condition and body, each with constants of its own before what is carried."""
    p = eqn.params
    first = p["cond_nconsts"] + p["body_nconsts"]
    carry = range(first, len(eqn.invars))
    condition = Inner(p["cond_jaxpr"], (*range(p["cond_nconsts"]), *carry), gives=False)
    carried = range(p["body_nconsts"], p["body_nconsts"] + len(carry))
    return Held((condition, Inner(p["body_jaxpr"], range(p["cond_nconsts"], len(eqn.invars)), carried)))


def _cond(eqn: compat.Eqn) -> Held:
    """Take a conditional's branches; its first input says which."""
    inputs = range(1, len(eqn.invars))
    return Held(tuple(Inner(branch, inputs) for branch in eqn.params["branches"]), one_of=True)


def _shard_map(eqn: compat.Eqn) -> Held:
    """Take the program of one device, which has a part of each value, as often as there are devices."""
    options = compat.shard_map_params(eqn)
    devices = math.prod(options["mesh"].shape[axis] for axis in options["axis_names"])
    return Held((Inner(eqn.params["jaxpr"], range(len(eqn.invars)), times=devices),))


PROGRAMS: Mapping[compat.Primitive, Callable[[compat.Eqn], Held]] = {
    primitives.jit_p: call("jaxpr"),
    primitives.closed_call_p: call("call_jaxpr"),
    primitives.remat_p: call("jaxpr"),
    primitives.scan_p: _scan,
    primitives.while_p: _while_,
    primitives.cond_p: _cond,
    primitives.custom_jvp_call_p: call("call_jaxpr", own_derivative=True),
    primitives.custom_vjp_call_p: call("call_jaxpr", own_derivative=True),
    compat.shard_map_p: _shard_map,
}


def held(eqn: compat.Eqn) -> Held | None:
    """Return the programs that an equation holds, or None where it holds none."""
    of = PROGRAMS.get(eqn.primitive)
    return None if of is None else of(eqn)


def fold(
    jaxpr: compat.Jaxpr,
    inputs: Iterable[Any],
    equation: Callable[[compat.Eqn, list[Any]], Sequence[Any]],
    *,
    constant: Callable[[Any], Any] = lambda value: value,
    literal: Callable[[Any], Any] = lambda atom: atom.val,
) -> list[Any]:
    """Go through a program in its order, with anything in the place of its values; return those of its outputs.

    Args:
      jaxpr: the program, closed or not.
      inputs: what stands for its inputs.
      equation: `equation(eqn, values)` gives what stands for an equation's outputs.
      constant: gives what stands for a constant that the program holds, by its value.
      literal: gives what stands for a number that is written in the program, by the atom.

    >>> import jax
    >>> longest = lambda eqn, depths: [1 + max(depths)] * len(eqn.outvars)
    >>> fold(jax.make_jaxpr(lambda x, y: (x * y + 2.0, y))(1.0, 2.0), [0, 0], longest, literal=lambda atom: 0)
    [2, 0]
    """
    jaxpr, consts = compat.opened(jaxpr)
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, map(constant, consts), strict=True))
    env.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Any:
        return literal(atom) if compat.is_literal(atom) else env[atom]

    for eqn in jaxpr.eqns:
        env.update(zip(eqn.outvars, equation(eqn, [*map(read, eqn.invars)]), strict=True))
    return [*map(read, jaxpr.outvars)]
