"""Products of one input with several adapted weights (q, k, v; gate, up): one pass over the input for all.

At a low rank the product x A is bound by reading x. The first factors of such weights are laid side by side,
so that x is read once forward, and its gradient written once backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rslora_jax.transform import compat
from rslora_jax.transform.dot import dot
from rslora_jax.transform.product import factored_alone, meet_all, with_met
from rslora_jax.transform.views import View

if TYPE_CHECKING:
    from rslora_jax.transform.interpreter import Frame

# What may be evaluated before its turn, to have all weights of an input at hand when the first is used.
HOISTED = {"transpose", "reshape", "squeeze", "slice", "broadcast_in_dim", "convert_element_type", "copy"}
HOISTED |= {"name", "stop_gradient", "neg", "mul", "div"}


class Product(NamedTuple):
    """A product by its place among the equations, and which of its operands is the data."""

    place: int
    side: int


def products_by_input(eqns: Sequence[compat.Eqn]) -> dict[Product, tuple[Product, ...]]:
    """Return for each product, taken from either side, all that contract the same input in the same way."""
    made: dict[Any, compat.Eqn] = {}
    found: dict[Any, list[Product]] = {}

    def origin(atom: Any) -> Any:
        """Name a value; casts of one value to one dtype, of which each layer makes its own, share their name."""
        eqn = made.get(atom)
        if eqn is None or eqn.primitive.name != "convert_element_type" or compat.is_literal(eqn.invars[0]):
            return atom
        return origin(eqn.invars[0]), eqn.params["new_dtype"]

    for place, eqn in enumerate(eqns):
        made.update((v, eqn) for v in eqn.outvars)
        if eqn.primitive.name != "dot_general" or any(compat.is_literal(v) for v in eqn.invars):
            continue
        contracted, batch = eqn.params["dimension_numbers"]
        for side in (0, 1) if not batch[0] else ():
            key = origin(eqn.invars[side]), tuple(contracted[side]), str(eqn.params["precision"])
            found.setdefault(key, []).append(Product(place, side))
    return {p: tuple(products) for products in found.values() if len(products) > 1 for p in products}


def evaluate_together(frame: Frame, like: Mapping[Product, tuple[Product, ...]], place: int) -> None:
    """Evaluate a product, and with it those of the same input, if at least two are cheapest that way.

    Args:
      frame: the jaxpr under evaluation.
      like: what `products_by_input` has found in it.
      place: where the product is.
    """
    for side in (0, 1):
        products = [p for p in like.get(Product(place, side), ()) if p.place not in frame.done]
        atoms = frame.eqns[place].invars
        if len(products) < 2 or isinstance(frame.read(atoms[side]), View) or not is_view(frame, atoms[1 - side]):
            continue
        x = frame.read(atoms[side])
        ready = []
        for p in products:
            eqn = frame.eqns[p.place]
            if not hoist(frame, eqn.invars[1 - p.side]) or not is_view(frame, eqn.invars[1 - p.side]):
                continue
            view = frame.read(eqn.invars[1 - p.side])
            how = dot(view, x, p.side == 1, eqn.params)
            if how is not None and how[0].shareable and factored_alone(how[0], x, view.w, how[1]):
                ready.append((p.place, view, *how))
        if len(ready) < 2:
            continue
        with compat.provenance(frame.eqns[place]):
            met = meet_all(tuple(op for _, _, op, _, _ in ready), x, tuple(first for _, _, _, first, _ in ready))
        for (at, view, op, _, second), xa in zip(ready, met, strict=True):
            with compat.provenance(frame.eqns[at]):
                frame.write(at, [with_met(op, x, view.w, xa, second)])


def is_view(frame: Frame, atom: Any) -> bool:
    return isinstance(frame.read(atom), View)


def hoist(frame: Frame, atom: Any) -> bool:
    """Evaluate what a weight still needs before its product; say whether that could be done."""
    made = {v: place for place, eqn in enumerate(frame.eqns) for v in eqn.outvars}
    places: list[int] = []

    def visit(atom: Any) -> bool:
        if compat.is_literal(atom) or atom in frame.env:
            return True
        place = made.get(atom)
        if place is None or frame.eqns[place].primitive.name not in HOISTED:
            return False
        if not all(visit(v) for v in frame.eqns[place].invars):
            return False
        if place not in places:
            places.append(place)
        return True

    if not visit(atom):
        return False
    for place in places:
        frame.evaluate(place)
    return True
