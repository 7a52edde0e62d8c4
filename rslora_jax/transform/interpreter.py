"""The walk over a jaxpr: plain equations are bound as they are, those that meet a view go by a rule."""

import dataclasses
import weakref
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import jax

from rslora_jax.transform import compat
from rslora_jax.transform.dropout import at_place, is_masked, is_place
from rslora_jax.transform.product import Product, adapted
from rslora_jax.transform.programs import PROGRAMS
from rslora_jax.transform.views import View, materialise

# A rule takes (walk, equation, values) and returns the equation's outputs, some of which may be views,
# or None where it has no low-rank form for these views: then they are materialised.
Rule = Callable[["Walk", compat.Eqn, list[Any]], list[Any] | None]

# What `on_fallback` is told of a weight that is an output.
OUTPUT = "output of the function"


@dataclasses.dataclass(frozen=True)
class Walk:
    """What a walk needs beside the program.

    Attributes:
      rules: the rule of each primitive.
      on_fallback: called with (view, primitive) where a weight is materialised.
      product: makes the result of data and an adapted weight, with the arguments of `product.adapted`.
      tables: the paths of the weights that are looked up, row by row.
      platform: what the program is compiled for, by default JAX's own backend.
      calls_here: compiled calls of the program that is walked, by equation, so that none is traced twice.
      calls: those of all programs. They live as long as the program, which `jax.jit` keeps until the function is
        gone, or until `jax.clear_caches`.
    """

    rules: Mapping[compat.Primitive, Rule]
    on_fallback: Callable[[View, str], None] = lambda view, primitive: None
    product: Callable[..., Any] = adapted
    tables: frozenset[str] = frozenset()
    platform: str | None = None
    calls_here: dict[int, Any] = dataclasses.field(default_factory=dict)
    calls: MutableMapping[compat.Jaxpr, dict[int, Any]] = dataclasses.field(default_factory=weakref.WeakKeyDictionary)

    def run(self, jaxpr: compat.Jaxpr, args: Sequence[Any], consts: Sequence[Any] | None = None) -> list[Any]:
        """Evaluate a jaxpr on arrays and views; return its outputs, some of which may be views."""
        jaxpr, own_consts = compat.opened(jaxpr)
        here = dataclasses.replace(self, calls_here=self.calls.setdefault(jaxpr, {}))
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, own_consts if consts is None else consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if compat.is_literal(atom) else env[atom]

        last_use = {v: n for n, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if not compat.is_literal(v)}
        keep = {v for v in jaxpr.outvars if not compat.is_literal(v)}
        for n, eqn in enumerate(jaxpr.eqns):
            with compat.provenance(eqn):
                values = [read(v) for v in eqn.invars]
                if is_place(eqn.primitive) and any(map(is_masked, values)):
                    values = [at_place(v, n) for v in values]
                env.update(zip(eqn.outvars, here.evaluate(eqn, values), strict=True))
            for v in eqn.invars:  # so that an op-by-op run frees what it no longer needs
                if not compat.is_literal(v) and last_use[v] == n and v not in keep:
                    env.pop(v, None)
        return [read(v) for v in jaxpr.outvars]

    def evaluate(self, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
        """Evaluate one equation."""
        # Op by op, a call is entered whatever it meets: bound as it is, it would be compiled, and rounded otherwise.
        met = any(isinstance(v, View) for v in values) or (compat.op_by_op() and eqn.primitive in PROGRAMS)
        rule = self.rules.get(eqn.primitive) if met else None
        outs = rule(self, eqn, values) if rule else None
        if outs is None:
            outs = compat.bind(eqn, *(self.array(v, eqn.primitive.name) for v in values))
        return outs

    def array(self, value: Any, primitive: str) -> Any:
        """Return a value as an array; a view is materialised, and `primitive` reported as the cause."""
        if not isinstance(value, View):
            return value
        self.on_fallback(value, primitive)
        return materialise(value)

    def use(self, view: View, product: Product | None, x: Any, *extra: Any) -> list[Any] | None:
        """Return the outputs of an equation in which data meets a view, or None where it does so in no known way."""
        return None if product is None else [self.product(view, product, x, *extra)]

    @property
    def target(self) -> str:
        """What the program is compiled for."""
        return self.platform or jax.default_backend()

    def call(self, eqn: compat.Eqn, build: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        """Return the compiled function that stands for a call equation of this program, built once per walk."""
        key = id(eqn)
        if key not in self.calls_here:
            # The equation is kept beside its function, so that its id stays its own.
            self.calls_here[key] = (eqn, build())
        return self.calls_here[key][1]


def as_arrays(walk: Walk, outs: Sequence[Any]) -> list[Any]:
    """Return a program's outputs as arrays."""
    return [walk.array(o, OUTPUT) for o in outs]
