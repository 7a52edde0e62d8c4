"""Starts of single layers of a stack, each with a rank and a scale of its own, and ranks shared out over them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import rslora_jax as rslora
from rslora_jax import starts
from tests.program_models import normal
from tests.reference import assert_near
from tests.starts.test_data import BATCHES, W, squares
from tests.starts.test_starts import as_trained, expected

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]
KEY = jax.random.key(3)
RANKS, ALPHAS = (2, 0, 4), (11, 5, 5)  # the layer between has no adapter
CONFIG = dict(rank=2, alpha=5, targets=["w/{0,2}"], rank_pattern={"w/{2}": 4}, alpha_pattern={"w/{0}": 11})
ALL = {name: getattr(starts, name) for name in ("pissa", "olora", "orthogonal")}
ALL["eva"] = functools.partial(starts.eva, batches=BATCHES)
ALL["lora_ga"] = functools.partial(starts.lora_ga, loss=squares, batches=BATCHES)


def first(p, x):
    """Scan over the first axis."""
    return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]


def last(p, x):
    """Scan over the last axis, and the weight lies turned."""
    return first({"w": jnp.moveaxis(p["w"], -1, 0).swapaxes(1, 2)}, x)


def last_of(w):
    return jnp.moveaxis(w.swapaxes(1, 2), 0, -1)


FORMS = {"first": (first, W), "last": (last, last_of(W))}
BY_DAY = [("pissa", "first", "lora"), ("lora_ga", "last", "lora"), ("eva", "first", "dora")]
CASES = [(n, form, method) for n in ALL for form in FORMS for method in ("lora", "dora")]


def at_night(case):
    return case if case in BY_DAY else pytest.param(*case, marks=pytest.mark.nightly)


@pytest.mark.parametrize(("name", "form", "method"), list(map(at_night, CASES)))
def test_each_layer_starts_by_its_own_rank_and_scale(name, form, method):
    fn, w = FORMS[form]
    params, (x,) = {"w": w}, BATCHES[0]
    lora = rslora.wrap(fn, params, x, config=rslora.LoraConfig(**CONFIG, method=method))
    changed, adapters = ALL[name](lora, params, KEY)
    assert_near(lora.apply(changed, adapters, x), fn(params, x), 2e-5)
    assert_near(lora.merge(changed, adapters), params, 1e-5)
    before, after = (
        {"first": lambda w: w, "last": lambda w: w.transpose(2, 1, 0)}[form](np.asarray(p["w"]))
        for p in (params, changed)
    )
    for n, (rank, alpha) in enumerate(zip(RANKS, ALPHAS, strict=True)):
        a, b = (np.asarray(adapters["w"][of][n], np.float64) for of in "ab")
        assert not a[:, rank:].any() and not b[rank:].any()
        update = alpha / math.sqrt(rank or 1) * a[:, :rank] @ b[:rank]
        assert_near(before[n] - after[n], update if name not in ("eva", "orthogonal") else 0 * update, 2e-5, floor=1)
        if name in ("pissa", "olora") and rank:
            scale = alpha / math.sqrt(rank) if name == "olora" else 1
            assert_near(update, scale * expected(name, np.asarray(before[n], np.float64), rank), 1e-4)
        if name == "eva" and rank:
            assert_near(a[:, :rank].T @ a[:, :rank], np.eye(rank), 1e-4)
    if name in ("eva", "orthogonal"):
        return
    trained = as_trained(adapters)
    whole, joined = starts.for_original_base(lora, trained, adapters)
    assert [layer.rank for layer in whole.sites["w"].layers] == [2 * rank for rank in RANKS]
    assert_near(whole.apply(params, joined, x), lora.apply(changed, trained, x), 4e-5)
    assert_near(whole.merge(params, joined), lora.merge(changed, trained), 4e-5)
    again = rslora.wrap(fn, params, x, config=whole.config)
    assert dict(again.sites) == dict(whole.sites)


def test_lora_ga_takes_from_each_layer_what_lies_behind_its_own_rank():
    params = {"w": W}
    lora = rslora.wrap(first, params, *BATCHES[0], config=rslora.LoraConfig(**CONFIG))
    _, adapters = ALL["lora_ga"](lora, params, KEY)
    grads = jax.grad(lambda p: sum(squares(functools.partial(first, p), batch)[0] for batch in BATCHES))(params)["w"]
    for n, rank in enumerate(RANKS):
        g = np.asarray(grads[n], np.float64)
        a, b = adapters["w"]["a"][n, :, :rank], adapters["w"]["b"][n, :rank]
        size = 12**0.5 / 16
        s = np.linalg.svd(g, compute_uv=False) ** 2
        assert_near(np.linalg.norm(a.T @ g) ** 2 / size, s[:rank].sum(), 1e-3, floor=1e-6)
        assert_near(np.linalg.norm(g @ b.T) ** 2 / size, s[rank : 2 * rank].sum(), 1e-2, floor=1e-6)


def test_ranks_are_shared_out_alike_over_layers_stacked_and_apart():
    def looped(p, x):
        return functools.reduce(lambda c, n: jnp.tanh(c @ p[f"w_{n}"]), range(3), x) @ p["v"]

    def scanned(p, x):
        return first(p, x) @ p["v"]

    scales = jnp.array([0.3, 1.5, 6.0])[:, None, None]  # the last ones' data are all near 1 or -1
    w, v = W * scales, normal(1, 12, 4)
    config = rslora.LoraConfig(rank=3, alpha=7)
    apart, stack = {f"w_{n}": w[n] for n in range(3)} | {"v": v}, {"w": w, "v": v}
    found = {}
    for fn, params in ((looped, apart), (scanned, stack)):
        lora = rslora.wrap(fn, params, *BATCHES[0], config=config)
        shared = starts.eva_config(lora, params, BATCHES, 2.0)
        again = rslora.wrap(fn, params, *BATCHES[0], config=shared)
        found[fn] = {
            (path if n is None else f"{path}_{n}"): (layer.rank, layer.gamma)
            for path, site in again.sites.items()
            for n, layer in (enumerate(site.layers) if site.layers else [(None, site)])
        }
        _, adapters = starts.eva(again, params, KEY, BATCHES)
        assert_near(again.apply(params, adapters, *BATCHES[0]), fn(params, *BATCHES[0]), 1e-5)
    assert found[looped] == found[scanned] and len({rank for rank, _ in found[looped].values()}) > 1
    assert sum(rank for rank, _ in found[looped].values()) == 12 and max(found[looped].values())[0] <= 6
    assert all(gamma == pytest.approx(7 / rank**0.5) for rank, gamma in found[looped].values())

    x, expected_shares = BATCHES, {}
    rows = np.concatenate([np.asarray(x, np.float64).reshape(-1, 12) for (x,) in x])
    for n in range(3):
        expected_shares[f"w_{n}"] = np.linalg.svd(rows, compute_uv=False) ** 2
        rows = np.tanh(rows @ np.asarray(w[n], np.float64))
    expected_shares["v"] = np.linalg.svd(rows, compute_uv=False) ** 2
    most = {"v": 4}
    every = [(s / of.sum(), name) for name, of in expected_shares.items() for s in of[1 : most.get(name, 6)]]
    taken = [name for _, name in sorted(every, reverse=True)[: 12 - 4]]
    assert {name: rank for name, (rank, _) in found[looped].items()} == {n: 1 + taken.count(n) for n in expected_shares}


def test_a_rho_below_1_is_refused():
    lora = rslora.wrap(first, {"w": W}, *BATCHES[0], config=rslora.LoraConfig(rank=2, alpha=5))
    with pytest.raises(ValueError, match=r"rho=0\.5 is below 1"):
        starts.eva_config(lora, {"w": W}, BATCHES, 0.5)
