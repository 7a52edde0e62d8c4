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
from tests.several.programs import ALL, PARAMS, TOKENS, configs, drawn, kinds, pieces_of, update, updates_of, wrapped

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


def by_loops(method, sources, weights, density, election="total"):
    """Merge arrays entry by entry, by the papers: 2306.01708, section 3, and what prunes by size alone."""
    shape, kept = np.max([source.shape for source in sources], 0), []
    for source in sources:
        order = np.argsort(-np.abs(source), axis=None, kind="stable")[: int(density * source.size)]
        kept.append({np.unravel_index(n, source.shape): source[np.unravel_index(n, source.shape)] for n in order})
    out = np.zeros(shape)
    for at in np.ndindex(*out.shape):
        there = [(w, k.get(at, 0.0)) for w, k in zip(weights, kept, strict=True)]
        if method in ("linear", "magnitude_prune"):
            out[at] = sum(w * v for w, v in there)
            continue
        sign = 1 if sum(v if election == "total" else np.sign(v) for _, v in there) >= 0 else -1
        agreeing = [w * v for w, v in there if v * sign > 0]
        out[at] = sum(agreeing) / max(len(agreeing), 1)
    return out


DTYPES = {"bfloat16": 3e-2, "float32": 1e-5, "float64": 1e-10}  # and what rounding once to them may cost
BY_LOOPS = ["linear", *(f"{kind}{how}" for kind in ("ties", "magnitude_prune") for how in ("", "_svd"))]
of_any = st.tuples(configs, st.sampled_from([-1.5, -0.3, 0.0, 0.7, 2.0]), st.sampled_from([*DTYPES]))


def wanted(method, pieces, weights, density, election):
    """The update of one element of a stack, from the (gamma, A, B) of each adapter that has one there."""
    if method.endswith("svd"):
        whole = [gamma * a @ b for gamma, a, b in pieces]
        return by_loops(method.removesuffix("_svd"), whole, weights, density, election)
    scales = [weight * gamma for weight, (gamma, _, _) in zip(weights, pieces, strict=True)]
    sizes = [np.sqrt(abs(scale)) for scale in scales]
    signed = [np.sign(scale) * size for scale, size in zip(scales, sizes, strict=True)]
    first, second = ([piece[n] for piece in pieces] for n in (1, 2))
    return by_loops(method, first, signed, density, election) @ by_loops(method, second, sizes, density, election)


@given(
    st.lists(of_any, min_size=1, max_size=3),
    st.sampled_from(BY_LOOPS),
    st.sampled_from([0.003, 0.4, 1.0]),
    st.sampled_from(["total", "frequency"]),
)
@settings(max_examples=10, deadline=None, phases=[Phase.generate])
def test_by_loops_over_entries_with_each_weights_own_scale(drawn_, method, density, election):
    """Of the update, or of the factors times the root of w gamma, layer by layer."""
    configs, weights, dtypes = zip(*drawn_, strict=True)
    loras = [wrapped(**config, dtype=dtype) for config, dtype in zip(configs, dtypes, strict=True)]
    pairs = [(lora, drawn(lora, n, jnp.dtype(lora.config.dtype))) for n, lora in enumerate(loras)]
    each = [pieces_of(config, its, own.sites) for config, (own, its) in zip(configs, pairs, strict=True)]
    pruned = {} if method == "linear" else {"density": density}
    lora, adapters = rslora.combine(
        pairs, weights, method, rank=60 if "svd" in method else None, majority_sign_method=election, **pruned
    )
    tolerance = min(DTYPES[dtype] for dtype in dtypes)
    for path, got in updates(lora, adapters).items():
        got = got.reshape(-1, *got.shape[-2:])
        for n, one in enumerate(got):
            there = [(pieces[path][n], w) for pieces, w in zip(each, weights, strict=True) if n in pieces.get(path, {})]
            want = wanted(method, *zip(*there, strict=True), pruned.get("density", 1), election) if there else 0 * one
            np.testing.assert_allclose(one, want, rtol=0, atol=tolerance * (1e-9 + np.abs(want).max()), err_msg=path)


def some_whole(targets, n, trained="table", **config):
    """An adapter that trains the table whole, rows of the head, and adapts what else is named."""
    lora = wrapped(rank=3, alpha=7, targets=targets, trained=trained, trained_rows={"head": [3, 18]}, **config)
    return lora, drawn(lora, n)


@pytest.mark.parametrize("method", METHODS)
def test_changes_of_what_is_trained_are_merged_as_whole_updates_are(method):
    first, second = some_whole(["kernel"], 0), some_whole(["experts"], 1, trained=["table", "layers/down"])
    weights, options = [0.8, -0.5], {}
    if method in PRUNE:  # what is dropped at random is told by the key, and here nothing is
        options = {"density": 1.0 if "dare" in method else 0.55, "key": jax.random.key(0)}
    lora, got = rslora.combine([first, second], weights, method, params=PARAMS, **options)
    kind = method.removesuffix("_svd").replace("dare_", "")
    kind = "linear" if kind in ("cat", "svd") else kind
    both = [(adapters, w) for (_, adapters), w in zip([first, second], weights, strict=True)]

    def changed(base, arrays, of):
        sources = [np.asarray(array, float) - np.asarray(base, float) for array in arrays]
        return base + by_loops(kind, sources, of, options.get("density", 1.0))

    table = changed(PARAMS["table"], [its["table"]["value"] for its, _ in both], weights)
    np.testing.assert_allclose(got["table"]["value"], table, atol=1e-5)
    rows = changed(PARAMS["head"][:, np.array([3, 18])].T, [its["head"]["rows"] for its, _ in both], weights)
    np.testing.assert_allclose(got["head"]["rows"], rows, atol=1e-5)
    for n, base in enumerate(PARAMS["layers"]["down"]):  # the second's alone, layer by layer
        one = changed(base, [second[1]["layers/down"]["value"][n]], weights[1:])
        np.testing.assert_allclose(got["layers/down"]["value"][n], one, atol=1e-5)
    assert {"kernel", "experts"} < lora.sites.keys() and lora.sites["head"].rank == 2
    assert rslora.wrap(kinds, PARAMS, TOKENS, config=lora.config).sites == lora.sites
    lora.check(PARAMS, got)


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
    "rank=2.5 is not a positive whole number": lambda: ([of_one()], [1], {"method": "svd", "rank": 2.5}),
    "the method DoRA cannot be combined, as its update of head is no product of two factors: keep": lambda: (
        [of_one(method="dora")],
        [1],
        {},
    ),
    "an adapter trains table itself, of which the change from the base is combined: give the base": lambda: (
        [some_whole(["kernel"], 0)],
        [1],
        {},
    ),
    "table cannot be joined: the method of one adapter is Trained(), and of another LoRA()": lambda: (
        [some_whole(["kernel"], 0), of_one(targets=["table"])],
        [1, 1],
        {"params": PARAMS},
    ),
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
