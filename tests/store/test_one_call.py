"""`rslora.save` and `rslora.load`: what was given comes back, and commands read the folder as a run's."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rslora_jax as rslora

PARAMS = {"up": jnp.ones((6, 4)), "down": jnp.full((4, 6), 0.5), "scale": jnp.ones(6)}
X = jnp.ones((2, 6))


def mlp(params, x):
    return jnp.tanh(x * params["scale"] @ params["up"]) @ params["down"]


def wrapped(**more):
    return rslora.wrap(mlp, PARAMS, X, config=rslora.LoraConfig(**{"rank": 3, "alpha": 5, **more}))


@pytest.mark.parametrize("more", [{}, {"method": "dora"}, {"targets": ["up"], "trained": ["scale"]}], ids=str)
def test_what_was_saved_comes_back_bit_for_bit(tmp_path, more):
    lora = wrapped(**more)
    adapters = jax.tree.map(lambda x: x + 0.25, lora.init(jax.random.key(0), PARAMS))
    where = rslora.save(tmp_path / "run", lora, adapters, params=PARAMS)
    assert where == tmp_path / "run" / "checkpoints" / "0"
    config, read = rslora.load(tmp_path / "run", params=PARAMS)
    again = rslora.wrap(mlp, PARAMS, X, config=config)
    assert jax.tree.structure(read) == jax.tree.structure(adapters)
    jax.tree.map(np.testing.assert_array_equal, read, adapters)
    np.testing.assert_array_equal(again.apply(PARAMS, read, X), lora.apply(PARAMS, adapters, X))


def test_each_call_adds_a_step_and_nothing_is_lost(tmp_path):
    lora = wrapped()
    states = [jax.tree.map(lambda x, n=n: x + n, lora.init(jax.random.key(0))) for n in range(4)]
    for state in states:
        rslora.save(tmp_path / "run", lora, state)
    rslora.save(tmp_path / "run", lora, states[0], step=70)
    for n, state in enumerate(states):
        jax.tree.map(np.testing.assert_array_equal, rslora.load(tmp_path / "run", step=n)[1], state)
    jax.tree.map(np.testing.assert_array_equal, rslora.load(tmp_path / "run")[1], states[0])
    with pytest.raises(ValueError, match="has a checkpoint of step 70: give another step"):
        rslora.save(tmp_path / "run", lora, states[0], step=70)
    for step in (-1, 1.5):
        with pytest.raises(ValueError, match="is no number of a step"):
            rslora.save(tmp_path / "run", lora, states[0], step=step)


def test_what_does_not_belong_is_refused(tmp_path):
    lora, other = wrapped(), wrapped(rank=4)
    with pytest.raises(ValueError, match="up"):
        rslora.save(tmp_path / "run", lora, other.init(jax.random.key(0)))
    assert not (tmp_path / "run").exists()
    rslora.save(tmp_path / "run", lora, lora.init(jax.random.key(0)), params=PARAMS)
    with pytest.raises(ValueError, match="was trained with another base"):
        rslora.load(tmp_path / "run", params=PARAMS | {"up": PARAMS["up"] + 1})


def test_a_description_is_plain_and_says_all_that_the_table_does():
    lora = wrapped(rank_pattern={"down": 2})
    said = json.loads(json.dumps(lora.describe()))
    assert said["config"] == {"rank": 3, "alpha": 5, "scaling": "rslora", "method": "lora"}
    assert {path: (site["rank"], site["gamma"]) for path, site in said["sites"].items()} == {
        "up": (3, 5 / 3**0.5),
        "down": (2, 5 / 2**0.5),
    }
    assert said["left_out"] == dict(lora.left_out) and "scale" in said["left_out"]
    assert said["parameters"]["trained"] == lora.num_parameters == 3 * 10 + 2 * 10
    assert said["parameters"]["base"] == 6 * 4 + 4 * 6 + 6
