"""How discovery goes through a program: by the walk's own renaming rules, and noting where a weight meets data.

What is data, a weight, rows or a constant: see `transform/log.py`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import primitives

from rslora_jax.transform import calls, compat, joins
from rslora_jax.transform.entrywise import ENTRYWISE, JOINING, KEEPING, MOVING, SCALING
from rslora_jax.transform.interpreter import OUTPUT, Rule, Walk
from rslora_jax.transform.log import Log, all_sites, base, guess, is_data, is_weight, known, numeric
from rslora_jax.transform.picks import is_single, pick_of, take
from rslora_jax.transform.probe import Past, Probe, one_past
from rslora_jax.transform.rules import RULES
from rslora_jax.transform.views import Axes


@dataclasses.dataclass(frozen=True)
class Scout(Walk):
    """The walk of discovery: no view has an adapter, each is a `Probe`, and nothing is materialised.

    Attributes:
      follow: what is done where no rule applies.
    """

    follow: Rule = lambda walk, eqn, values: None

    def evaluate(self, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
        rule = self.rules.get(eqn.primitive) if any(isinstance(v, Probe) for v in values) else None
        outs = rule(self, eqn, values) if rule else None
        return self.follow(self, eqn, values) if outs is None else outs  # type: ignore[return-value]


def scouting(log: Log) -> Scout:
    """Return discovery's walk, which notes in a log what it sees."""
    rules = {
        primitive: _entering(rule) if primitive in calls.RULES else _keeping(rule) for primitive, rule in RULES.items()
    }
    rules |= {
        primitives.add_p: _adding,
        primitives.add_jaxvals_p: _adding,
        primitives.sub_p: _adding,
        primitives.dot_general_p: _product(log),
        primitives.conv_general_dilated_p: _kernel(log, "convolution", _window),
        compat.ragged_dot_general_p: _kernel(log, "product", _grouped),
        primitives.gather_p: _picking(log),
        primitives.dynamic_slice_p: _slicing(log),
        primitives.cond_p: _choosing(log),
        # Entered whatever their derivatives are, to see what the weight is used for.
        primitives.custom_jvp_call_p: _entering(calls.closed_call),
        primitives.custom_vjp_call_p: _entering(calls.closed_call),
        primitives.scan_p: _taking_apart(log, _entering(calls.RULES[primitives.scan_p])),
    }
    return Scout(rules, on_fallback=functools.partial(_lose, log), follow=_following(log))


def _lose(log: Log, view: Probe, where: str) -> None:
    """Note that a weight went where it is no weight any more."""
    log.meet(view, where, loud=where != OUTPUT)


def _following(log: Log) -> Rule:
    """Return how an equation without a rule is evaluated, and the weights in it followed through it.

    What depends on no data is still a weight (`tanh(w)`), and where it has the axes of what it was made of, it is taken
    to have them still. Adapted, it will be materialised there, and said to be. Where it meets data, it is lost, unless
    the operation or the sizes tell its axes.
    """

    def follow(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
        outs = compat.bind(eqn, *map(base, values))
        if eqn.primitive is primitives.reduce_sum_p and _written_out(values[0], eqn.params["axes"]):
            log.meet(dataclasses.replace(values[0], past=Past()), values[0].past.met, eqn.primitive)
            return outs
        weights = [v for v in values if is_weight(v)]
        if not any(map(is_data, values)):
            return [_followed(eqn, out, weights) for out in outs]
        if eqn.primitive is primitives.select_n_p and weights and not any(map(is_data, values[1:])):
            return [_met(weights[0], outs[0], weights, eqn.primitive)]
        for view in weights:
            if eqn.primitive in KEEPING and _keeps_its_axes(view, outs):
                return [_met(view, outs[0], weights, eqn.primitive), *outs[1:]]
        for view in weights:
            one = len(all_sites(weights)) == 1 and eqn.primitive not in ENTRYWISE
            axes = guess(view, values, outs) if one else None
            if axes is None:
                log.meet(view, eqn.primitive, loud=eqn.primitive not in ENTRYWISE)
                if eqn.primitive is primitives.mul_p and outs[0].ndim == len(view.shape):
                    past = dataclasses.replace(view.past, met=eqn.primitive, rows=True, copies=_lacking(view, values))
                    return [dataclasses.replace(view, w=outs[0], dtype=outs[0].dtype, past=past)]
                if eqn.primitive in MOVING and _keeps_its_axes(
                    view, outs
                ):  # a position table, or a weight and its change
                    past = dataclasses.replace(view.past, met=eqn.primitive, rows=True)
                    return [dataclasses.replace(view, w=outs[0], dtype=outs[0].dtype, past=past)]
            else:
                i, o, sure = axes
                stack = [n for n in range(len(view.shape)) if n not in (i, o)]
                log.serve(view, "product" if sure else "guessed", [i], stack, eqn)
        return outs

    return follow


def _followed(eqn: compat.Eqn, out: Any, weights: Sequence[Probe]) -> Probe:
    """Return what an operation makes of weights alone, with the axes that it can be taken to have."""
    if not weights or not numeric(out.dtype):
        return known(out)
    like = [v for v in weights if v.shape == out.shape] or [v for v in weights if len(v.shape) == out.ndim]
    axes: list[Axes] = [frozenset().union(*(v.axes[n] for v in like)) for n in range(out.ndim)]
    gone = eqn.params.get("axes")
    if not like and len(weights) == 1 and isinstance(gone, tuple) and len(weights[0].shape) == out.ndim + len(gone):
        axes = [label for n, label in enumerate(weights[0].axes) if n not in gone]
    past = one_past(weights)
    past = dataclasses.replace(past, through=past.through or eqn.primitive)
    return Probe(out, tuple(axes), out.dtype, all_sites(weights), past=past)


def _written_out(value: Any, gone: Sequence[int], shared: Sequence[int] = ()) -> bool:
    """Say whether a sum is over what was multiplied entry by entry, as a matrix product written out is."""
    if not isinstance(value, Probe) or value.past.met is not primitives.mul_p:
        return False
    labels = [label if size != 1 else frozenset() for label, size in zip(value.axes, value.shape, strict=True)]
    return any(labels[n] for n in gone) and any(of for n, of in enumerate(labels) if n not in (*gone, *shared))


def _lacking(view: Probe, values: Sequence[Any]) -> bool:
    """Say whether the data that a weight meets entry by entry lack one of its axes, as a gate by rows does."""
    data = [base(v).shape for v in values if is_data(v)]
    return any(
        label and size != 1 and all(math.prod(s[n : n + 1]) == 1 for s in data)
        for n, (label, size) in enumerate(zip(view.axes, view.shape, strict=True))
    )


def _keeps_its_axes(view: Probe, outs: Sequence[Any]) -> bool:
    """Say whether a result is still a weight: it is no larger, and no axis of it only repeats the weight."""
    return outs[0].shape == view.shape and all(size == 1 or view.axes[n] for n, size in enumerate(view.shape))


def _met(view: Probe, out: Any, weights: Sequence[Probe], where: compat.Primitive) -> Probe:
    """Return a weight that met data and kept its axes, with all weights of its shape in it."""
    alike = [v for v in weights if v.shape == view.shape]
    axes = tuple(frozenset().union(*(v.axes[n] for v in alike)) for n in range(out.ndim))
    past = one_past(alike)
    past = dataclasses.replace(past, met=past.met or where)
    return Probe(out, axes, out.dtype, all_sites(alike), past=past)


def _entering(rule: Rule) -> Rule:
    """Return the rule of a call: inside, a constant would look like data."""

    def enter(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
        return rule(walk, eqn, [_inside(v) for v in values])

    return enter


def _inside(value: Any) -> Any:
    """Return a value as it enters a call, where a constant is no tracer's fellow."""
    return value if isinstance(value, Probe) or compat.is_tracer(value) else known(jnp.asarray(value))


def _taking_apart(log: Log, rule: Rule) -> Rule:
    """Return the rule of a scan, which notes the stored axes that it takes apart."""

    def enter(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
        for v in values[sum(compat.scan_counts(eqn)) :]:
            log.apart.update(v.axes[0] if is_weight(v) else ())
        return rule(walk, eqn, values)

    return enter


def _keeping(rule: Rule) -> Rule:
    """Return a renaming rule for values that may be constants, which rules need not know."""

    def keep(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
        views = [v for v in values if isinstance(v, Probe) and v.sites]
        if not views:
            return None
        if eqn.primitive in JOINING:
            # A token put before data is data, and so are rows; but a number may scale a weight, and constants rows.
            mixed = any(compat.is_tracer(v) and (v.ndim or eqn.primitive not in SCALING) for v in values)
            if mixed or (len(views) > 1 and (eqn.primitive in SCALING or any(v.past.rows for v in views))):
                return None
        return rule(walk, eqn, [base(v) if isinstance(v, Probe) and not v.sites else v for v in values])

    return keep


def _adding(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
    """Add weights to each other or to constants; what is added to data is no weight."""
    weights = [v for v in values if is_weight(v)]
    if any(map(is_data, values)) or not weights:
        return None
    if len(weights) == 2 and weights[0].shape == weights[1].shape:
        return [joins.total(*weights)]
    plain = [base(v) if not is_weight(v) else v for v in values]
    return RULES[eqn.primitive](walk, eqn, plain) if len(weights) == 1 else None


def _product(log: Log) -> Rule:
    """Return the rule of a product: the weight that data meet is used; of two weights, the result is a weight."""

    def rule(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
        lhs, rhs = values
        if not any(isinstance(v, Probe) and v.sites for v in values):
            return None
        out = compat.bind(eqn, base(lhs), base(rhs))
        (lhs_c, rhs_c), (lhs_b, rhs_b) = eqn.params["dimension_numbers"]
        sides = [(lhs, rhs, lhs_c, lhs_b), (rhs, lhs, rhs_c, rhs_b)]
        if is_weight(lhs) and is_weight(rhs) and not any(map(_is_computed, values)):
            return [_of_weights(log, eqn, values, out[0])]
        if any(map(is_weight, values)) and not any(map(is_data, values)) and not all(map(is_weight, values)):
            return [_of_weights(log, eqn, values, out[0])]  # a weight that a constant resizes, or meets
        for view, other, contracted, batch in sides:
            if is_weight(view):
                if _is_computed(view) and not is_data(other):
                    # What was computed from a weight (latent queries) is no weight where it meets one.
                    log.meet(view, eqn.primitive, loud=_is_computed(other))
                else:
                    log.serve(view, "product", contracted, batch, eqn)
            elif isinstance(view, Probe) and view.past.rows and compat.is_tracer(other):
                if not view.past.met:
                    log.serve(view, "product", contracted, batch, eqn)
                elif view.past.copies and _written_out(view, contracted, batch):
                    log.use(dataclasses.replace(view, past=Past()), "product", contracted, batch, eqn)
                elif view.past.met in MOVING:
                    lost = dataclasses.replace(view, past=Past())
                    log.meet(lost, view.past.met, eqn.primitive)
        return out

    return rule


def _is_computed(value: Any) -> bool:
    """Say whether more was done to a weight than to rename it: among weights it then stands where data do.

    So does what is repeated for every row of the data.
    """
    if not isinstance(value, Probe):
        return False
    repeated = any(size != 1 and not label for size, label in zip(value.shape, value.axes, strict=True))
    return bool(value.past.through or value.past.met) or repeated


def _of_weights(log: Log, eqn: compat.Eqn, values: list[Any], out: Any) -> Probe:
    """Return the product of two weights, or of a weight and a constant, as a weight."""
    (lhs_c, rhs_c), (lhs_b, rhs_b) = eqn.params["dimension_numbers"]
    lhs, rhs = (v if isinstance(v, Probe) else known(jnp.asarray(v)) for v in values)
    waiting: set[int] = set()
    constant = not (lhs.sites and rhs.sites)
    if constant and (lhs.past.resized or rhs.past.resized):
        # Mapped along one axis after the other, as an image is resized: no product but that with data counts.
        log.withdrawn |= lhs.past.waiting | rhs.past.waiting
        lhs, rhs = (dataclasses.replace(v, past=dataclasses.replace(v.past, waiting=frozenset())) for v in (lhs, rhs))
    for view, contracted, batch in ((lhs, lhs_c, lhs_b), (rhs, rhs_c, rhs_b)):
        if constant and view.past.resized:
            continue
        noted = log.use(view, "product", contracted, batch, eqn) if view.sites else set()
        waiting |= noted
        log.right |= noted if view is rhs else set()
    free_l = [n for n in range(len(lhs.shape)) if n not in (*lhs_c, *lhs_b)]
    free_r = [n for n in range(len(rhs.shape)) if n not in (*rhs_c, *rhs_b)]
    summed = [lhs.axes[n] for n in lhs_c] + [rhs.axes[n] for n in rhs_c]
    axes = [lhs.axes[m] | rhs.axes[n] for m, n in zip(lhs_b, rhs_b, strict=True)]
    # A constant that a weight is mapped by (as by a resize) has the axes it maps them to.
    gone = frozenset().union(*summed)
    axes += [lhs.axes[n] if lhs.sites else gone for n in free_l] + [rhs.axes[n] if rhs.sites else gone for n in free_r]
    past = one_past([v for v in (lhs, rhs) if v.sites])
    if lhs.sites and rhs.sites:
        past = dataclasses.replace(past, summed=past.summed | gone)
    elif rhs.sites:
        past = dataclasses.replace(past, mapped=past.mapped | gone)
    past = dataclasses.replace(past, waiting=past.waiting | waiting, resized=past.resized or constant)
    return Probe(out, tuple(axes), out.dtype, all_sites([v for v in (lhs, rhs) if v.sites]), past=past)


def _kernel(log: Log, kind: str, axes_of: Callable[[dict[str, Any]], tuple[Sequence[int], Sequence[int]]]) -> Rule:
    """Return the rule of an operation whose second operand is the weight; `axes_of`: those summed, and those shared."""

    def rule(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
        x, weight, *_ = values
        if not any(isinstance(v, Probe) and v.sites for v in values):
            return None
        if is_weight(x):
            log.meet(x, eqn.primitive, loud=False)
        if isinstance(weight, Probe) and weight.sites:
            log.serve(weight, kind, *axes_of(eqn.params), eqn)
        return compat.bind(eqn, *map(base, values))

    return rule


def _window(params: dict[str, Any]) -> tuple[Sequence[int], Sequence[int]]:
    """Return a convolution's summed axes: the window's and the input features'."""
    return params["dimension_numbers"].rhs_spec[1:], ()


def _grouped(params: dict[str, Any]) -> tuple[Sequence[int], Sequence[int]]:
    """Return a ragged product's summed and shared axes, the experts' among these."""
    numbers = params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    return contracted, (*batch, *numbers.rhs_group_dimensions)


def _picking(log: Log) -> Rule:
    """Return the rule of a gather: one place is a pick from a stack, and several are rows of a table."""

    def rule(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
        view, indices = values
        if is_weight(indices):
            log.meet(indices, eqn.primitive, loud=False)
        if not (isinstance(view, Probe) and view.sites):
            return None
        pick = pick_of(eqn.params, view.shape)
        picked = None if pick is None else take(view, pick, base(indices))
        if pick is None or picked is None:
            return None
        if is_single(pick, base(indices)) and not _is_row(view, pick.row, indices):
            return [picked]
        waiting = log.use(view, "lookup", [pick.row], pick.stack, eqn) if not view.past.rows else set()
        log.by_data |= waiting if is_data(indices) else set()
        past = dataclasses.replace(view.past, rows=True, waiting=view.past.waiting | waiting)
        return [dataclasses.replace(picked, past=past)]  # type: ignore[call-arg]

    return rule


def _is_row(view: Probe, axis: int, index: Any) -> bool:
    """Say whether one place is picked by data, and only a vector is left: a table's row, and not one of a stack."""
    rest = [size for n, size in enumerate(view.shape) if n != axis and size != 1]
    return is_data(index) and len(rest) == 1


def _slicing(log: Log) -> Rule:
    """Return the rule of a slice that starts where it is told, which may be a look-up of one row."""

    def rule(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
        view, *starts = values
        if not (isinstance(view, Probe) and view.sites) or any(map(is_weight, starts)):
            return None
        (out,) = RULES[eqn.primitive](walk, eqn, [view, *map(base, starts)]) or [None]
        sizes = eqn.params["slice_sizes"]
        rows = [n for n, size in enumerate(view.shape) if sizes[n] != size]
        if out is None or view.past.rows or len(rows) != 1 or sizes[rows[0]] != 1:
            return None if out is None else [out]
        if not _is_row(view, rows[0], starts[rows[0]]):
            return [out]
        waiting = log.use(view, "lookup", rows, (), eqn)
        past = dataclasses.replace(view.past, rows=True, waiting=view.past.waiting | waiting)
        return [dataclasses.replace(out, past=past)]

    return rule


def _choosing(log: Log) -> Rule:
    """Return the rule of a conditional: every branch is walked, and a choice between weights is a weight."""

    def rule(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
        inside = [_inside(v) for v in values]
        branches = [walk.run(jaxpr, inside[1:]) for jaxpr in eqn.params["branches"]]

        def one(outs: Sequence[Any]) -> Any:
            weights = [o for o in outs if is_weight(o)]
            first = base(outs[0])
            if any(map(is_data, outs)) or not weights:
                for view in weights:
                    log.meet(view, eqn.primitive)
                chosen = any(map(is_data, [*outs, values[0]]))
                return jnp.asarray(first) if chosen else known(jnp.asarray(first))
            if not is_data(values[0]) and len(outs) == 1:
                return outs[0]
            return _met(weights[0], jnp.asarray(first), weights, eqn.primitive)

        return [one(outs) for outs in zip(*branches, strict=True)]

    return rule
