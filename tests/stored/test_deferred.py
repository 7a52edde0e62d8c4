"""What was put off is the same whatever a scan or vmap then takes off, or puts before, the stack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rslora_jax.transform import renames
from tests.stored.eight_bits import eight_bits


def twice(w):
    return jax.tree.map(lambda array: jnp.stack([array, array]), w)


def element(w, n):
    return jax.tree.map(lambda array: array[n], w)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_axes_of_a_stack_come_and_go_after_an_operation_was_put_off(dtype):
    w = eight_bits(jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 4, 5)), jnp.float32))
    put_off, whole = renames.cast(w, jnp.dtype(dtype)), w.dense().astype(dtype)
    cases = {
        "as it was": (put_off, whole),
        "one taken off": (element(put_off, 1), whole[1]),
        "two taken off": (element(element(put_off, 1), 0), whole[1, 0]),
        "off and on": (twice(element(put_off, 2)), jnp.stack([whole[2]] * 2)),
        "one put before": (twice(put_off), jnp.stack([whole] * 2)),
    }
    for name, (found, want) in cases.items():
        assert found.shape == want.shape and found.dtype == want.dtype, name
        np.testing.assert_array_equal(found.dense(), want, err_msg=name)
