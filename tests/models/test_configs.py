"""Published sizes against published numbers of parameters."""

import math

import jax
import jax.numpy as jnp
import pytest

from rslora_jax.models.configs import LLAMA2_7B, LLAMA31_8B, LLAMA33_70B
from rslora_jax.models.decoder import Decoder


@pytest.mark.parametrize(
    ("config", "published"),
    [(LLAMA2_7B, 6_738_415_616), (LLAMA31_8B, 8_030_261_248), (LLAMA33_70B, 70_553_706_496)],
)
def test_a_config_has_the_published_number_of_parameters(config, published):
    variables = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables)) == published
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("bfloat16")}
