"""An adapter that does not see all of its data, in random programs: one mask in the value and in all derivatives."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from jax import lax

from tests.methods.test_mask import Dropping
from tests.random_programs.forms import Form
from tests.random_programs.night import check_at_night
from tests.random_programs.program import Program, adapt, build, programs
from tests.random_programs.test_random_programs import HALVES, QUICK, error, finite

# What has derivatives that are not those of its value, or a value that jumps.
NOT_SMOOTH = {"custom_jvp", "custom_vjp", "stop_gradient", "pointwise", "reduce", "while_loop"}
FORM = Form(Dropping())


def value_of(lora: Any, params: Any, adapters: Any, x: Any) -> Any:
    return sum(jnp.sin(y).sum() for y in jax.tree.leaves(lora.apply(params, adapters, x)))


def check(program: Program) -> None:
    """Assert that fresh adapters change nothing, and that all ways to the value and its derivatives have one mask."""
    program = program.unrounded
    fn, params, x = build(program)
    lora, _ = adapt(program, fn, params, x, FORM)
    if lora is None:
        return
    r = np.random.default_rng(1)
    fresh = jax.device_put({path: FORM.fresh(site, r) for path, site in lora.sites.items()})
    trained = jax.tree.map(lambda v: v + 0.2 * r.normal(size=v.shape), fresh)
    along = jax.tree.map(lambda v: r.normal(size=v.shape), fresh)
    f = functools.partial(value_of, lora, params, x=x)

    def all_ways(fresh: Any, adapters: Any, along: Any) -> Any:
        step = 1e-6
        moved = [f(jax.tree.map(lambda v, d, s=s: v + s * step * d, adapters, along)) for s in (1, -1)]
        value, slope = jax.jvp(f, (adapters,), (along,))
        ways = [
            jax.value_and_grad(f),
            jax.value_and_grad(jax.checkpoint(f)),
            lambda of: lax.scan(lambda c, _: (c, jax.value_and_grad(f)(of)), 0, None, length=2)[1],
        ]
        found = [way(adapters) for way in ways]
        slopes = [sum(jnp.sum(g * d, range(-d.ndim, 0)) for g, d in of(grads)) for _, grads in found]
        return lora.apply(params, fresh, x), value, slope, (moved[0] - moved[1]) / (2 * step), found, slopes

    def of(grads: Any) -> Any:
        return zip(jax.tree.leaves(grads), jax.tree.leaves(along), strict=True)

    plain, value, slope, by_steps, found, slopes = jax.jit(all_ways, compiler_options=QUICK)(fresh, trained, along)
    want = jax.jit(fn, compiler_options=QUICK)(params, x)
    if not finite((want, value, by_steps)):
        return
    for got, same in zip(jax.tree.leaves(plain), jax.tree.leaves(want), strict=True):
        assert error(got, same) < 1e-9
    for other, _ in found:
        assert error(other, value) < 1e-9
    for other in slopes:
        assert error(other, slope) < 1e-8
    if abs(by_steps) < 1e3:  # of a steep one, two values that are near tell nothing
        assert error(slope, by_steps) < 1e-3, (slope, by_steps)


def check_ten(number: int, most_layers: int, phases: tuple[Phase, ...]) -> None:
    """Check ten programs of a seed."""

    @seed(number)
    @settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), database=None, phases=phases)
    @given(programs(most_layers).filter(lambda program: not NOT_SMOOTH & program.names))
    def ten(program: Program) -> None:
        note(f"\n{program}")
        check(program)

    with jax.enable_x64(True), warnings.catch_warnings():
        ten()


@pytest.mark.parametrize("number", [pytest.param(n, marks=HALVES[n].marks) for n in range(2)])
def test_a_program_has_one_mask(number):
    check_ten(2000 + number, most_layers=1, phases=(Phase.generate,))


@pytest.mark.nightly
@pytest.mark.parametrize("chunk", range(50))
def test_hundreds_of_programs_have_one_mask(chunk, request):
    check_at_night(chunk, request.node.nodeid, lambda number, phases: check_ten(number, most_layers=3, phases=phases))
