"""Layers of a stacked weight that have ranks, alphas and targets of their own, against numpy in float64."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rslora_jax as rslora
from rslora_jax.analysis import spectrum
from rslora_jax.config import expand_braces
from rslora_jax.models.layout import unstack_adapters
from rslora_jax.train import Trial, scale_by_rank
from rslora_jax.train.sweep import scaling_factors
from tests.reference import assert_near, trained

pytestmark = pytest.mark.usefixtures("compile_fast")

WIDTH, LAYERS = 6, 4
rng = np.random.default_rng(3)
STACK = {"layers": {"up": {"kernel": jnp.asarray(0.5 * rng.standard_normal((LAYERS, WIDTH, WIDTH)), jnp.float32)}}}
X = jnp.asarray(rng.standard_normal((2, WIDTH)), jnp.float32)
PATH = "layers/up/kernel"


def scanned(p, x):
    return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w["up"]["kernel"]), None), x, p["layers"])[0]


def looped(p, x):
    for n in range(LAYERS):
        x = jnp.tanh(x @ p["layers"][str(n)]["up"]["kernel"])
    return x


def unstacked(tree):
    return {"layers": {str(n): jax.tree.map(lambda w, n=n: w[n], tree["layers"]) for n in range(LAYERS)}}


def wrap(fn, params, **config):
    return rslora.wrap(fn, params, X, config=rslora.LoraConfig(**{"rank": 2, "alpha": 5.0, **config}))


APART = dict(
    targets="*layers/{0,1,3}/up/kernel",
    rank_pattern=[("*layers/{1}/*", 5), ("*", 3)],
    alpha_pattern={"*layers/{3}/*": 7.0},
)
OWN = [(3, 5.0), (5, 5.0), (0, 0.0), (3, 7.0)]  # what that gives each layer


def by_hand(adapters, method):
    """Give the weights that act, from the definition."""
    total = np.asarray(STACK["layers"]["up"]["kernel"], np.float64).copy()
    own = {name: np.asarray(array, np.float64) for name, array in adapters[PATH].items()}
    for n, (rank, alpha) in enumerate(OWN):
        if rank:
            total[n] += alpha / np.sqrt(rank) * own["a"][n, :, :rank] @ own["b"][n, :rank]
            if method == "dora":
                total[n] *= own["m"][n] / np.linalg.norm(total[n], axis=0)
    return {"layers": {"up": {"kernel": total}}}


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_each_layer_acts_with_its_own_rank_and_scale(method):
    lora = wrap(scanned, STACK, method=method, **APART)
    adapters = (
        trained(lora) if method == "lora" else jax.tree.map(lambda x: x + 0.3, lora.init(jax.random.key(1), STACK))
    )
    merged = by_hand(adapters, method)
    assert_near(lora.merge(STACK, adapters), merged, 1e-6)
    assert_near(lora.apply(STACK, adapters, X), scanned(jax.tree.map(jnp.float32, merged), X), 1e-5)
    grads = jax.grad(lambda a: jnp.sum(lora.apply(STACK, a, X) ** 2))(adapters)[PATH]
    for n, (rank, _) in enumerate(OWN):
        assert not grads["a"][n, :, rank:].any() and not grads["b"][n, rank:].any()
        assert bool(grads["a"][n].any()) == (rank > 0)
    sizes = sum(rank * 2 * WIDTH + (WIDTH if method == "dora" and rank else 0) for rank, _ in OWN)
    assert lora.num_parameters == sizes and "3..5 (3 of 4)" in str(lora) and "on 3 matrices" in str(lora)


def test_one_set_of_patterns_serves_a_model_with_its_layers_in_a_loop():
    stacked, loop = wrap(scanned, STACK, **APART), wrap(looped, unstacked(STACK), **APART)
    assert {path: (site.rank, site.alpha) for path, site in loop.sites.items()} == {
        f"layers/{n}/up/kernel": own for n, own in enumerate(OWN) if own[0]
    }
    adapters = trained(stacked)
    own = {
        f"layers/{n}/up/kernel": {"a": adapters[PATH]["a"][n, :, :r], "b": adapters[PATH]["b"][n, :r]}
        for n, (r, _) in enumerate(OWN)
        if r
    }
    assert_near(loop.apply(unstacked(STACK), own, X), stacked.apply(STACK, adapters, X), 1e-6)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([3.0, 7.0])), min_size=LAYERS, max_size=LAYERS), st.data())
def test_any_ranks_and_targets_of_single_layers(own, data):
    """Patterns for each layer, in any order, with a wrong one for all behind them."""
    layers = [n for n, (rank, _) in enumerate(own) if rank]
    if not layers:
        return
    order = data.draw(st.permutations(layers))
    named = data.draw(st.booleans())
    lora = wrap(
        scanned,
        STACK,
        targets=[f"layers/{{{n}}}/up/kernel" for n in order] if named else "*",
        exclude=[f"*/{{{n}}}/up/*" for n in range(LAYERS) if n not in layers],
        rank_pattern=[*((f"layers/up/{{{n}}}/kernel", own[n][0]) for n in order), ("*", 2)],
        alpha_pattern=[(f"{{{n}}}/layers/*", own[n][1]) for n in order],
    )
    left = {path: why for pattern, why in lora.left_out.items() for path in expand_braces(pattern)}
    assert left == {
        f"{PATH}/{n}": "no target names it" if named else f"excluded by '*/{{{n}}}/up/*'"
        for n in range(LAYERS)
        if n not in layers
    }
    assert not left or f"{PATH}/{{" in str(lora)
    site = lora.sites[PATH]
    for n in range(LAYERS):
        one = site.of_layer(n)
        assert (one.rank, one.shape, one.stack_axes) == (own[n][0], (WIDTH, WIDTH), ())
        assert not own[n][0] or (one.alpha, one.gamma) == (own[n][1], pytest.approx(own[n][1] / np.sqrt(own[n][0])))
    fresh = lora.init(jax.random.key(0))[PATH]
    assert site.rank == max(rank for rank, _ in own)
    assert all(not fresh["a"][n, :, own[n][0] :].any() for n in range(LAYERS))
    assert rslora.LoraConfig.from_json(lora.config.to_json()) == lora.config


def test_layers_are_left_out_for_the_first_reason_and_a_weight_that_is_trained_whole_for_none():
    lora = wrap(scanned, STACK, targets="layers/{0..2}/*", exclude=["*/{1}/*", "*/{1,2}/*"])
    assert dict(lora.left_out) == {
        f"{PATH}/{{1}}": "excluded by '*/{1}/*'",
        f"{PATH}/{{2}}": "excluded by '*/{1,2}/*'",
        f"{PATH}/{{3}}": "no target names it",
    }
    again = wrap(scanned, STACK, targets="*", exclude=list(lora.left_out))  # they are patterns
    assert [layer.rank for layer in again.sites[PATH].layers] == [2, 0, 0, 0]
    assert not wrap(scanned, STACK, targets="layers/{0..2}/*", trained="*").left_out


def test_what_is_beyond_a_layers_rank_stays_at_zero_in_training():
    lora = wrap(scanned, STACK, **APART)
    optimizer = optax.chain(optax.adamw(1e-2), scale_by_rank(lora))
    adapters = lora.init(jax.random.key(0))
    state = optimizer.init(adapters)

    @jax.jit
    def step(adapters, state):
        grads = jax.grad(lambda a: jnp.sum((lora.apply(STACK, a, X) - 1) ** 2))(adapters)
        updates, state = optimizer.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state

    for _ in range(5):
        adapters, state = step(adapters, state)
    for n, (rank, _) in enumerate(OWN):
        assert not adapters[PATH]["a"][n, :, rank:].any() and not adapters[PATH]["b"][n, rank:].any()
        assert rank == 0 or adapters[PATH]["b"][n, :rank].any()


def test_rates_and_scalings_go_by_each_layers_rank():
    lora = wrap(scanned, STACK, **APART)
    ones = jax.tree.map(jnp.ones_like, lora.init(jax.random.key(0)))
    updates, _ = scale_by_rank(lora, reference_rank=3).update(ones, optax.EmptyState())
    np.testing.assert_allclose(updates[PATH]["b"][:, 0, 0], [1, (5 / 3) ** -0.25, 1, 1], rtol=1e-6)
    factors = scaling_factors(lora, [Trial(1e-3, 0, "lora"), Trial(1e-3, 0, None)])
    np.testing.assert_allclose(factors[PATH][0].ravel(), [3**-0.5, 5**-0.5, 1, 3**-0.5], rtol=1e-6)
    np.testing.assert_array_equal(factors[PATH][1].ravel(), 1)


def test_a_spectrum_is_of_the_layers_that_have_an_adapter():
    lora = wrap(scanned, STACK, **APART)
    adapters = trained(lora)
    known, found = (spectrum.measure(lora.config, adapters, **options) for options in (dict(sites=lora.sites), {}))
    merged = by_hand(adapters, "lora")["layers"]["up"]["kernel"]
    assert [(m.index, m.rank) for m in known] == [((0,), 3), ((1,), 5), ((3,), 3)]
    for one, other in zip(known, found, strict=True):
        update = merged[one.index] - np.asarray(STACK["layers"]["up"]["kernel"], np.float64)[one.index]
        assert one.update_frobenius == pytest.approx(np.linalg.norm(update), rel=1e-5)
        assert (one.gamma, one.update_spectral) == (other.gamma, other.update_spectral)


def test_adapters_taken_apart_are_those_of_the_layers():
    params = {"params": STACK}
    lora = wrap(lambda p, x: scanned(p["params"], x), params, **APART)
    config, own = unstack_adapters(lora, trained(lora))
    assert {path: of["a"].shape[-1] for path, of in own.items()} == {
        f"params/layers_{n}/up/kernel": rank for n, (rank, _) in enumerate(OWN) if rank
    }
    assert dict(config.alpha_pattern) == {f"params/layers_{n}/up/kernel": a for n, (r, a) in enumerate(OWN) if r}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (dict(targets="layers/{4}/*"), "'layers/{4}/*' names layer 4 of layers/up/kernel, whose layers are 0 to 3"),
        (dict(rank_pattern={"*/{9}/*": 3}), "names layer 9 of"),
        (dict(exclude="*/{7}/*"), "exclude '*/{7}/*' names layer 7 of"),
        (dict(alpha_pattern={"layers/{0}/down": 3}), "matches no adapted weight: did you mean layers/up/kernel?"),
        (dict(exclude="*/{0..3}/*"), "no weight is left to adapt"),
        (dict(rank_pattern={"*/{2}/*": 7}), "rank 7 is above 6, the full rank of layer 2 of layers/up/kernel (6 x 6)"),
    ],
)  # fmt: skip
def test_patterns_that_name_no_layer_are_refused(config, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        wrap(scanned, STACK, **config)


def test_a_weight_without_layers_is_told():
    with pytest.raises(ValueError, match="names layers of w, which holds no stack of them: leave the number out"):
        wrap(lambda p, x: x @ p["w"], {"w": jnp.ones((WIDTH, WIDTH))}, targets="{1}/w")


def test_the_layers_are_along_the_axis_that_the_scan_takes_apart():
    """As of experts within layers, and of stacks that lie on another axis than the first."""
    w = jnp.asarray(rng.standard_normal((3, WIDTH, LAYERS, WIDTH)), jnp.float32)  # experts, in, layers, out

    def fn(p, x):
        return jax.lax.scan(lambda c, w: (jnp.einsum("eti,eio->eto", c, w), None), x, jnp.moveaxis(p["w"], 2, 0))[0]

    x = jnp.ones((3, 2, WIDTH))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rslora.RsloraWarning)
        lora = rslora.wrap(fn, {"w": w}, x, config=rslora.LoraConfig(rank=2, alpha=5, targets="w/{1,3}"))
    assert [layer.rank for layer in lora.sites["w"].layers] == [0, 2, 0, 2]
    adapters = trained(lora)
    moved = lora.merge({"w": w}, adapters)["w"] != w
    assert [bool(moved[:, :, n].any()) for n in range(LAYERS)] == [False, True, False, True]
    assert_near(lora.apply({"w": w}, adapters, x), fn(lora.merge({"w": w}, adapters), x), 1e-5)
