"""The laws of the transform, each on many kinds of program."""

import functools
import threading
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rslora_jax as rslora
from tests.program_models import Case, normal
from tests.programs import CASES
from tests.reference import assert_near, gradients_by_hand, merged_by_hand, trained

pytestmark = pytest.mark.usefixtures("compile_fast")

RANK, ALPHA = 6, 10.0  # alpha is not the rank, and the rank is no square


def wrapped(case: Case, **config) -> rslora.Lora:
    config = {"rank": RANK, "alpha": ALPHA, "targets": case.targets} | config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if case.fallback else "error", rslora.RsloraWarning)
        return rslora.wrap(case.fn, case.params, *case.args, config=rslora.LoraConfig(**config))


def first(tree):
    """The first output: some programs return more than one."""
    return jax.tree.leaves(tree)[0].astype(jnp.float32)


# One test process does all of a case: its laws share what is traced and compiled.
@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in CASES], scope="module")
def case(request) -> Case:
    return CASES[request.param]()


@pytest.fixture(scope="module")
def lora(case) -> rslora.Lora:
    return wrapped(case)


@pytest.fixture(scope="module")
def applied(lora):
    return jax.jit(lora.apply)


def test_every_weight_is_found_and_only_the_impossible_falls_back(case):
    config = rslora.LoraConfig(rank=RANK, alpha=ALPHA, targets=case.targets)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        lora = rslora.wrap(case.fn, case.params, *case.args, config=config)
    assert len(lora.sites) == case.sites
    found = [w for w in said if w.category is rslora.RsloraWarning]
    if not case.fallback:
        assert not found and not any(site.fallbacks for site in lora.sites.values())
    else:
        assert len(found) == 1 and case.fallback in str(found[0].message)
        assert [site.fallbacks for site in lora.sites.values()] == [(case.fallback,)]


@functools.cache
def compiled(fn):
    return jax.jit(fn)


@pytest.mark.by_day_on("oldest")  # op by op, JAX compiles each operation
def test_law_1_fresh_adapters_change_no_bit(case, lora):
    adapters = lora.init(jax.random.key(3))
    with jax.disable_jit():
        chex.assert_trees_all_equal(lora.apply(case.params, adapters, *case.args), case.fn(case.params, *case.args))


@pytest.mark.by_day_on("newest")
def test_law_1_fresh_adapters_change_nothing(case, lora, applied):
    adapters = lora.init(jax.random.key(3))
    got = applied(case.params, adapters, *case.args)
    tolerance = 1e-6 if case.tolerance < 1e-3 else case.tolerance
    assert_near(got, compiled(case.fn)(case.params, *case.args), tolerance)


def test_law_2_apply_is_merge(case, lora, applied):
    adapters = trained(lora)
    fn = compiled(case.fn)
    by_hand = fn(merged_by_hand(lora, case.params, adapters), *case.args)
    assert_near(fn(lora.merge(case.params, adapters), *case.args), by_hand, case.tolerance)
    assert_near(applied(case.params, adapters, *case.args), by_hand, case.tolerance)
    assert np.abs(first(by_hand) - first(fn(case.params, *case.args))).max() > 0.01


def test_law_2_gradients_are_those_through_merged_weights(case, lora):
    """dA and dB are compared with those that the chain rule gives, in numpy, from the merged weights' gradient."""
    adapters = trained(lora)
    if "while" in str(jax.make_jaxpr(case.fn)(case.params, *case.args)):
        pytest.skip("JAX has no reverse mode for while loops of unknown length")

    def loss(out):
        return jnp.sum(jnp.sin(first(out)))

    got = jax.jit(jax.grad(lambda a: loss(lora.apply(case.params, a, *case.args))))(adapters)
    gradient = jax.jit(jax.grad(lambda p: loss(case.fn(p, *case.args)), allow_int=True))
    dw = gradient(merged_by_hand(lora, case.params, adapters))
    want = gradients_by_hand(lora, adapters, dw)
    assert all(got[name][k].dtype == jnp.float32 for name in want for k in "ab")
    assert_near(got, want, max(10 * case.tolerance, 1e-4) if case.tolerance < 1e-3 else 0.15)


# Law 3: the scale is each weight's own.


@pytest.mark.parametrize(
    ("scaling", "power"), [("rslora", -0.5), ("lora", -1.0), ("constant", 0.0), (lambda r: r**-0.25, -0.25)]
)
def test_law_3_scale_is_that_of_the_weights_own_rank_and_alpha(scaling, power):
    def fn(p, x):
        return x @ p["one"] + x @ p["two"]

    params, x = {"one": normal(0, 20, 30), "two": normal(1, 20, 30)}, normal(2, 4, 20)
    config = rslora.LoraConfig(rank=5, alpha=7, rank_pattern={"tw*": 11}, alpha_pattern={"two": 3}, scaling=scaling)
    lora = rslora.wrap(fn, params, x, config=config)
    adapters = trained(lora)
    x64 = np.asarray(x, np.float64)
    want = np.asarray(fn(params, x), np.float64)
    for name, rank, alpha in (("one", 5, 7), ("two", 11, 3)):
        a, b = (np.asarray(adapters[name][k], np.float64) for k in "ab")
        assert a.shape == (20, rank)
        want = want + alpha * rank**power * (x64 @ a @ b)
        assert lora.sites[name].gamma == pytest.approx(alpha * rank**power)
    np.testing.assert_allclose(lora.apply(params, adapters, x), want, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(fn(lora.merge(params, adapters), x), want, rtol=2e-5, atol=2e-5)


# Law 4: the base is frozen, and free. Law 6: the order is the cheapest.

WIDTH, LAYERS = 128, 4


def chain(p, x):
    return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, p["w"])[0]


def compiled_steps(tokens, rank):
    """Compile the adapters' gradient and the base's own value and data gradient, on the same chain of layers."""
    params, x = {"w": normal(0, LAYERS, WIDTH, WIDTH)}, normal(1, tokens, WIDTH)
    lora = rslora.wrap(chain, params, x, config=rslora.LoraConfig(rank=rank, alpha=3))
    adapters = lora.init(jax.random.key(0))
    step = jax.jit(jax.grad(lambda a, p, x: lora.apply(p, a, x).sum(), argnums=(0, 2)))
    floor = jax.jit(jax.grad(lambda x, p: chain(p, x).sum()))
    full = jax.jit(jax.grad(lambda p, x: chain(p, x).sum(), argnums=(0, 1)))
    return step.lower(adapters, params, x).compile(), floor.lower(x, params).compile(), full.lower(params, x).compile()


def least_on_paper(t, d, r):
    """DESIGN's table by hand, for a square weight in float32: all eight orders, and the sum kept where it is small."""
    best = None
    for forward in (0, 1):
        for dx in (0, 1):
            for through_dw in (0, 1):
                kept = forward and dx and d * d <= t * r
                cost = (2 * r * d * d) if forward else 4 * t * r * d
                cost += (0 if kept else 2 * r * d * d) if dx else 4 * t * r * d
                xa_and_dyb = 2 * t * r * d * (forward + dx)  # what is not at hand
                cost += 2 * t * d * d + 4 * r * d * d if through_dw else 4 * t * r * d + xa_and_dyb
                best = cost if best is None else min(best, cost)
    return best


@pytest.mark.parametrize(("tokens", "rank"), [(512, 3), (512, 24), (512, 80), (512, 128), (60, 24), (60, 128)])
def test_laws_4_and_6_flops_are_the_least_on_paper_and_hold_no_base_gradient(tokens, rank):
    step, floor, full = compiled_steps(tokens, rank)

    # XLA counts the body of a scan once, so the chain's cost is that of one layer.
    def body(compiled):
        return compiled.cost_analysis()["flops"]

    paper = least_on_paper(tokens, WIDTH, rank)
    assert body(step) - body(floor) == pytest.approx(paper, rel=0.02, abs=12 * tokens * WIDTH)
    if rank < WIDTH / 8:
        assert body(step) < 0.9 * body(full)


def test_law_4_nothing_of_base_size_is_kept():
    params, x = {"w": normal(0, 24, WIDTH, WIDTH)}, normal(1, 16, WIDTH)
    lora = rslora.wrap(chain, params, x, config=rslora.LoraConfig(rank=3, alpha=7))
    adapters = lora.init(jax.random.key(0))
    grad = jax.jit(jax.grad(lambda a, p, x: lora.apply(p, a, x).sum()))
    compiled = grad.lower(adapters, params, x).compile()
    base = params["w"].nbytes
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * base
    closed = jax.make_jaxpr(lambda a, p, x: lora.apply(p, a, x))(adapters, params, x)
    assert not [c for c in closed.consts if np.size(c) >= WIDTH * WIDTH]
    assert sum(x.nbytes for x in jax.tree.leaves(adapters)) == 4 * 24 * 2 * WIDTH * 3


def test_law_6_an_update_is_not_rounded_away_in_a_bfloat16_weight():
    """Each entry of the update is far below half a unit in the last place of the weight's."""
    x, w = jnp.ones((4096, 64), jnp.bfloat16), jnp.ones((64, 64), jnp.bfloat16)

    def fn(p, x):
        return jnp.matmul(x, p["w"], preferred_element_type=jnp.float32)

    lora = rslora.wrap(fn, {"w": w}, x, config=rslora.LoraConfig(rank=3, alpha=7))
    gamma = 7 / np.sqrt(3)
    adapters = {"w": {"a": jnp.full((64, 3), 1.0), "b": jnp.full((3, 64), 2.0**-12 / 3 / gamma)}}
    update = jax.jit(lora.apply)({"w": w}, adapters, x) - fn({"w": w}, x)
    np.testing.assert_allclose(update, 64 * 2.0**-12, rtol=0.02)


# Law 5: exact or loud.


@jax.custom_vjp
def straight_through(x, w):
    return x @ jnp.round(4 * w)


straight_through.defvjp(
    lambda x, w: (straight_through(x, w), (x, w)), lambda res, dy: (dy @ res[1].T, 3 * res[0].T @ dy)
)


@jax.custom_jvp
def doubled(x, w):
    return x @ w


doubled.defjvp(lambda primals, tangents: (doubled(*primals), 2 * (primals[0] @ tangents[1]) + tangents[0] @ primals[1]))

LOUD = {
    "custom_vjp_call": lambda p, x: straight_through(x, p["w"]) + x @ p["w"],
    "derivative rule of custom_jvp": lambda p, x: doubled(x, p["w"]),
    "sort": lambda p, x: x @ p["w"] + x @ jnp.sort(p["w"]),
    "dot_general of two weights": lambda p, x: x @ (p["w"] @ p["w"]),
    "output of the function": lambda p, x: (x @ p["w"], p["w"]),
}


@pytest.mark.parametrize("primitive", list(LOUD))
def test_law_5_a_use_without_a_rule_is_exact_and_said_once(primitive):
    fn = LOUD[primitive]
    params, x = {"w": normal(0, 16, 16), "v": normal(1, 16, 16)}, normal(2, 5, 16)
    config = rslora.LoraConfig(rank=3, alpha=7, targets=["w"])
    with pytest.warns(rslora.RsloraWarning, match=primitive) as said:
        lora = rslora.wrap(fn, params, x, config=config)
    assert len([w for w in said if w.category is rslora.RsloraWarning]) == 1
    assert lora.sites["w"].fallbacks == (primitive,)
    assert "materialised" in str(lora)
    adapters = trained(lora)
    with warnings.catch_warnings():
        warnings.simplefilter("error", rslora.RsloraWarning)
        got = lora.apply(params, adapters, x)
        grads = jax.grad(lambda a: first(lora.apply(params, a, x)).sum())(adapters)
    assert_near(got, fn(merged_by_hand(lora, params, adapters), x), 1e-5)
    expected = jax.grad(lambda a: first(fn(lora.merge(params, a), x)).sum())(adapters)
    assert_near(grads, expected, 1e-5)
    with pytest.raises(ValueError, match="on_fallback"):
        rslora.wrap(fn, params, x, config=rslora.LoraConfig(rank=3, alpha=7, targets=["w"], on_fallback="error"))


def test_law_5_a_use_that_only_another_shape_shows_is_said_then():
    def fn(p, x):
        return x @ p["w"] if len(x) < 8 else x @ jnp.tanh(p["w"])

    params = {"w": normal(0, 16, 16)}
    lora = rslora.wrap(fn, params, normal(2, 5, 16), config=rslora.LoraConfig(rank=3, alpha=7))
    adapters = trained(lora)
    with pytest.warns(rslora.RsloraWarning, match="tanh"):
        got = lora.apply(params, adapters, normal(2, 9, 16))
    assert_near(got, fn(merged_by_hand(lora, params, adapters), normal(2, 9, 16)), 1e-5)


# Law 7: purity. Law 8: one compile.


def test_law_7_threads_do_not_disturb_each_other():
    case = CASES["mlp"]()
    loras = [wrapped(case, rank=r) for r in (3, 5, 3, 5)]
    adapters = [trained(lora, seed=n) for n, lora in enumerate(loras)]
    want = [case.fn(merged_by_hand(lora, case.params, a), *case.args) for lora, a in zip(loras, adapters, strict=True)]
    got: list = [None] * 4

    def work(n):
        for _ in range(2):
            got[n] = loras[n].apply(case.params, adapters[n], *case.args)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert_near(got, want, 1e-5)


def test_law_8_the_same_shapes_trace_once_and_other_adapters_do_not_recompile():
    params, x = {"w": normal(0, 3, 16, 16)}, normal(1, 5, 16)

    @chex.assert_max_traces(n=2)
    def fn(p, x):
        return jax.lax.scan(lambda x, w: (jax.jit(jnp.matmul)(x, w), None), x, p["w"])[0]

    lora = rslora.wrap(fn, params, x, config=rslora.LoraConfig(rank=3, alpha=7))
    step = jax.jit(lora.apply)
    for seed in range(3):
        adapters = trained(lora, seed)
        lora.apply(params, adapters, x)
        step(params, adapters, x)
    assert step._cache_size() == 1
    lora.apply(params, adapters, normal(1, 9, 16))  # another shape: the second and last trace


def test_law_8_a_second_call_op_by_op_traces_and_compiles_nothing():
    """The calls that the program holds (a jit, a scan) are kept too, not only the program."""
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, _, **__: events.append(name))
    params, x = {"w": normal(0, 3, 16, 16)}, normal(1, 5, 16)

    def fn(p, x):
        return jax.lax.scan(lambda x, w: (jax.jit(jnp.matmul)(x, w), None), x, p["w"])[0]

    lora = rslora.wrap(fn, params, x, config=rslora.LoraConfig(rank=3, alpha=7))
    first, second = trained(lora, 0), trained(lora, 1)

    def seen():
        return sum("compile" in name for name in events)

    lora.apply(params, first, x)
    before = seen()
    lora.apply(params, second, x)
    assert seen() == before > 0


def test_apply_composes_with_vmap_over_adapters_checkpoint_scan_and_forward_mode():
    case = CASES["mlp"]()
    lora = wrapped(case)
    many = [trained(lora, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *many)
    want = jnp.stack([case.fn(merged_by_hand(lora, case.params, a), *case.args) for a in many])
    assert_near(jax.vmap(lora.apply, (None, 0, None))(case.params, stacked, *case.args), want, 1e-5)
    scanned = jax.lax.scan(lambda c, a: (c, jax.checkpoint(lora.apply)(case.params, a, *case.args)), 0, stacked)[1]
    assert_near(scanned, want, 1e-5)

    def loss(a):
        return jnp.sum(jnp.sin(lora.apply(case.params, a, *case.args)))

    forward = jax.jvp(loss, (many[0],), (many[1],))[1]
    backward = jax.tree.map(lambda g, t: (g * t).sum(), jax.grad(loss)(many[0]), many[1])
    assert float(forward) == pytest.approx(float(sum(jax.tree.leaves(backward))), rel=1e-4)
