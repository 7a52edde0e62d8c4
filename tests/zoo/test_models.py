"""Every law on models of other people: all matrices found, none materialised, exact in value and gradient."""

import warnings

import jax
import jax.numpy as jnp
import pytest

import rslora_jax as rslora
from rslora_jax.sites import named_leaves
from tests.programs import assert_near, gradients_by_hand, merged_by_hand, trained
from tests.zoo.layers import LAYERS
from tests.zoo.transformers_models import MODELS

ALL = MODELS | LAYERS


@pytest.fixture(autouse=True)
def clip_as_before(monkeypatch):
    """Give `jnp.clip` back the argument that JAX has dropped and T5's code in `transformers` uses."""
    clip = jnp.clip
    monkeypatch.setattr(
        jnp,
        "clip",
        lambda x, *bounds, a_max=None, **kw: clip(x, *bounds, max=a_max, **kw)
        if a_max is not None
        else clip(x, *bounds, **kw),
    )


@pytest.mark.parametrize("name", list(ALL))
def test_a_model_that_nobody_here_wrote(name):
    model = ALL[name]()
    config = rslora.LoraConfig(rank=3, alpha=7, targets=["*"], allow_large_rank=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = rslora.wrap(model.fn, model.params, *model.args, config=config)

    matrices = {name for name, leaf in named_leaves(model.params).items() if leaf.ndim >= 2}
    assert set(lora.sites) == matrices - set(model.other)
    assert {(n, f) for n, site in lora.sites.items() for f in site.fallbacks} == set(model.materialised)

    def loss(out):
        return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(out) if jnp.issubdtype(leaf.dtype, jnp.floating))

    def base(params):
        out = model.fn(params, *model.args)
        return loss(out), out

    def adapted(adapters, params):
        out = lora.apply(params, adapters, *model.args)
        return loss(out), out

    base = jax.jit(jax.value_and_grad(base, has_aux=True))
    adapted = jax.jit(jax.value_and_grad(adapted, has_aux=True))
    adapters = trained(lora, scale=0.02)
    merged = merged_by_hand(lora, model.params, adapters)
    (_, before), _ = base(model.params)
    (_, want), gradient = base(merged)
    (_, fresh), _ = adapted(lora.init(jax.random.key(0)), model.params)
    (_, got), gradients = adapted(adapters, model.params)
    assert_near(fresh, before, 2e-6)
    assert_near(got, want, 2e-5)
    assert any(jnp.abs(w - b).max() > 1e-3 for w, b in zip(jax.tree.leaves(want), jax.tree.leaves(before), strict=True))
    assert_near(gradients, gradients_by_hand(lora, adapters, gradient), 1e-3)
    assert_near(lora.merge(model.params, adapters), merged, 1e-6)
