"""The checksum: every bit and every place counts, and where the array lies does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rslora_jax.store.checksum import checksums

DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "int32", "int8", "uint16", "int4", "bool", "complex64"]


def in_numpy(x) -> int:
    """The same sum in Python's own whole numbers."""
    bits = np.ascontiguousarray(x).view(f"uint{8 * x.dtype.itemsize}").ravel()
    total = 0
    for place, value in enumerate(bits.tolist()):
        v = (value + place * 0x9E3779B9) % 2**32
        for shift, odd in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            v = (v ^ (v >> shift)) * odd % 2**32
        total += v ^ (v >> 16)
    return total % 2**32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_it_is_the_sum_of_the_mixed_bits(dtype):
    x = np.asarray(jax.random.normal(jax.random.key(0), (3, 5, 2)) * 10, dtype)
    form, word = checksums({"x": x})["x"].split()
    assert form == f"{dtype}[3,5,2]" and int(word, 16) == in_numpy(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_change_a_swap_and_another_shape_are_seen(dtype):
    x = jnp.array([0, 1, 1, 0, 1, 0], dtype)
    changed, swapped = x.at[3].set(x[1]), x[jnp.array([1, 0, 2, 3, 4, 5])]
    sums = [checksums(v)[""] for v in (x, changed, swapped, x.reshape(2, 3))]
    assert len(set(sums)) == 4
    assert sums[0] == checksums(np.asarray(x))[""]


def test_signs_of_zero_and_kinds_of_nan_are_bits_too():
    nan = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    assert len({checksums(np.float32([v]))[""] for v in (0.0, -0.0, *nan)}) == 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stack_is_summed_slice_by_slice_and_is_what_its_rows_are(dtype):
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2, (3, 5, 2))).astype(dtype)
    assert checksums(x)[""].split()[1] == checksums(x.reshape(15, 2))[""].split()[1]
    assert checksums(x)[""] == checksums(np.asarray(x))[""]
