"""Globs of flags and configs end: braces that multiply are refused, and stars take no time without end."""

import itertools
import time

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from rslora_jax.config import expand_braces, matches

_PARTS = st.lists(st.one_of(st.sampled_from("ab*/"), st.lists(st.sampled_from(["q", "v", ""]), min_size=1, max_size=3)))


@settings(max_examples=100, deadline=None)
@given(_PARTS.filter(lambda parts: len(parts) < 7))
def test_braces_are_written_out_as_the_product_of_their_alternatives(parts):
    pattern = "".join(part if isinstance(part, str) else "{" + ",".join(part) + "}" for part in parts)
    options = [[part] if isinstance(part, str) else part for part in parts]
    assert expand_braces(pattern) == ["".join(chosen) for chosen in itertools.product(*options)]


BRACES = {"many": "{a,b}" * 60, "one": "{" + "a," * 5000 + "}", "nested": "{{a,b}{a,b}}" * 30}


@pytest.mark.parametrize("pattern", BRACES.values(), ids=BRACES)
def test_alternatives_without_end_are_refused(pattern):
    begun = time.process_time()
    with pytest.raises(ValueError, match="has more than 1000 alternatives"):
        matches("params/a", pattern)
    assert time.process_time() - begun < 1


def test_many_stars_end():
    begun = time.process_time()
    assert not matches("a" * 2000, "*a" * 40 + "b")
    assert time.process_time() - begun < 1
