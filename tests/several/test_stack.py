"""Adapters side by side do what each does alone, whatever their ranks, scales and targets."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import rslora_jax as rslora
from tests.program_models import normal
from tests.reference import assert_near
from tests.several.programs import ALL, PARAMS, TOKENS, configs, drawn, kinds, update, updates_of, wrapped

pytestmark = pytest.mark.by_day_on("newest")


@given(st.lists(configs, min_size=1, max_size=3))
@settings(max_examples=3, deadline=None, phases=[Phase.generate])
def test_each_has_its_own_update_in_the_stack_and_the_config_says_the_sites(configs):
    pairs = [(lora, drawn(lora, seed)) for seed, lora in enumerate(wrapped(**c, dropout=0.1) for c in configs)]
    lora, stacked = rslora.stack(pairs)
    assert set(lora.sites) == {path for own, _ in pairs for path in own.sites} == set(stacked)
    assert not lora.config.dropout
    for n, (config, (own, adapters)) in enumerate(zip(configs, pairs, strict=True)):
        each = updates_of(config, adapters, own.sites)
        for path, site in lora.sites.items():
            got = update(site, site.gamma, {name: array[n] for name, array in stacked[path].items()})
            want = np.broadcast_to(each.get(path, 0), got.shape)
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6, err_msg=path)
    for path, site in lora.sites.items():
        assert site.rank == max(own.sites[path].rank for own, _ in pairs if path in own.sites)
    again = rslora.wrap(kinds, PARAMS, TOKENS, config=lora.config)
    assert dict(again.sites) == dict(lora.sites)
    assert dict(again.left_out) == dict(lora.left_out) and again.unused == lora.unused


def test_a_lora_of_a_stack_does_with_each_what_each_does_alone():
    pairs = [
        (own, drawn(own, n)) for n, own in enumerate([wrapped(rank=3, alpha=7), wrapped(rank=5, targets=ALL[1:3])])
    ]
    lora, stacked = rslora.stack(pairs)
    for n, (own, adapters) in enumerate(pairs):
        got = lora.apply(PARAMS, jax.tree.map(lambda array, n=n: array[n], stacked), TOKENS)
        assert_near(got, own.apply(PARAMS, adapters, TOKENS), 1e-5)


def linear(p, x):
    return x @ p["w"] @ p["v"]


SMALL, X = {"w": jnp.ones((6, 4)), "v": jnp.ones((4, 6))}, jnp.ones((2, 6))


def scanned(p, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]


def test_of_dora_a_layer_that_one_lacks_is_as_it_was():
    params, x = {"w": normal(0, 3, 6, 6)}, normal(1, 2, 6)

    def of(**config):
        lora = rslora.wrap(scanned, params, x, config=rslora.LoraConfig(rank=2, alpha=3, method="dora", **config))
        return lora, jax.tree.map(lambda array: array + 0.3, lora.init(jax.random.key(0), params))

    pairs = [of(targets=["{1}/w", "{2}/w"]), of()]
    with pytest.raises(ValueError, match="one adapter lacks w"):
        rslora.stack(pairs)
    lora, stacked = rslora.stack(pairs, params)
    for n, (own, adapters) in enumerate(pairs):
        got = lora.merge(params, jax.tree.map(lambda array, n=n: array[n], stacked))
        assert_near(got, own.merge(params, adapters), 1e-5)


def of_small(fn=linear, params=SMALL, **config):
    lora = rslora.wrap(fn, params, X, config=rslora.LoraConfig(**{"rank": 2, "alpha": 3} | config))
    return lora, lora.init(jax.random.key(0), params)


def test_of_dora_a_weight_that_one_lacks_needs_the_base_and_is_then_as_it_was():
    one, other = of_small(method="dora", targets=["w"]), of_small(method="dora", rank=3)
    with pytest.raises(ValueError, match=r"one adapter lacks v, and DoRA .* needs the base's values: give `params`"):
        rslora.stack([one, other])
    lora, stacked = rslora.stack([one, other], SMALL)
    first = jax.tree.map(lambda array: array[0], stacked)
    assert_near(lora.merge(SMALL, first), one[0].merge(SMALL, one[1]), 1e-6)
    assert_near(rslora.stack([other, other])[1]["v"]["m"][1], np.full(6, 2.0), 1e-6)


def by_look_up(p, x):
    return p["w"][jnp.arange(2)] @ p["v"] @ p["w"]


REFUSED = {
    "parameter v is (4, 6) in the first and (5, 6) in another": lambda: [
        of_small(),
        of_small(params={"w": jnp.ones((6, 5)), "v": jnp.ones((5, 6))}),
    ],
    "parameter u is missing in the first and (1,) in another": lambda: [
        of_small(),
        of_small(params=SMALL | {"u": jnp.ones(1)}),
    ],
    "w cannot be joined: the in-axes of one adapter is (0,), and of another (1,)": lambda: [
        of_small(),
        of_small(lambda p, x: x[:, :4] @ p["w"].T @ p["v"].T),
    ],
    "w cannot be joined: the method": lambda: [of_small(), of_small(method="dora")],
    "v cannot be joined: its method is 'dora'": lambda: [
        of_small(targets=["w"]),
        of_small(method="dora", targets=["v"]),
    ],
    "w cannot be joined: one adapter is that of all its uses, and another, w@lookup, of one": lambda: [
        of_small(by_look_up, targets=["w"]),
        of_small(by_look_up, targets=["w@lookup"]),
    ],
    "there are no adapters to stack": lambda: [],
    "the adapters have none for v": lambda: [of_small(), (of_small()[0], of_small(targets=["w"])[1])],
}


@pytest.mark.parametrize("said", list(REFUSED))
def test_what_cannot_be_joined_is_named(said):
    with pytest.raises(ValueError, match=re.escape(said)):
        rslora.stack(REFUSED[said]())


def test_both_uses_of_a_tied_weight_may_be_of_different_adapters():
    one, other = (of_small(by_look_up, targets=[f"w@{use}"]) for use in ("lookup", "product"))
    lora, _ = rslora.stack([one, other])
    assert list(lora.sites) == ["w@lookup", "w@product"]


@pytest.mark.filterwarnings("ignore::rslora_jax.RsloraWarning")
def test_another_dtype_is_widened_before_the_scale_is_multiplied_in():
    one, other = of_small(dtype="bfloat16"), of_small(rank=3)
    ones = jax.tree.map(jnp.ones_like, one[1])
    lora, stacked = rslora.stack([(one[0], ones), other])
    assert lora.config.dtype == "float32" == str(stacked["w"]["b"].dtype)
    np.testing.assert_allclose(stacked["w"]["b"][0, 0], 3 / np.sqrt(2), rtol=1e-6)


def test_a_path_that_reads_as_a_glob_is_named_all_the_same():
    params = {"w[0]*{x}": jnp.ones((6, 4)), "w": jnp.ones((4, 6))}

    def fn(p, x):
        return x @ p["w[0]*{x}"] @ p["w"]

    loras = [rslora.wrap(fn, params, X, config=rslora.LoraConfig(rank=2, targets=t)) for t in (["w?*"], ["w?*", "w"])]
    lora, _ = rslora.stack([(own, own.init(jax.random.key(0))) for own in loras])
    again = rslora.wrap(fn, params, X, config=dataclasses.replace(lora.config))
    assert dict(again.sites) == dict(lora.sites)
