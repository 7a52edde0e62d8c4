"""Starts that look at data: beside numpy's decompositions of what each weight meets, and of its gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import rslora_jax as rslora
from rslora_jax import starts
from rslora_jax.sites import named_leaves
from rslora_jax.starts.passes import Passes
from rslora_jax.starts.variance import spread
from tests.program_models import normal
from tests.programs import CASES
from tests.reference import assert_near
from tests.starts.test_starts import as_trained, matrices, wrapped

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]
KEY = jax.random.key(3)
BATCHES = [(normal(n, 5, 6, 12) * jnp.linspace(0.2, 2, 12),) for n in range(3)]
W = normal(3, 3, 12, 12)


def scanned(p, x):
    return lax.scan(jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None)), x, p["w"])[0]


def met_scanned(w, x):
    layers = []
    for one in w:
        layers.append(x.reshape(-1, 12))
        x = np.tanh(x @ one)
    return layers


def twice(p, x):
    return jnp.einsum("od,btd->bto", p["w"][0], jnp.sin(x @ p["w"][0])) + x @ p["w"][2] @ p["w"][2]


def met_twice(w, x):  # of the first, the one use turned is no data of its in-axes; the last meets data twice
    rows, nothing = x.reshape(-1, 12), np.zeros((0, 12))
    return [rows, nothing, np.concatenate([rows, rows @ w[2]])]


def experts(p, x):
    return jnp.einsum("btd,tdo->bto", x[:, :3], p["w"])


def met_experts(w, x):
    return [x[:, n] for n in range(3)]


def ragged(p, x):
    return jax.vmap(lambda rows: lax.ragged_dot(rows, p["w"], jnp.array([2, 0, 4])))(x)


def met_ragged(w, x):
    return [x[:, :2].reshape(-1, 12), np.zeros((0, 12)), x[:, 2:].reshape(-1, 12)]


def branched(p, x):
    y = lax.cond(x.sum() > 1e9, lambda x: x @ p["w"][1], lambda x: 2 * x @ p["w"][0], x)
    return jnp.argmax(y) + (y @ p["w"][2])[0]


def met_branched(w, x):
    rows = x.reshape(-1, 12)
    return [2 * rows, np.zeros((0, 12)), (2 * rows) @ w[0]]


MEETINGS = [(scanned, met_scanned), (twice, met_twice), (experts, met_experts), (branched, met_branched)]


@pytest.mark.parametrize("method", ["lora", pytest.param("dora", marks=pytest.mark.nightly)])
@pytest.mark.parametrize(("fn", "met"), MEETINGS, ids=[fn.__name__ for fn, _ in MEETINGS])
def test_eva_finds_the_leading_directions_of_what_is_met(fn, met, method):
    params, rank = {"w": W}, 3
    lora = rslora.wrap(fn, params, *BATCHES[0], config=rslora.LoraConfig(rank=rank, alpha=7, method=method))
    same, adapters = starts.eva(lora, params, KEY, BATCHES)
    assert same is params and not adapters["w"]["b"].any()
    assert_near(lora.apply(params, adapters, *BATCHES[0]), fn(params, *BATCHES[0]), 1e-5)
    by_batch = [met(np.asarray(W, np.float64), np.asarray(x, np.float64)) for (x,) in BATCHES]
    for a, rows in zip(np.asarray(adapters["w"]["a"], np.float64), zip(*by_batch, strict=True), strict=True):
        rows = np.concatenate(rows)
        want = np.sum(np.linalg.svd(rows, compute_uv=False)[:rank] ** 2)
        assert_near(np.linalg.norm(rows @ a) ** 2, want, 1e-4, floor=1e-9)
        assert_near(a.T @ a, np.eye(rank), 1e-4)


def test_eva_of_a_convolution_and_of_more_inputs_than_directions():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 9, 9, 6)) * 0.5 ** np.arange(6)
    wide = rng.standard_normal((200, 60)) * 0.8 ** np.arange(60) @ np.linalg.qr(rng.standard_normal((60, 60)))[0]
    params = {"kernel": normal(0, 3, 3, 6, 5), "w": normal(1, 60, 7)}

    def fn(p, x, wide):
        y = lax.conv_general_dilated(x, p["kernel"], (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y.sum() + wide @ p["w"]

    args = (jnp.asarray(x, "f4"), jnp.asarray(wide, "f4"))
    lora = rslora.wrap(fn, params, *args, config=rslora.LoraConfig(rank=3, alpha=7, targets="*"))
    _, adapters = starts.eva(lora, params, KEY, [args])
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))[:, ::2, ::2]  # (n, h, w, features, 3, 3)
    patches = np.moveaxis(windows, 3, -1).reshape(-1, 54)
    for path, rows, tolerance in (("kernel", patches, 1e-3), ("w", wide, 1e-2)):
        a = np.asarray(adapters[path]["a"], np.float64).reshape(-1, 3)
        assert_near(a.T @ a, np.eye(3), 1e-4)
        want = np.sum(np.linalg.svd(rows, compute_uv=False)[:3] ** 2)
        assert_near(np.linalg.norm(rows @ a) ** 2, want, tolerance)


def test_shares_are_those_of_all_the_variance_also_where_most_is_not_looked_at():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((300, 70)) * 0.95 ** np.arange(70)
    params, x = {"w": normal(1, 70, 7)}, jnp.asarray(rows, "f4")
    lora = rslora.wrap(lambda p, x: x @ p["w"], params, x, config=rslora.LoraConfig(rank=3, alpha=7))
    more = {"loss": None, "passes": 6, "progress": lambda done, total: None}
    found = spread(lora, params, KEY, {"w": 3}, [(x[:100],), (x[100:],)], **more)["w"]
    s = np.linalg.svd(rows, compute_uv=False) ** 2
    assert s[13:].sum() > 0.15 * s.sum()  # of which random directions tell
    assert_near(found.shares, s[:3] / s.sum(), 0.05)


def squares(run, batch):
    return jnp.sum(jnp.sin(jax.tree.leaves(run(*batch))[0].real.astype(jnp.float32))), jnp.float32(5)


DAY = ("convolution grouped",)


@pytest.mark.parametrize("name", [n if n in DAY else pytest.param(n, marks=pytest.mark.nightly) for n in CASES])
def test_lora_ga_starts_along_the_gradients_singular_vectors(name):
    case = CASES[name]()
    lora = wrapped(case)
    if name.startswith("control while"):  # of which JAX has no reverse mode
        return
    params, adapters = starts.lora_ga(lora, case.params, KEY, squares, [case.args, case.args])
    before = case.fn(case.params, *case.args)
    assert_near(lora.apply(params, adapters, *case.args), before, max(2 * case.tolerance, 5e-5))
    grads = jax.grad(lambda p: squares(functools.partial(case.fn, p), case.args)[0], allow_int=True)(case.params)
    for path, site in lora.sites.items():
        size = site.out_size**0.25 / 4
        a = np.asarray(adapters[path]["a"], np.float64).reshape(-1, site.in_size, 2)
        b = np.asarray(adapters[path]["b"], np.float64).reshape(-1, 2, site.out_size)
        for one, other, g in zip(a, b, matrices(site, named_leaves(grads)[path]), strict=True):
            s = np.linalg.svd(g, compute_uv=False) ** 2
            last = min(4, len(s))
            assert_near(one.T @ one, size**2 * np.eye(2), 1e-4)
            assert_near(other @ other.T, size**2 * np.eye(2), 1e-4)
            tolerance = 0.1 if "bfloat16" in name else 1e-2
            assert abs(np.linalg.norm(one.T @ g) ** 2 / size**2 - s[:2].sum()) <= tolerance * s[:2].sum(), path
            assert abs(np.linalg.norm(g @ other.T) ** 2 / size**2 - s[last - 2 : last].sum()) <= tolerance * s.sum()


@pytest.mark.nightly
@pytest.mark.parametrize("name", CASES)
def test_eva_leaves_every_program_as_it_is_or_says_why_not(name):
    case = CASES[name]()
    lora = wrapped(case)
    if name.startswith("control while"):
        return
    try:
        params, adapters = starts.eva(lora, case.params, KEY, [case.args])
    except ValueError as error:
        assert case.fallback or name.startswith(("mapped shard_map", "mapped pmap")), error
        assert "exclude it" in str(error)
        return
    assert not case.fallback or "cond" in case.fallback
    assert_near(lora.apply(params, adapters, *case.args), case.fn(case.params, *case.args), case.tolerance)
    for path, site in lora.sites.items():
        a = np.asarray(adapters[path]["a"], np.float64).reshape(-1, site.in_size, site.rank)
        if site.kind != "embedding":
            for one in a:
                assert_near(one.T @ one, np.eye(site.rank), 1e-3)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_what_lora_ga_trained_fits_the_original_base(method):
    params, x = {"w": W}, BATCHES[0][0]
    lora = rslora.wrap(scanned, params, x, config=rslora.LoraConfig(rank=2, alpha=5, method=method))
    changed, start = starts.lora_ga(lora, params, KEY, squares, BATCHES)
    trained = as_trained(start)
    whole, joined = starts.for_original_base(lora, trained, start)
    assert_near(whole.apply(params, joined, x), lora.apply(changed, trained, x), 4e-5)


def test_what_is_missing_is_said_in_a_sentence():
    params, (x,) = {"w": W[0]}, BATCHES[0]
    lora = rslora.wrap(lambda p, x: x @ p["w"], params, x, config=rslora.LoraConfig(rank=2, alpha=5))
    begin = functools.partial(starts.begin, lora=lora, params=params, key=KEY)
    for name, more, said in [
        ("eva", {}, "the start eva looks at data: give batches of them, and the loss"),
        ("lora-ga", {"batches": BATCHES}, "the start lora-ga looks at data"),
        ("eva", {"batches": [], "loss": squares}, "was given none: give it some batches"),
        ("lora_ga", {"batches": [], "loss": squares}, "was given none: give it some batches"),
        ("lora-ga", {"batches": BATCHES, "loss": lambda run, b: (jnp.sum(b[0]), 1)}, "no gradient of the loss arrives"),
        ("eva", {"batches": BATCHES, "loss": lambda run, b: jnp.sum(b[0])}, "w met no data of which"),
        ("olora-ga", {}, "start 'olora-ga' is not known: did you mean lora-ga?"),
        ("zeros", {}, "start 'zeros' is not known: use pissa, olora"),
        ("olora:3", {}, "'3' is no option of olora"),
        ("eva:0.5", {}, "'0.5' is no option of eva"),
    ]:
        with pytest.raises(ValueError, match=said) as error:
            begin(name, **more)
        assert len(str(error.value)) < 300
    assert starts.begin("pissa_niter_4", lora, params, KEY)[1].keys() == {"w"}


@pytest.mark.parametrize("begin", [starts.eva, functools.partial(starts.lora_ga, loss=squares)])
def test_no_array_of_a_weights_size_is_made_on_the_way(begin, monkeypatch):
    size, taken = 512, []
    params, x = {"u": normal(0, size, size), "v": normal(1, size, size)}, normal(2, 8, size)
    lora = rslora.wrap(lambda p, x: jnp.tanh(x @ p["u"]) @ p["v"], params, x, config=rslora.LoraConfig(rank=3, alpha=7))

    def measured(self, params, adapters):
        compiled = jax.jit(self.act).lower(params, adapters, self.batches[0]).compile()
        taken.append(compiled.memory_analysis().temp_size_in_bytes / (4 * size**2))
        return jax.tree.map(lambda array: array + 1, adapters)

    monkeypatch.setattr(Passes, "sum", measured)
    begin(lora, params, KEY, batches=[(x,)])
    assert max(taken) < 0.5, taken  # of the data and factors alone
