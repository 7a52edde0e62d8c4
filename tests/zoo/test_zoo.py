"""Models that others wrote: every weight is found, and the laws hold with an adapter on each of them."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rslora_jax as rslora
from rslora_jax.config import matches
from tests.programs import merged_by_hand, trained
from tests.reference import assert_near, gradients_by_hand
from tests.zoo import pretrained
from tests.zoo.model import Model

RANK, ALPHA = 3, 2.0  # alpha is not the rank, and the rank is no square

MODELS = pretrained.MODELS
UNSEEN: dict[str, str] = {}
WRONG: dict[str, str] = {}


@functools.cache
def model(name: str) -> Model:
    return MODELS[name]()


def wrapped(fn, params, *args, **config):
    """Wrap a function; a warning of the package is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", rslora.RsloraWarning)
        return rslora.wrap(fn, params, *args, config=rslora.LoraConfig(rank=RANK, alpha=ALPHA, **config))


def cases(expected_to_fail, names=MODELS):
    def marks(name):
        yield pytest.mark.xdist_group(name)  # so that both tests of a model are in one process
        if name in expected_to_fail:
            yield pytest.mark.xfail(reason=expected_to_fail[name], strict=True)

    return pytest.mark.parametrize("name", [pytest.param(name, marks=[*marks(name)]) for name in names])


@cases(UNSEEN)
def test_every_weight_is_found_with_its_axes_and_nothing_falls_back(name):
    it = model(name)
    lora = wrapped(it.fn, it.params, *it.args, targets=["*"])
    assert {path: (site.in_axes, site.out_axes) for path, site in lora.sites.items()} == it.weights()
    assert not any(site.fallbacks for site in lora.sites.values())
    if it.head:
        tables = {path for path, site in lora.sites.items() if site.kind == "embedding"}
        default = set(wrapped(it.fn, it.params, *it.args).sites)
        assert default == {path for path in lora.sites if not matches(path, it.head)} - tables


def loss(outputs):
    return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(outputs))


def with_gradient(fn, argument):
    """Compile a function and its gradient at once: compiling is what takes the time here."""

    def value(*args):
        outputs = fn(*args)
        return loss(outputs), outputs

    return jax.jit(jax.grad(value, argument, has_aux=True, allow_int=True))


@cases(WRONG)
def test_applied_is_merged_and_so_are_the_gradients(name):
    it = model(name)
    lora = wrapped(it.fn, it.params, *it.args, targets=["*"])
    applied, by_hand = with_gradient(lora.apply, 1), with_gradient(it.fn, 0)
    fresh, adapters = lora.init(jax.random.key(0)), trained(lora)

    _, plain = by_hand(it.params, *it.args)
    assert_near(applied(it.params, fresh, *it.args)[1], plain, 1e-6)

    dw, want = by_hand(merged_by_hand(lora, it.params, adapters), *it.args)
    gradients, got = applied(it.params, adapters, *it.args)
    assert_near(got, want, it.tolerance)
    assert_near(gradients, gradients_by_hand(lora, adapters, dw), 1e-4, floor=1e-3)
    for new, old in zip(jax.tree.leaves(want), jax.tree.leaves(plain), strict=True):
        assert np.abs(new - old).max() > 0.01 * np.abs(old).max()
