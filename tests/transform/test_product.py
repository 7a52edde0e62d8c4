"""The factored order, also where another one is cheaper at the tests' small sizes."""

import jax
import pytest

import rslora_jax as rslora
from rslora_jax.transform import product
from rslora_jax.transform.cost import Plan
from tests.programs import CASES, merged_by_hand, trained
from tests.reference import assert_near

BY_DAY = ("convolution grouped", "convolution depthwise")
OTHERS = [n for n in CASES if n.startswith(("convolution", "picked", "layout")) and n not in BY_DAY]


@pytest.mark.parametrize("name", [*BY_DAY, *(pytest.param(name, marks=pytest.mark.nightly) for name in OTHERS)])
def test_factored_products_are_those_of_the_merged_weight(name, monkeypatch):
    monkeypatch.setattr(product, "plan", lambda *args, **kwargs: Plan())
    jax.clear_caches()
    case = CASES[name]()
    lora = rslora.wrap(
        case.fn, case.params, *case.args, config=rslora.LoraConfig(rank=6, alpha=10, targets=case.targets)
    )
    adapters = trained(lora)
    got = jax.jit(lora.apply)(case.params, adapters, *case.args)
    jax.clear_caches()
    assert_near(got, case.fn(merged_by_hand(lora, case.params, adapters), *case.args), case.tolerance)
