"""Rounding at random: to one of two neighbours, right on average; beside numpy in float64, from the definitions."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from rslora_jax.train.rounded import rounded

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]
FORMS = ("bfloat16", "int8")
SHAPES = {
    (96, 64): (1, 64),
    (3, 160, 11): (1, 160),
    (4608,): (0, 256),
    (2, 40, 64): (2, 64),
}  # and the blocks of 8 bits


@functools.cache
def compiled(form):
    return jax.jit(lambda x, seed: rounded(x, form, seed).whole())


@st.composite
def arrays(draw):
    """Numbers of any spread and size, with zeros among them, with signs or without."""
    shape = draw(st.sampled_from(sorted(SHAPES)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.standard_normal(shape) * np.exp(draw(st.floats(0, 6)) * rng.standard_normal(shape))
    x = np.abs(x) if draw(st.booleans()) else x
    x = x * (rng.random(shape) >= draw(st.sampled_from([0, 0.3, 1])))
    return (x * 10.0 ** draw(st.integers(-12, 12))).astype("float32")


def neighbours(x, form):
    """Return the numbers of a form below and above each magnitude, in float64; and whether the mean is to hold."""
    if form == "bfloat16":
        near = np.abs(x).astype(ml_dtypes.bfloat16)
        above = np.nextafter(near, np.array(np.inf, ml_dtypes.bfloat16)).astype("float64")
        below = np.nextafter(near, np.array(0, ml_dtypes.bfloat16)).astype("float64")
        near, magnitude = near.astype("float64"), np.abs(x).astype("float64")
        return np.where(near > magnitude, below, near), np.where(near > magnitude, near, above), np.ones(x.shape, bool)
    axis, block = SHAPES[x.shape]
    parts = np.moveaxis(x, axis, -1)
    parts = parts.reshape(*parts.shape[:-1], -1, block)
    found = [np.empty(parts.shape) for _ in range(3)]
    for place in np.ndindex(parts.shape[:-1]):
        for out, of in zip(found, of_block(parts[place]), strict=True):
            out[place] = of

    def back(array):
        return np.moveaxis(array.reshape(*array.shape[:-2], -1), -1, axis)

    return back(found[0]), back(found[1]), back(found[2]).astype(bool)


def of_block(x):
    """Return the neighbours in one block of 8 bits."""
    signed, magnitude = (x < 0).any(), np.abs(x)
    if not magnitude.any():
        return magnitude, magnitude, True
    bits, levels = magnitude.view("int32").astype(int), 127 if signed else 255
    top = bits.max()
    least = max(bits[bits > 0].min(), top - ((12 if signed else 32) << 23))
    step = max(1, int(np.ceil((top - least) / (levels - 1))))
    numbers = (least + step * np.arange(levels)).astype("int32").view("float32").astype("float64")
    numbers = np.array([0, *numbers])
    at = np.searchsorted(numbers, magnitude, side="right") - 1
    lower, upper = numbers[at], numbers[np.minimum(at + 1, levels)]
    lower = np.where((at == 0) & (magnitude > 0) & ~signed, numbers[1], lower)
    return lower, np.where(magnitude == 0, 0, upper), signed | (bits >= least) | (bits == 0)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=20, deadline=None, phases=[Phase.generate])
@given(arrays(), st.integers(0, 2**32 - 1))
def test_a_number_becomes_one_of_its_neighbours(form, x, seed):
    got = np.asarray(compiled(form)(x, jnp.uint32(seed)), np.float64)
    lower, upper, _ = neighbours(x, form)
    assert (np.signbit(got) == np.signbit(x))[got != 0].all()
    # Of a number on a neighbour, a billionth of the way to the next may be taken for none of it, and back.
    on = [np.isclose(np.abs(got), of, rtol=1e-6, atol=0) for of in (lower, upper)]
    assert (on[0] | on[1]).all()
    exact = np.abs(x) == lower
    assert np.isclose(np.abs(got), np.abs(x), rtol=1e-6, atol=0)[exact].all()
    if not (x < 0).any():
        assert (got > 0)[x > 0].all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("signs", [True, False])
def test_the_mean_over_seeds_is_the_number(form, signs):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((96, 64)) * np.exp(2 * rng.standard_normal((96, 64)))
    x = (x if signs else np.abs(x)).astype("float32")
    lower, upper, unbiased = neighbours(x, form)
    many = np.stack([compiled(form)(x, jnp.uint32(977 * n)) for n in range(300)]).astype("float64")
    part = np.clip((np.abs(x) - lower) / np.maximum(upper - lower, 1e-300), 0, 1)
    deviation = (upper - lower) * np.sqrt(part * (1 - part) / 300) + 1e-6 * np.abs(x)
    error = np.abs(many.mean(0) - x) / deviation
    assert error[unbiased & (part > 0.02) & (part < 0.98)].max() < 6 and unbiased.mean() > 0.98
    assert 0.6 < np.sqrt((np.minimum(error, 6)[unbiased] ** 2).mean()) < 1.1
    # One place's noise says nothing of its neighbour's, and one seed's nothing of the next.
    off = (many - x).reshape(300, -1) / deviation.ravel()
    assert abs(np.mean(off[1:] * off[:-1])) < 0.02 * 300 and abs(np.mean(off[:, 1:] * off[:, :-1])) < 0.02 * 300


@pytest.mark.parametrize(
    ("form", "b2", "noise"), [("bfloat16", 0.999, 0.06), ("bfloat16", 0.99, 0.03), ("int8", 0.99, 0.2)]
)
def test_a_slow_average_moves_as_in_float64_where_rounding_to_the_nearest_stands_still(form, b2, noise):
    """It falls from 1 for a while without gradients, and is then to follow their squares."""
    rng = np.random.default_rng(0)
    begin = np.ones((64, 64), "float32") if form == "bfloat16" else rng.uniform(0.3, 3, (64, 64)).astype("float32")
    squares = np.where(np.arange(1500) < 700, 0, 2).astype("float32")

    @jax.jit
    def run(x, squares):
        def one(x, n):
            held, nearest = x
            held = rounded(b2 * held + (1 - b2) * squares[n], form, n.astype(jnp.uint32)).whole()
            nearest = (b2 * nearest + (1 - b2) * squares[n]).astype(jnp.bfloat16).astype(jnp.float32)
            return (held, nearest), (held.mean(), nearest.mean())

        return jax.lax.scan(one, (x, x), jnp.arange(len(squares)))

    (held, _), means = run(begin, squares)
    want, by_hand = begin.astype("float64"), []
    for square in squares:
        want = b2 * want + (1 - b2) * square
        by_hand.append(want.mean())
    np.testing.assert_allclose(means[0], by_hand, rtol=noise / 6)
    assert np.std(held / want) < noise
    if b2 == 0.999:
        assert (np.asarray(means[1])[:700] == 1).all() and by_hand[699] < 0.5


def test_what_is_no_number_stays_none():
    for form in FORMS:
        for bad in (np.nan, np.inf, -np.inf):
            x = np.random.default_rng(0).standard_normal((64, 64)).astype("float32")
            x[3, 5] = bad
            assert not np.isfinite(compiled(form)(x, jnp.uint32(3))[3, 5])


def test_bytes_are_as_said_and_small_arrays_stay():
    def held(shape, form):
        return rounded(jnp.zeros(shape), form, jnp.uint32(0))

    assert sum(leaf.nbytes for leaf in held((3, 5), "bfloat16")) == 2 * 15
    assert sum(leaf.nbytes for leaf in held((512, 64), "int8")) == 512 * 64 + 8 * 512
    for shape in ((63, 64), (30, 20, 31), (4099,)):
        assert held(shape, "int8") is None, shape
