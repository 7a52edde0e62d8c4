"""The laws, on random programs: what the library does with any of them is what the merged weights do."""

import collections
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st

from rslora_jax.sites import named_leaves, path_name
from tests.random_programs.around import AROUND, FIRED
from tests.random_programs.changes import CHANGES
from tests.random_programs.forms import FORMS, PACKED, PLAIN, Form, acting
from tests.random_programs.night import check_at_night
from tests.random_programs.program import Program, adapt, alone, build, outcomes, programs
from tests.random_programs.uses import USES

OUTER = ("plain", "plain", "plain", "vmap adapters", "vmap x", "grad of grad", "scan")


COUNTED: collections.Counter[str] = collections.Counter()  # what the programs so far were

# Most of the time goes into compiling, and next to none into running.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def measured(program: Program, f: Any, outer: str) -> Any:
    """Make a function of f's value and derivatives, under one of the transformations around it."""

    def loss(*args):
        return sum(jnp.sin(y.astype(jnp.float64)).sum() for y in jax.tree.leaves(f(*args)))

    def directions(tree: Any) -> Any:
        return jax.tree.map(
            lambda v: jnp.cos(jnp.arange(v.size, dtype=jnp.float64).reshape(v.shape)).astype(v.dtype), tree
        )

    def plain(*args: Any) -> Any:
        if program.reverse_mode:
            y, pull = jax.vjp(f, *args)
            return y, pull(directions(y))
        if program.forward_mode:
            return jax.jvp(f, args, directions(args))
        return f(*args)

    def vmap_adapters(params: Any, adapters: Any, x: Any) -> Any:
        many = jax.tree.map(lambda v: jnp.stack([v, 0.5 * v, -v]), adapters)
        return jax.vmap(f, (None, 0, None))(params, many, x)

    def vmap_x(params: Any, adapters: Any, x: Any) -> Any:
        return jax.vmap(f, (None, None, 1), 0)(params, adapters, jnp.stack([x, x + 1], 1))

    def grad_of_grad(*args: Any) -> Any:
        if not program.reverse_mode or {"custom_jvp", "ragged_dot"} & program.names:
            return plain(*args)

        def inner(*args):
            return sum((g * jnp.cos(g)).sum() for g in jax.tree.leaves(jax.grad(loss, 1)(*args)))

        return jax.value_and_grad(inner, (1, 2))(*args)

    def scan(params: Any, adapters: Any, x: Any) -> Any:
        many = jax.tree.map(lambda v: jnp.stack([v, 0.5 * v]), adapters)
        return jax.lax.scan(lambda c, a: (c, jax.checkpoint(f)(params, a, x)), 0, many)[1]

    kinds = {"vmap adapters": vmap_adapters, "vmap x": vmap_x, "grad of grad": grad_of_grad, "scan": scan}
    return kinds.get(outer, plain)


def error(got: Any, want: Any) -> float:
    """Return the largest difference, relative to the largest entry; small ones as if that were 0.01."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.abs(got - want).max(initial=0) / max(np.abs(want).max(initial=0), 1e-2)


def far(got: Any, want: Any, tolerance: float, off: Any) -> list[tuple[str, float]]:
    """Return what differs, array by array, by more than a tolerance and ten times what another result `off` does.

    Where roundings move a result by a hundredth of it, the program is chaotic, and that result says nothing.
    """
    found = []
    leaves = jax.tree_util.tree_leaves_with_path(want)
    for (path, w), g, o in zip(leaves, jax.tree.leaves(got), jax.tree.leaves(off), strict=True):
        stored = {"float32": 1e-5, "bfloat16": 0.1}.get(g.dtype.name, 0)  # as the gradient by a base weight is
        assert np.isfinite(np.asarray(w, np.float64)).all(), ("not finite", path)
        noise = error(o, w)
        if noise < 0.01 and not error(g, w) <= max(tolerance, stored, 10 * noise):
            found.append((jax.tree_util.keystr(path), error(g, w)))
    return found


def finite(tree: Any) -> bool:
    return all(np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in jax.tree.leaves(tree))


def fired(f: Any, *args: Any) -> int:
    FIRED.clear()
    jax.block_until_ready(f(*args))
    jax.effects_barrier()
    return len(FIRED)


def accounted(program: Program, fn: Any, params: Any, x: Any) -> None:
    """Assert that every parameter is one of a site, left out and unused, and that the unused change nothing."""
    extra = jnp.ones((x.shape[1], 2))  # so that there is something to adapt

    def both(p, x):
        return (fn(p["own"], x), x @ p["extra"])

    lora, _ = adapt(program, both, {"own": params, "extra": extra}, x)
    places = [*lora.sites, *lora.left_out, *lora.unused]
    assert sorted(places) == sorted([*(f"own/{path}" for path in named_leaves(params)), "extra"])
    unused = [path.removeprefix("own/") for path in lora.unused]
    if not unused:
        return
    COUNTED["with an unused parameter"] += 1
    r = np.random.default_rng(3)

    def other(path, w):
        return w + r.normal(size=w.shape).astype(w.dtype) if path_name(path) in unused else w

    changed = jax.tree_util.tree_map_with_path(other, params)
    run = jax.jit(fn, compiler_options=QUICK)
    for got, want in zip(jax.tree.leaves(run(changed, x)), jax.tree.leaves(run(params, x)), strict=True):
        np.testing.assert_array_equal(got, want)


def alike_when_stored(program: Program, fn: Any, arrays: Any, held: Any, x: Any, form: Form) -> None:
    """Assert that discovery finds in stored weights what it finds in arrays."""
    (dense, _), (stored, _) = adapt(program, fn, arrays, x, form), adapt(program, fn, held, x, form)
    assert (dense is None) == (stored is None)
    if dense is None:
        return

    def bare(lora):
        return {path: dataclasses.replace(site, fallbacks=()) for path, site in lora.sites.items()}

    assert bare(dense) == bare(stored)
    assert (dense.left_out, dense.unused) == (stored.left_out, stored.unused)


def check(program: Program, outer: str, op_by_op: bool, form: Form = PLAIN) -> None:
    """Assert every law on one program."""
    if "ragged_dot" in program.names:
        outer = "plain"  # JAX has no second derivative of it, and no vmap over all its axes
    COUNTED["programs"] += 1
    program = program.fitting(form)
    if form.name:  # XLA may leave out the rounding of a format's numbers to bfloat16 where they are made wider again
        layers = [dataclasses.replace(x, dtype=x.dtype.replace("bfloat16", "float32")) for x in program.layers]
        program = dataclasses.replace(program, layers=tuple(layers))
    fn, params, x = build(program)
    params, held, arrays = form.held(params)
    if form.stored is not None:
        alike_when_stored(program, fn, arrays(params), held(params), x, form)
    else:
        accounted(program, fn, params, x)
    lora, said = adapt(program, fn, held(params), x, form)
    if lora is None:
        COUNTED["without a weight"] += 1
        return
    loud = [site for site in lora.sites.values() if site.fallbacks]
    assert bool(loud) == any("materialised" in text for text in said)

    r = np.random.default_rng(1)  # not by lora.init, which compiles for every shape
    leaves = named_leaves(arrays(params))
    fresh = {name: form.fresh(site, r, leaves[name]) for name, site in lora.sites.items()}
    trained = jax.tree.map(lambda v: v + 0.2 * r.normal(size=v.shape), fresh)
    fresh, trained = jax.device_put((fresh, trained))

    def apply(params, adapters, x):
        return lora.apply(held(params), adapters, x)

    def by_hand(off):
        return lambda params, adapters, x: fn(acting(lora, arrays(params), adapters, off), x)

    tolerance, rounding = program.tolerance, program.rounding
    computed = loud or {"inner_step", "force"} & program.names  # with the weights, in their own dtype
    if computed and any(layer.dtype != "float64" for layer in program.layers):
        # Where a weight is materialised as stored, the sum is rounded to its own dtype: what bfloat16 rounds would
        # grow without bounds on the way.
        if any(layer.dtype == "bfloat16" for layer in program.layers):
            layers = [dataclasses.replace(layer, dtype="float32") for layer in program.layers]
            return check(dataclasses.replace(program, layers=tuple(layers)), outer, op_by_op, form)
        tolerance, rounding = max(tolerance, 1e-5), max(rounding, 2.0**-24)
    if outer == "grad of grad":
        tolerance = max(20 * tolerance, 1e-7)

    if op_by_op and form.method != "dora":  # whose norms are rounded
        with jax.disable_jit():
            got, want = apply(params, fresh, x), fn(arrays(params), x)
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(g, w)
    if "effect" in program.names:

        def plainly(params, x):
            return fn(arrays(params), x)

        assert fired(apply, params, trained, x) == fired(plainly, params, x)
        assert fired(jax.jit(apply, compiler_options=QUICK), params, trained, x) == fired(
            jax.jit(plainly, compiler_options=QUICK), params, x
        )

    got_of = measured(program, apply, outer)

    def uncompiled(off, *args):
        return (got_of(*args), measured(program, by_hand(off), outer)(*args))

    both = jax.jit(uncompiled, compiler_options=QUICK)

    def first(tree):
        return jax.tree.leaves(tree)[0]

    close = tolerance if tolerance > 1e-9 else 1e-12
    for adapters, part, allowed in ((fresh, first, close), (trained, lambda tree: tree, tolerance)):
        got, want = map(part, both(0.0, params, adapters, x))
        if not finite(want):
            # XLA may compute what goes into a maximum twice, and differently in the last bit: no entry is then the
            # maximum, and JAX's gradient of it is 0 / 0. Op by op nothing is computed twice.
            both = uncompiled
            got, want = map(part, both(0.0, params, adapters, x))
        if not finite(want):  # nor is the program itself, with merged weights: there is nothing to compare with
            COUNTED["not finite"] += 1
            return
        wrong = far(got, want, allowed, want)
        if wrong:
            # A sum rounded is not a rounded weight and its adapter, and two ways to write one sum differ in the last
            # bit. How far a program carries that is seen from the merged weights, put off by a few roundings (a
            # chaotic one, through 1 to all its digits); and where there were larger ones, it has to be exact without.
            off = 8 * (rounding or 2.0**-53)
            wrong = far(got, want, allowed, part(both(off, params, adapters, x)[1]))
            if rounding:
                check(program.unrounded, outer, False, form)
        assert not wrong, wrong


def check_ten(
    number: int,
    most_layers: int,
    op_by_op: tuple[bool, ...],
    phases: tuple[Phase, ...],
    forms: Sequence[Form] = [PLAIN],
) -> None:
    """Check ten programs: hypothesis varies what it has drawn only from the eleventh on, and new ones find more."""

    @seed(number)
    @settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), database=None, phases=phases)
    @given(programs(most_layers), st.sampled_from(OUTER), st.sampled_from(op_by_op), st.sampled_from(forms))
    def ten(program: Program, outer: str, op_by_op: bool, form: Form) -> None:
        note(f"\n{program}\n{outer}\n{form}")
        check(program, outer, op_by_op, form)

    with jax.enable_x64(True):
        ten()
    print(f"random programs so far: {dict(COUNTED)}")  # pytest -rP shows it


# What has no low-rank form, for some of the choices that the piece makes.
NO_RULE = {"add_weight", "mask", "normalise", "pointwise", "product_of_weights", "repeat", "running", "scatter"}
NO_RULE |= {"stop_gradient", "convolution", "custom_jvp", "custom_vjp", "unknown_change", "unknown_use"}
# What makes no weight of it, or one that the plain product after it does not use as such.
NO_WEIGHT = {
    "broadcast",
    "choose",
    "expand",
    "index",
    "index_static",
    "index_traced",
    "merge_axes",
    "reduce",
    "reshape_any",
}
NO_WEIGHT |= {"stack", "einsum", "pointwise_use"}


@pytest.mark.parametrize("name", sorted((CHANGES.keys() | USES.keys() | AROUND.keys()) - NO_RULE - NO_WEIGHT))
def test_what_has_a_rule_never_falls_back(name):
    with jax.enable_x64(True):
        for number, shape in itertools.product(range(4), [(4, 6), (2, 3, 4)]):
            program = alone(name, 7 * number, shape)
            assert outcomes(program) == [("found", "")], f"\n{program}"


HALVES = [pytest.param(n, marks=pytest.mark.by_day_on(("oldest", "newest")[n % 2])) for n in range(14)]


@pytest.mark.parametrize("number", HALVES)
def test_every_law_on_random_programs(number):
    # Op by op, JAX compiles every operation; to shrink a program that fails can take minutes.
    check_ten(number, most_layers=1, op_by_op=(False,), phases=(Phase.generate,))


@pytest.mark.parametrize("number", [pytest.param(n, marks=HALVES[n].marks) for n in range(8)])
def test_every_law_with_a_gain_and_on_stored_weights(number):
    check_ten(1000 + number, most_layers=1, op_by_op=(False,), phases=(Phase.generate,), forms=FORMS + PACKED)


def check_chunk(chunk: int, again: str, forms: Sequence[Form]) -> None:
    """Check ten programs of a random seed, or of that which is given."""
    op_by_op = (False, False, False, True)
    check_at_night(
        chunk,
        again,
        lambda number, phases: check_ten(number, most_layers=3, op_by_op=op_by_op, phases=phases, forms=forms),
    )


@pytest.mark.nightly
@pytest.mark.parametrize("chunk", range(300))
def test_every_law_on_thousands_of_random_programs(chunk, request):
    check_chunk(chunk, request.node.nodeid, [PLAIN])


@pytest.mark.nightly
@pytest.mark.parametrize("chunk", range(200))
def test_every_law_with_gains_and_stored_weights_on_thousands(chunk, request):
    check_chunk(chunk, request.node.nodeid, FORMS)


@pytest.mark.nightly
@pytest.mark.parametrize("chunk", range(200))
def test_every_law_over_bases_in_few_bits_on_thousands(chunk, request):
    check_chunk(chunk, request.node.nodeid, PACKED)
