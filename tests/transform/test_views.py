"""Renaming a view and then forming its sum equals forming the sum and then renaming it."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rslora_jax.transform import renames
from rslora_jax.transform.views import View, materialise

pytestmark = pytest.mark.usefixtures("compile_fast")

ROLES = ("in", "out", "stack")


def make(sizes, roles, rank=3):
    """A view of random numbers, and its sum in numpy from the definition."""
    a_sizes = [n if role != "out" else 1 for n, role in zip(sizes, roles, strict=True)]
    b_sizes = [n if role != "in" else 1 for n, role in zip(sizes, roles, strict=True)]
    r = np.random.default_rng(0)
    w, a, b = (r.normal(size=s).astype(np.float32) for s in (sizes, (*a_sizes, rank), (*b_sizes, rank)))
    axes = tuple(frozenset({("w", n)}) for n in range(len(sizes)))
    view = View(jnp.asarray(w), axes, jnp.dtype("float32"), ("w",), (jnp.asarray(a), jnp.asarray(b)))
    return view, w + (a.astype(np.float64) * b).sum(-1)


weights = st.lists(st.tuples(st.integers(1, 4), st.sampled_from(ROLES)), min_size=1, max_size=4)


@settings(max_examples=25, deadline=None)
@given(weights, st.randoms(use_true_random=False))
def test_transposing_commutes_with_adding(weight, random):
    view, total = make(*zip(*weight, strict=True))
    order = list(range(len(weight)))
    random.shuffle(order)
    got = renames.transpose(view, order)
    np.testing.assert_allclose(materialise(got), total.transpose(order), atol=1e-5)
    assert [set(axes) for axes in got.axes] == [{("w", n)} for n in order]


@settings(max_examples=25, deadline=None)
@given(weights, st.data())
def test_slicing_commutes_with_adding(weight, data):
    view, total = make(*zip(*weight, strict=True))
    picks = []
    for size, _ in weight:
        start = data.draw(st.integers(0, size - 1))
        picks.append((start, data.draw(st.integers(start + 1, size)), data.draw(st.integers(1, 2))))
    starts, limits, strides = zip(*picks, strict=True)
    got = renames.slice_axes(view, starts, limits, strides)
    want = total[tuple(slice(*pick) for pick in picks)]
    np.testing.assert_allclose(materialise(got), want, atol=1e-5)
    sizes = [limit - start for start, limit, _ in picks]
    moved = renames.dynamic_slice(view, [jnp.int32(n) for n in starts], sizes)
    want = total[tuple(slice(start, limit) for start, limit, _ in picks)]
    np.testing.assert_allclose(materialise(moved), want, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(weights, st.randoms(use_true_random=False))
def test_a_reshape_is_followed_exactly_where_no_axis_of_a_meets_one_of_b(weight, random):
    sizes, roles = zip(*weight, strict=True)
    view, total = make(sizes, roles)
    shapes = [s for s in factorisations(math.prod(sizes)) if len(s) <= 5]
    shape = random.choice(shapes)
    got = renames.reshape(view, shape)
    if got is None:
        groups = renames.reshape_groups(sizes, shape)
        mixed = [{roles[n] for n in old if sizes[n] > 1} for old, _ in groups]
        assert any(len(group) > 1 for group in mixed)
    else:
        np.testing.assert_allclose(materialise(got), total.reshape(shape), atol=1e-5)


def factorisations(number):
    """All shapes of the given size without more than one axis of size 1."""
    if number == 1:
        return [(), (1,)]
    found = [(number,), (1, number), (number, 1)]
    for n in range(2, number):
        if number % n == 0:
            found += [(n, *rest) for rest in factorisations(number // n) if rest]
    return found


def test_reshape_groups_hold_every_axis_once_and_multiply_to_the_same():
    for old, new in itertools.product([(2, 3, 4), (6, 4), (24,), (1, 24), (2, 1, 12), (3, 8, 1)], repeat=2):
        groups = renames.reshape_groups(old, new)
        assert [n for olds, _ in groups for n in olds] == list(range(len(old)))
        assert [n for _, news in groups for n in news] == list(range(len(new)))
        assert all(math.prod(old[n] for n in o) == math.prod(new[n] for n in m) for o, m in groups)
    assert renames.reshape_groups((6,), (5,)) is None and renames.reshape_groups((0, 2), (0,)) is None


def test_the_sum_is_formed_before_it_is_rounded():
    """Neither half of the update is seen in bfloat16, whose step at 1 is 2^-7; both together are."""
    step = 2.0**-7
    w, a, b = jnp.full((2, 2), 1 + 0.3 * step), jnp.ones((2, 1, 1)), jnp.full((1, 2, 1), 0.3 * step)
    axes = (frozenset({0}), frozenset({1}))
    assert (materialise(View(w, axes, jnp.dtype("bfloat16"), ("w",), (a, b))) == 1 + step).all()


def test_an_update_to_a_weight_stored_in_few_bits_is_kept_where_the_program_computes_in_more():
    w, a, b = jnp.ones((2, 2), jnp.bfloat16), jnp.ones((2, 1, 1)), jnp.full((1, 2, 1), 2.0**-12)
    axes = (frozenset({0}), frozenset({1}))
    assert (materialise(View(w, axes, jnp.dtype("float32"), ("w",), (a, b))) == 1 + 2.0**-12).all()
