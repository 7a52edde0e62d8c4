"""Several adapters as one: by numpy in float64, from the definitions."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import rslora_jax as rslora
from rslora_jax.several.combine import METHODS
from tests.several.programs import ALL, PARAMS, TOKENS, configs, drawn, kinds, update, updates_of, wrapped

# Adapters in float64 are said to be of more bits than JAX has, and ranks above a weight's own are said too.
pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.filterwarnings("ignore")]

PRUNE = [method for method in METHODS if "ties" in method or "dare" in method or "prune" in method]

weighted = st.lists(st.tuples(configs, st.floats(-2, 2, width=32)), min_size=1, max_size=3)


def pairs_of(configs):
    loras = [wrapped(**config, dtype="float64") for config in configs]
    return [(lora, drawn(lora, seed, np.float64)) for seed, lora in enumerate(loras)]


def sums(pairs, configs, weights):
    """The sum of w gamma A B at each site, gamma from the definition."""
    total = {}
    for (lora, adapters), config, weight in zip(pairs, configs, weights, strict=True):
        for path, one in updates_of(config, adapters, lora.sites).items():
            total[path] = total.get(path, 0) + weight * one
    return total


def updates(lora, adapters):
    assert all(site.gamma == 1 for site in lora.sites.values())
    return {path: update(site, 1, adapters[path]) for path, site in lora.sites.items()}


def assert_all_near(got, want, tolerance=1e-10):
    assert got.keys() == want.keys()
    for path in want:
        np.testing.assert_allclose(got[path], want[path], rtol=tolerance, atol=tolerance, err_msg=path)


@given(weighted)
@settings(max_examples=15, deadline=None, phases=[Phase.generate])
def test_cat_and_svd_of_full_rank_are_the_sum_of_the_updates(drawn):
    configs, weights = zip(*drawn, strict=True)
    pairs = pairs_of(configs)
    want = sums(pairs, configs, weights)
    lora, adapters = rslora.combine(pairs, weights, "cat")
    assert_all_near(updates(lora, adapters), want)
    assert rslora.wrap(kinds, PARAMS, TOKENS, config=lora.config).sites == lora.sites
    lora, adapters = rslora.combine(pairs, weights, "svd", rank=60)
    assert_all_near(updates(lora, adapters), want)
    assert all(site.rank == min(site.in_size, site.out_size) for site in lora.sites.values())


@given(weighted, st.integers(1, 3))
@settings(max_examples=8, deadline=None, phases=[Phase.generate])
def test_svd_of_a_rank_is_the_nearest_of_that_rank(drawn, rank):
    configs, weights = zip(*drawn, strict=True)
    pairs = pairs_of(configs)
    want = sums(pairs, configs, weights)
    got = updates(*rslora.combine(pairs, weights, "svd", rank=rank))
    for path in want:
        missed = np.linalg.norm(got[path] - want[path], axis=(-1, -2))
        least = np.sqrt((np.linalg.svd(want[path], compute_uv=False)[..., rank:] ** 2).sum(-1))
        np.testing.assert_allclose(missed, least, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weight", [1.0, -0.7])
def test_one_adapter_of_which_all_is_kept_is_that_times_its_weight(method, weight):
    ranks, targets = {"layers/{1..2}/up": 5}, [*ALL[2:], "layers/{0,2}/up"]
    config = {
        "rank": 3,
        "alpha": 7,
        "scaling": "rslora",
        "targets": targets,
        "rank_pattern": ranks,
        "alpha_pattern": {},
    }
    pairs = pairs_of([config])
    options = {"density": 1.0, "key": jax.random.key(0)} if method in PRUNE else {}
    got = updates(*rslora.combine(pairs, [weight], method, **options))
    assert_all_near(got, sums(pairs, [config], [weight]))


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_that_one_lacks_counts_as_zeros(method):
    one, both = (wrapped(rank=3, alpha=7, targets=targets) for targets in (ALL[1:4], ALL[1:5]))
    adapters, others = drawn(one, 0), drawn(both, 1)
    zeros = adapters | {"kernel": {name: np.zeros_like(array) for name, array in others["kernel"].items()}}
    options = {"density": 0.6, "key": jax.random.key(0)} if method in PRUNE else {}
    got, want = (
        updates(*rslora.combine([pair, (both, others)], [0.7, -0.3], method, **options))
        for pair in ((one, adapters), (both, zeros))
    )
    assert_all_near(got, want, 1e-6)


def by_loops(method, sources, weights, density):
    """Merge arrays entry by entry, by the papers: 2306.01708, section 3, and what prunes by size alone."""
    kept = []
    for source in sources:
        order = np.argsort(-np.abs(source), axis=None)[: int(density * source.size)]
        kept.append({np.unravel_index(n, source.shape): source[np.unravel_index(n, source.shape)] for n in order})
    out = np.zeros(sources[0].shape)
    for at in np.ndindex(*out.shape):
        there = [(w, k.get(at, 0.0)) for w, k in zip(weights, kept, strict=True)]
        if method == "magnitude_prune":
            out[at] = sum(w * v for w, v in there)
            continue
        sign = 1 if sum(v for _, v in there) >= 0 else -1
        agreeing = [w * v for w, v in there if v * sign > 0]
        out[at] = sum(agreeing) / max(len(agreeing), 1)
    return out


@pytest.mark.parametrize("method", ["ties", "magnitude_prune", "ties_svd", "magnitude_prune_svd"])
def test_pruned_and_elected_by_loops_over_entries_with_each_weights_own_scale(method):
    """Of the update, or of the factors times the root of w gamma, layer by layer."""
    loras = [wrapped(rank=4, alpha=alpha, scaling=s, targets=ALL[2:3]) for alpha, s in ((7, "rslora"), (3, "constant"))]
    pairs = [(lora, drawn(lora, n)) for n, lora in enumerate(loras)]
    gammas, weights = [7 / 2, 3], [0.8, -0.5]
    _, adapters = rslora.combine(pairs, weights, method, density=0.55)
    for layer in range(3):
        a, b = ([its["layers/down"][name][layer].astype(float) for _, its in pairs] for name in "ab")
        if method.endswith("svd"):
            whole = [g * x @ y for g, x, y in zip(gammas, a, b, strict=True)]
            u, s, v = np.linalg.svd(by_loops(method.removesuffix("_svd"), whole, weights, 0.55))
            want = (u[:, :4] * s[:4]) @ v[:4]
        else:
            sizes = [np.sqrt(abs(w * g)) for w, g in zip(weights, gammas, strict=True)]
            signed = [np.sign(w) * size for w, size in zip(weights, sizes, strict=True)]
            want = by_loops(method, a, signed, 0.55) @ by_loops(method, b, sizes, 0.55)
        got = adapters["layers/down"]["a"][layer] @ adapters["layers/down"]["b"][layer]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_what_drops_at_random_keeps_a_part_and_makes_it_as_much_larger():
    lora = wrapped(rank=8, alpha=8, scaling="lora", targets=["table"])
    ones = {"table": {name: np.ones(shape, np.float32) for name, shape in lora.sites["table"].factor_shapes.items()}}
    kept = []
    for seed in range(20):
        _, got = rslora.combine([(lora, ones)], [1.0], "dare_linear", density=0.3, key=jax.random.key(seed))
        assert set(np.unique(got["table"]["a"])) == {0, np.float32(1 / 0.3)}
        kept.append((got["table"]["a"] > 0).mean())
    assert abs(np.mean(kept) - 0.3) < 4 * np.sqrt(0.21 / (20 * 20 * 8))
    both = [
        rslora.combine([(lora, ones)] * 2, [1, 1], "dare_linear", density=0.3, key=jax.random.key(seed))[1]["table"]
        for seed in (0, 0, 1)
    ]
    assert np.array_equal(both[0]["a"], both[1]["a"]) and not np.array_equal(both[0]["a"], both[2]["a"])
    assert len(np.unique(both[0]["a"])) == 3  # each adapter drops its own


def of_one(**config):
    lora = wrapped(**{"rank": 2, "alpha": 3, "targets": ["head"]} | config)
    return lora, drawn(lora, 0)


def with_nan():
    lora, adapters = of_one()
    adapters["head"]["b"][0, 0] = np.nan
    return lora, adapters


WRONG = {
    "method='tise' is not known: did you mean 'ties'?": lambda: ([of_one()], [1], {"method": "tise"}),
    "method='x' is not known: use one of linear, cat, svd, ties": lambda: ([of_one()], [1], {"method": "x"}),
    "there are 1 adapters and 2 weights": lambda: ([of_one()], [1, 2], {}),
    "the weight nan is not finite": lambda: ([of_one()], [float("nan")], {}),
    "there are no adapters to combine": lambda: ([], [], {}),
    "'linear' has a rank of its own: leave out rank=3": lambda: ([of_one()], [1], {"rank": 3}),
    "rank=0 is not a positive whole number": lambda: ([of_one()], [1], {"method": "svd", "rank": 0}),
    "'ties' prunes: pass density=": lambda: ([of_one()], [1], {"method": "ties"}),
    "'cat' prunes nothing: leave out density=0.5": lambda: ([of_one()], [1], {"method": "cat", "density": 0.5}),
    "density=0 is no part": lambda: ([of_one()], [1], {"method": "ties", "density": 0}),
    "'dare_ties' drops entries at random: pass key=": lambda: (
        [of_one()],
        [1],
        {"method": "dare_ties", "density": 0.5},
    ),
    "majority_sign_method='most' is not known": lambda: ([of_one()], [1], {"majority_sign_method": "most"}),
    "the method DoRA cannot be combined": lambda: ([of_one(method="dora")], [1], {}),
    "adapter head/b is not finite": lambda: ([with_nan()], [1], {"method": "svd"}),
    "the adapters are of different bases: parameter experts is (2, 8, 8)": lambda: (
        [
            of_one(),
            (
                other := rslora.wrap(lambda p, x: x @ p["w"], {"w": jnp.ones((4, 4))}, jnp.ones((2, 4))),
                drawn(other, 0),
            ),
        ],
        [1, 1],
        {},
    ),
}


@pytest.mark.parametrize("said", list(WRONG))
def test_what_cannot_be_combined_is_said(said):
    adapters, weights, options = WRONG[said]()
    with pytest.raises(ValueError, match=re.escape(said)):
        rslora.combine(adapters, weights, **options)
