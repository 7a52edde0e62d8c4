"""Starts over all programs of the laws: step 0 and the merged weights as before, and factors as numpy has them."""

import functools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import rslora_jax as rslora
from rslora_jax import starts
from rslora_jax.sites import named_leaves
from tests.program_models import normal
from tests.programs import BY_DAY, CASES
from tests.reference import assert_near
from tests.stored.eight_bits import eight_bits

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]

STARTS = {
    "pissa": starts.pissa,
    "pissa:9": functools.partial(starts.pissa, niter=9),
    "olora": starts.olora,
    "orthogonal": starts.orthogonal,
}
DAY = ("linen scanned, remat", "convolution grouped", "lookup tied")
KEY = jax.random.key(3)


def wrapped(case, **config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rslora.RsloraWarning)
        config = {"rank": 2, "alpha": 5, "targets": case.targets, **config}
        return rslora.wrap(case.fn, case.params, *case.args, config=rslora.LoraConfig(**config))


def as_trained(adapters, seed=4):
    """Move every array off its start."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype), adapters)


def matrices(site, w):
    """Give a weight as (number, in, out) in float64."""
    order = (*site.stack_axes, *site.in_axes, *site.out_axes)
    return np.transpose(np.asarray(w, np.float64), order).reshape(-1, site.in_size, site.out_size)


def products(site, factors):
    """Give gamma A B as (number, in, out) in float64, and A and B."""
    a = np.asarray(factors["a"], np.float64).reshape(-1, site.in_size, site.rank)
    b = np.asarray(factors["b"], np.float64).reshape(-1, site.rank, site.out_size)
    return site.alpha / math.sqrt(site.rank) * a @ b, a, b


def expected(name, w, rank):
    """Give what gamma A B is to be of one matrix, but for OLoRA's gamma."""
    if name.startswith("pissa"):
        u, s, vt = np.linalg.svd(w, full_matrices=False)
        return u[:, :rank] * s[:rank] @ vt[:rank]
    q, r = np.linalg.qr(w.T)  # as torch has a weight
    return (q[:, :rank] @ r[:rank]).T if name == "olora" else np.zeros_like(w)


@pytest.mark.parametrize("name", [n if n in DAY else pytest.param(n, marks=pytest.mark.nightly) for n in CASES])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_step_0_is_as_before_and_trained_ones_fit_the_original_base(name, method):
    case = CASES[name]()
    lora = wrapped(case, method=method)
    before = case.fn(case.params, *case.args)
    for begin in [STARTS["pissa"]] if name in BY_DAY else STARTS.values():
        params, adapters = begin(lora, case.params, KEY)
        lora.check(params, adapters)
        assert jax.tree.structure(params) == jax.tree.structure(case.params)
        bf16 = 4e-2 if "bfloat16" in name else 0
        assert_near(lora.apply(params, adapters, *case.args), before, max(2 * case.tolerance, 2e-5))
        assert_near(lora.merge(params, adapters), case.params, max(1e-5, bf16))
        if begin is starts.orthogonal:
            continue
        trained = as_trained(adapters)
        whole, joined = starts.for_original_base(lora, trained, adapters)
        want = lora.apply(params, trained, *case.args)
        assert_near(whole.apply(case.params, joined, *case.args), want, max(4 * case.tolerance, 4e-5, bf16))
        assert_near(whole.merge(case.params, joined), lora.merge(params, trained), max(2e-5, bf16))
        again = wrapped(case, **whole.config.to_dict() | {"targets": case.targets})
        assert dict(again.sites) == dict(whole.sites)


@pytest.mark.parametrize("begin", STARTS)
@pytest.mark.parametrize("name", DAY[1:])
def test_factors_are_those_of_the_definition(name, begin):
    case = CASES[name]()
    lora = wrapped(case)
    _, adapters = STARTS[begin](lora, case.params, KEY)
    leaves = named_leaves(case.params)
    for path, site in lora.sites.items():
        got, a, b = products(site, adapters[path])
        for one, own_a, own_b, w in zip(got, a, b, matrices(site, leaves[path]), strict=True):
            scale = site.alpha / math.sqrt(site.rank) if begin == "olora" else 1
            # Random directions after nine iterations are near the leading ones, unless two are as strong.
            tolerance = 3e-2 if begin == "pissa:9" else 1e-4
            want = scale * expected(begin, w, site.rank)
            assert np.abs(one - want).max() <= tolerance * np.abs(w).max(), (path, begin)
            if begin == "olora":
                assert_near(own_b @ own_b.T, np.eye(site.rank), 1e-5)
            if begin.startswith("pissa"):  # both have the roots of the singular values
                assert_near(np.diag(own_a.T @ own_a), np.diag(own_b @ own_b.T), 1e-4)
            if begin == "orthogonal":
                assert np.abs(own_a).max() > 0.05 and np.abs(own_b).max() > 0.05


@st.composite
def einsums(draw):
    """Give a stack of weights in any order of its axes, with the einsum that uses it."""
    stack, ins, outs = (draw(st.integers(low, 2)) for low in (0, 1, 1))
    letters = iter("abcdefgh")
    of = ["".join(next(letters) for _ in range(n)) for n in (stack, ins, outs)]
    sizes = {c: draw(st.integers(2, 4)) for c in "".join(of)}
    order = draw(st.permutations("".join(of)))
    return "".join(order), of, sizes


@settings(max_examples=2, deadline=None, phases=[Phase.generate])  # to shrink would compile for minutes
@given(einsums(), st.sampled_from(["pissa", "olora"]), st.sampled_from(["rslora", "lora", "constant", "own"]))
def test_any_order_of_axes_and_any_scaling(drawn, begin, scaling):
    order, (stack, ins, outs), sizes = drawn
    shape = [sizes[c] for c in order]
    params = {"w": normal(0, *shape), "v": normal(1, *shape)}
    x = normal(1, 3, *(sizes[c] for c in stack + ins))

    def fn(p, x):
        text = f"z{stack}{ins},{order}->{stack}z{outs}"
        return jnp.einsum(text, x, p["w"]) + jnp.einsum(text, x, p["v"])

    scale = (lambda rank: rank**-0.3) if scaling == "own" else scaling
    # The config asks for more than the weights may have; a pattern, for what one has.
    config = rslora.LoraConfig(rank=3, alpha=7, scaling=scale, rank_pattern={"v": 1}, alpha_pattern={"v": 11})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rslora.RsloraWarning)
        lora = rslora.wrap(fn, params, x, config=config)
        changed, adapters = STARTS[begin](lora, params, KEY)
        trained = as_trained(adapters)
        whole, joined = starts.for_original_base(lora, trained, adapters)
        again = rslora.wrap(fn, params, x, config=whole.config)
    assert_near(lora.apply(changed, adapters, x), fn(params, x), 2e-5)
    assert_near(whole.apply(params, joined, x), lora.apply(changed, trained, x), 2e-5)
    assert dict(again.sites) == dict(whole.sites)
    assert all(math.isclose(again.sites[p].gamma, site.gamma) for p, site in lora.sites.items())


def test_layers_of_a_stack_and_sites_draw_apart():
    params, x = {"w": normal(0, 3, 12, 12), "v": normal(0, 12, 12)}, normal(1, 5, 12)

    def fn(p, x):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0] @ p["v"]

    lora = rslora.wrap(fn, params, x, config=rslora.LoraConfig(rank=2, alpha=5))
    _, adapters = starts.orthogonal(lora, params, KEY)
    drawn = [np.asarray(a) for a in (*adapters["w"]["a"], adapters["v"]["a"])]
    assert len({array.tobytes() for array in drawn}) == 4
    _, again = starts.orthogonal(lora, params, KEY)
    assert_near(again, adapters, 0)


def test_only_the_magnitudes_of_dora_are_those_of_the_original_weight():
    params, x = {"w": normal(0, 9, 7)}, normal(1, 5, 9)
    lora = rslora.wrap(lambda p, x: x @ p["w"], params, x, config=rslora.LoraConfig(rank=2, alpha=5, method="dora"))
    _, adapters = starts.pissa(lora, params, KEY)
    assert_near(adapters["w"]["m"], np.linalg.norm(np.asarray(params["w"], np.float64), axis=0), 1e-6)


def refused():
    """Give (what to wrap, its base, a start, what is said)."""
    w, x = normal(0, 6, 4), normal(1, 5, 6)

    def product(p, x):
        return x @ p["w"]

    def tied(p, t):
        return p["w"][t] @ p["w"].T

    def config(**fields):
        return {"rank": 2, "alpha": 5, **fields}

    ids = jnp.arange(3)
    yield product, {"w": eight_bits(w)}, x, config(), starts.pissa, "w is stored as EightBits"
    yield tied, {"w": w}, ids, config(targets=["w@lookup"]), starts.olora, "adapts one use of its weight"
    yield product, {"w": w}, x, config(rank=5, allow_large_rank=True), starts.pissa, "no more than 4 directions"
    yield product, {"w": w}, x, config(rank=3), starts.orthogonal, "halves it: give it an even one"
    yield product, {"w": w}, x, config(), functools.partial(starts.pissa, niter=-1), "no number of iterations"


@pytest.mark.parametrize("case", list(refused()), ids=lambda case: case[-1])
def test_what_cannot_be_is_said_in_a_sentence(case):
    fn, params, x, config, begin, said = case
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rslora.RsloraWarning)
        lora = rslora.wrap(fn, params, x, config=rslora.LoraConfig(**config))
    with pytest.raises(ValueError, match=said) as error:
        begin(lora, params, KEY)
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_what_leaves_the_base_takes_stored_weights_and_single_uses(method):
    table = normal(0, 8, 6)
    params = {"w": eight_bits(normal(1, 6, 4)), "t": table}
    config = rslora.LoraConfig(rank=2, alpha=5, targets=["w", "t@lookup"], method=method)

    def fn(p, t):
        return p["t"][t] @ p["t"].T + (p["t"][t] @ p["w"]).sum()

    lora = rslora.wrap(fn, params, jnp.arange(3), config=config)
    same, adapters = starts.orthogonal(lora, params, KEY)
    assert same is params
    dense = {"w": params["w"].dense(), "t": table}
    assert_near(lora.apply(same, adapters, jnp.arange(3)), fn(dense, jnp.arange(3)), 1e-5)


@pytest.mark.parametrize("name", ["pissa", "eva"])
def test_what_is_trained_whole_stays_as_it_starts(name):
    params, x = {"w": normal(0, 9, 7), "v": normal(1, 7, 5), "scale": jnp.ones(7)}, normal(1, 5, 9)

    def fn(p, x):
        return jnp.tanh(x @ p["w"] * p["scale"]) @ p["v"]

    config = rslora.LoraConfig(rank=2, alpha=5, trained=["scale", "v"], targets="w")
    lora = rslora.wrap(fn, params, x, config=config)
    changed, adapters = starts.begin(name, lora, params, KEY, loss=lambda run, x: run(x).sum(), batches=[x])
    assert changed["v"] is params["v"] and lora.sites.keys() == {"w", "v", "scale"}
    assert_near(adapters["v"], lora.init(KEY, params)["v"], 0)
    assert_near(lora.apply(changed, adapters, x), fn(params, x), 1e-5)
    trained = as_trained(adapters)
    if name == "pissa":
        whole, joined = starts.for_original_base(lora, trained, adapters)
        assert_near(whole.apply(params, joined, x), lora.apply(changed, trained, x), 1e-5)
