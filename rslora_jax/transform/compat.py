"""Everything that differs between JAX versions, or that JAX has no public name for.

Supported: 0.10 (Python 3.11) to the newest. No other file of the package imports `jax._src`.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax._src import source_info_util
from jax._src.core import pvary_p
from jax._src.interpreters.partial_eval import dce_jaxpr
from jax._src.lax.lax import ragged_dot_general_p
from jax._src.lax.parallel import all_gather_invariant_p
from jax._src.pjit import reshard_p
from jax._src.shard_map import shard_map_p
from jax.extend.core import ClosedJaxpr, Literal, Primitive

Jaxpr = Any  # `Jaxpr` and `ClosedJaxpr` are two classes on JAX 0.10 and one on 0.12
Eqn = Any

# The primitives for which JAX has no public name: one that is renamed is an ImportError here, not a rule never used.
__all__ = ["Primitive", "all_gather_invariant_p", "pvary_p", "ragged_dot_general_p", "reshard_p", "shard_map_p"]


def live(jaxpr: Jaxpr) -> Jaxpr:
    """Return a program without what no output and no effect depends on; its inputs stay as many.

    JAX keeps what it makes of a program, so the same one gives the same equations again.
    """
    inner, consts = opened(jaxpr)
    lean, _ = dce_jaxpr(inner, True, True)
    return lean if inner is jaxpr else ClosedJaxpr(lean, consts)


def used_inputs(jaxpr: Jaxpr) -> list[bool]:
    """Say for each input of a program whether an output or an effect depends on it."""
    return dce_jaxpr(opened(jaxpr)[0], True)[1]


def is_literal(atom: Any) -> bool:
    """Say whether what an equation reads is a constant, written in its place."""
    return isinstance(atom, Literal)


def is_tracer(value: Any) -> bool:
    """Say whether a value is being traced."""
    return isinstance(value, jax.core.Tracer)


def opened(jaxpr: Jaxpr) -> tuple[Jaxpr, Sequence[Any]]:
    """Return a jaxpr, closed or not, as (open jaxpr, constants)."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


@contextlib.contextmanager
def provenance(eqn: Eqn) -> Iterator[None]:
    """Run the body under the equation's own source line, named scopes and compute context."""
    stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=stack), eqn.ctx.manager:
        yield


def bind(eqn: Eqn, *values: Any, **changed: Any) -> list[Any]:
    """Evaluate one equation on `values`, with its parameters except those in `changed`."""
    params = eqn.primitive.get_bind_params({**eqn.params, **changed})
    out = eqn.primitive.bind(*values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def op_by_op() -> bool:
    """Say whether `jax.disable_jit` holds."""
    return jax.config.jax_disable_jit  # type: ignore[attr-defined]


def scan_counts(eqn: Eqn) -> tuple[int, int]:
    """Return how many of a scan's inputs are constants, and how many are carried."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carry)


def call_shardings(eqn: Eqn) -> tuple[list[Any], list[Any]]:
    """Return the shardings a jit call asks of its inputs and outputs, None where it asks for none."""

    def asked(shardings: Sequence[Any]) -> list[Any]:
        return [None if type(s).__name__ == "UnspecifiedValue" else s for s in shardings]

    return asked(eqn.params["in_shardings"]), asked(eqn.params["out_shardings"])


def shard_map_params(eqn: Eqn) -> dict[str, Any]:
    """Return what to give `jax.shard_map` so that it does as an equation does, but for its input specs."""
    p = eqn.params
    names = p["newly_manual_axes"] if "newly_manual_axes" in p else p["manual_axes"]
    return {"mesh": p["mesh"], "out_specs": p["out_specs"], "axis_names": names, "check_vma": p["check_vma"]}


def trace(jitted: Callable[..., Any], *args: Any) -> tuple[Jaxpr, Any]:
    """Trace a jitted function, or take the trace it keeps; return (jaxpr, tree of its output)."""
    traced = jitted.trace(*args)  # type: ignore[attr-defined]
    return traced.jaxpr, jax.tree.structure(traced.out_info)


def varying(array: Any) -> frozenset[Any]:
    """Return the mesh axes of a shard_map along which the type of an array says that it varies."""
    return jax.typeof(array).mat.varying


def vary_together(*arrays: Any) -> list[Any]:
    """Say of arrays that they vary along all the mesh axes along which one of them does."""
    axes = frozenset().union(*map(varying, arrays))
    missing = [tuple(axis for axis in axes if axis not in varying(array)) for array in arrays]
    return [jax.lax.pcast(a, m, to="varying") if m else a for a, m in zip(arrays, missing, strict=True)]
