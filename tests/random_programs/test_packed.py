"""Random programs over bases in the package's own formats: as over the arrays that these stand for."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st

import rslora_jax as rslora
from rslora_jax.sites import named_leaves
from rslora_jax.stored import dense
from tests.methods.gained import trained as moved
from tests.program_models import normal
from tests.random_programs.formats import FORMATS
from tests.random_programs.forms import DROPPED, PACKED, Form
from tests.random_programs.night import check_at_night
from tests.random_programs.program import Program, adapt, build, programs
from tests.random_programs.test_random_programs import HALVES, QUICK, error, finite
from tests.reference import assert_near

NOT_THE_SAME = {"effect", "shard_map", "custom_vjp", "custom_jvp"}  # op by op, or to differentiate


def of_value(lora: Any, x: Any, is_reverse: bool) -> Callable[..., Any]:
    """Return a function of adapters and base that gives a program's outputs and, if asked for, the gradient."""
    key = {"dropout_key": jax.random.key(3)} if lora.config.dropout else {}

    def value(adapters: Any, base: Any) -> Any:
        out = lora.apply(base, adapters, x, **key)
        return sum(jnp.sin(y.astype(jnp.float64)).sum() for y in jax.tree.leaves(out)), out

    return jax.value_and_grad(value, has_aux=True) if is_reverse else value


def check_packed(program: Program, form: Form, op_by_op: bool) -> None:
    """Assert that a base in a format is as that of the arrays: to the last bit op by op, to rounding compiled."""
    program = program.fitting(form)
    fn, params, x = build(program)
    loose, held, arrays = form.held(params)
    packed, plain = held(loose), arrays(loose)
    (lora, _), (other, _) = (adapt(program, fn, base, x, form) for base in (packed, plain))
    assert (lora is None) == (other is None)
    if lora is None or other is None:
        return
    r, leaves = np.random.default_rng(1), named_leaves(plain)
    fresh = {name: form.fresh(site, r, leaves[name]) for name, site in lora.sites.items()}
    adapters = jax.device_put(jax.tree.map(lambda v: v + 0.2 * r.normal(size=v.shape), fresh))
    run, same = (of_value(of, x, program.reverse_mode) for of in (lora, other))
    # What a program rounds on its way it may round the other way, of sums in another order.
    is_rounded = any(layer.dtype != "float64" for layer in program.layers) or program.rounding
    got, want = jax.jit(lambda a: (run(a, packed), same(a, plain)), compiler_options=QUICK)(adapters)
    if finite(want) and not is_rounded:
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert error(g, w) < 1e-7, (g, w)
    merged, by_arrays = (named_leaves(of.merge(b, adapters)) for of, b in ((lora, packed), (other, plain)))
    for path, w in by_arrays.items():
        np.testing.assert_allclose(dense(merged[path]), w, rtol=1e-2 if is_rounded else 1e-12, atol=1e-12, err_msg=path)
    alike = all(site.fallbacks == other.sites[path].fallbacks for path, site in lora.sites.items())
    if op_by_op and alike and not NOT_THE_SAME & program.names:
        with jax.disable_jit():
            chex.assert_trees_all_equal(run(adapters, packed), same(adapters, plain))


def check_some(number: int, count: int, most_layers: int, op_by_op: bool, phases: tuple[Phase, ...]) -> None:
    """Check some programs of a seed, each in a format and with a method."""

    @seed(number)
    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), database=None, phases=phases)
    @given(programs(most_layers), st.sampled_from(PACKED + DROPPED))
    def some(program: Program, form: Form) -> None:
        note(f"\n{program}\n{form}")
        check_packed(program, form, op_by_op)

    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("ignore", rslora.RsloraWarning)
        some()


@pytest.mark.parametrize("number", [pytest.param(n, marks=HALVES[n].marks) for n in range(2)])
def test_a_base_in_few_bits_is_as_that_of_the_arrays(number):
    check_some(3000 + number, 3, 1, False, (Phase.generate,))


@pytest.mark.nightly
@pytest.mark.parametrize("chunk", range(100))
def test_hundreds_of_programs_over_bases_in_few_bits(chunk, request):
    check_at_night(chunk, request.node.nodeid, lambda number, phases: check_some(number, 10, 3, chunk % 4 == 0, phases))


@pytest.mark.by_day_on("newest")
def test_stacks_are_joined_as_they_are_only_where_their_arrays_fit():
    """Found by a random program: of one form by their fields, of other dtypes or tiles by their arrays."""
    w, x = normal(0, 2, 4, 6), normal(1, 3, 4)
    tiled = FORMATS["qwix nf4"](w)
    whole = dataclasses.replace(tiled, scale=tiled.scale[:, :1])
    narrow = dataclasses.replace(tiled, scale=tiled.scale.astype("bfloat16"))

    def fn(p: Any, x: Any) -> Any:
        return jnp.einsum("ti,sio->tso", x, jnp.concatenate([p["one"].astype(x.dtype), p["other"].astype(x.dtype)]))

    for other in (whole, narrow):
        base = {"one": tiled, "other": other}
        plain = {name: dense(w) for name, w in base.items()}
        lora = rslora.wrap(fn, base, x, config=rslora.LoraConfig(rank=2, alpha=5))
        run = jax.jit(lora.apply)
        adapters = moved(lora.init(jax.random.key(0)))
        assert_near(run(base, adapters, x), run(plain, adapters, x), 1e-5)


@pytest.mark.by_day_on("oldest")
def test_norms_of_a_stack_that_is_none_in_its_form():
    """Found by a random program: a weight used as a stack of two, and stored as one."""
    base, x = {"w": FORMATS["nf4 whole"](normal(0, 2, 4, 6))}, normal(1, 2, 3, 4)

    def fn(p: Any, x: Any) -> Any:
        return jnp.einsum("sti,sio->sto", x, p["w"])

    lora = rslora.wrap(fn, base, x, config=rslora.LoraConfig(rank=2, alpha=5, method="dora"))
    assert lora.sites["w"].stack_axes == (0,) and not base["w"].stack
    adapters = jax.tree.map(lambda v: v + 0.1, lora.init(jax.random.key(0), base))
    a, b, m = (np.asarray(adapters["w"][name], np.float64) for name in "abm")
    total = np.asarray(dense(base["w"]), np.float64) + 5 / np.sqrt(2) * (a @ b)
    wanted = np.einsum("sti,sio,so->sto", x, total / np.linalg.norm(total, axis=1, keepdims=True), m)
    assert_near(jax.jit(lora.apply)(base, adapters, x), wanted, 1e-5)
