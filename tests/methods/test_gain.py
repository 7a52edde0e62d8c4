"""What a program does to a weight that has a gain, where the gain must not reach: beside the weight's own entries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import rslora_jax as rslora
from tests.methods.gained import Gained, by_hand, trained
from tests.program_models import normal

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]

IDS = jnp.array([3, 0, 11, 8])  # one is beyond the table


def padded(pads, value):
    """A product with the weight padded by a number along some axes."""
    return lambda p, x: jnp.pad(x, ((0, 0), pads[0]), constant_values=1) @ jnp.pad(p["w"], pads, constant_values=value)


def filled(value):
    return lambda p, x: jnp.tanh(p["w"].at[IDS].get(mode="fill", fill_value=value) + x[:, :7])


PROGRAMS = {
    "padded along the sum": padded(((2, 1), (0, 0)), 0.5),
    "padded along the outputs": padded(((0, 0), (1, 2)), 0.5),
    "padded along both": padded(((1, 0), (0, 2)), -0.5),
    "padded with nothing": padded(((1, 1), (1, 1)), 0.0),
    "looked up beyond its end": filled(0.5),
    "looked up beyond its end, zero": filled(0.0),
    "scaled": lambda p, x: x @ (2.5 * p["w"]),
    "shifted": lambda p, x: x @ (p["w"] + 0.5),
    "subtracted from": lambda p, x: x @ (0.5 - p["w"]),
    "reversed": lambda p, x: x @ lax.rev(p["w"], (0, 1)),
    "added to another": lambda p, x: x @ (p["w"] + p["v"]),
    "beside another, along the outputs": lambda p, x: x @ jnp.concatenate([p["w"], p["v"]], 1),
    "beside another, along the sum": lambda p, x: jnp.tile(x, (1, 2)) @ jnp.concatenate([p["w"], p["v"]], 0),
    "beside itself": lambda p, x: jnp.tile(x, (1, 2)) @ jnp.concatenate([p["w"], p["w"]], 0),
}


@pytest.mark.filterwarnings("ignore::rslora_jax.RsloraWarning")
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_gain_reaches_the_weight_and_nothing_beside_it(name):
    fn, params, x = PROGRAMS[name], {"w": normal(0, 9, 7), "v": normal(1, 9, 7)}, normal(2, 4, 9)
    x = jnp.abs(x) + 0.5  # so that what is filled in counts
    config = rslora.LoraConfig(rank=3, alpha=7, method=Gained(), targets="*")
    lora = rslora.wrap(fn, params, x, config=config)
    adapters = trained(lora.init(jax.random.key(0)))
    acting = {n: jnp.asarray(by_hand(s, params[n], adapters[n]), "float32") for n, s in lora.sites.items()}
    np.testing.assert_allclose(lora.apply(params, adapters, x), fn(params | acting, x), rtol=2e-4, atol=2e-5)
