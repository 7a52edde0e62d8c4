"""A state that a checkpoint cannot hold is refused before the first step; every other is saved and read again."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import rslora_jax as rslora
from rslora_jax import train
from rslora_jax.store import checkpoint

KINDS = ["int2", "int4", "uint2", "uint4", "float4_e2m1fn", "int8", "bfloat16", "float16", "complex64", "bool"]
KINDS += [name for name in dir(ml_dtypes) if name.startswith("float8")]


def start(dtype, folder):
    """Train a matrix for two steps, with a state of the model of a dtype; give how many batches were asked for."""
    asked = []

    class Batches:
        def __getitem__(self, n):
            asked.append(n)
            return np.ones((2, 4), np.float32)

    options = {"optimizer": optax.sgd(0.1), "steps": 2, "folder": folder, "show": False, "batches": Batches()}
    state = {"codes": {"w": jnp.ones(5, dtype)}}
    fn, params = (lambda p, s, x: (x @ p, s)), jnp.ones((4, 4))
    lora = rslora.wrap(fn, params, state, jnp.ones((2, 4)), config=rslora.LoraConfig(rank=3, alpha=7))
    adapters = lora.init(jax.random.key(0))

    def with_state(run, batch, state):
        out, state = run(state, batch)
        return jnp.sum(out**2), jnp.float32(batch.size), state

    return asked, lambda: train.fit(lora, params, adapters, loss=with_state, model_state=state, **options)


BY_DAY = ("uint4", "int4", "float8_e5m2")


@pytest.mark.parametrize("dtype", [k if k in BY_DAY else pytest.param(k, marks=pytest.mark.nightly) for k in KINDS])
def test_a_state_is_saved_and_read_again_or_refused_before_the_first_step(dtype, tmp_path):
    asked, run = start(dtype, tmp_path / "run")
    try:
        result = run()
    except ValueError as refused:
        assert f"codes/w is of {dtype}, which a checkpoint cannot hold" in str(refused)
        assert not asked and not (tmp_path / "run").exists()
        return
    assert result.saved == 2
    read = checkpoint.load_model_state(tmp_path / "run", {"codes": {"w": 0}})["codes"]["w"]
    assert str(read.dtype) == dtype and np.array_equal(np.asarray(read), np.ones(5, read.dtype))


def test_some_are_refused():
    with pytest.raises(ValueError, match="is of uint4"):
        start("uint4", "nowhere")[1]()
