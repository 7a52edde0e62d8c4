"""Parquet files that unpack to far more than they are: refused in a sentence, with this process as small as it was."""

import resource
import time

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from pyarrow import parquet

from rslora_jax.train import parquet_rows
from rslora_jax.train.examples import Example
from rslora_jax.train.reading import read_examples


def repeated(text, count):
    """A column of one text again and again, of which the file holds one and a run of indices."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([text]))


BOMBS = {
    "a long text": lambda: repeated("x" * 1_000_000, 100_000),
    "many texts": lambda: repeated("x" * 20_000, 1_000_000),
    "many short texts": lambda: repeated("hello", 3_000_000),
    "many nulls": lambda: pa.nulls(3_000_000, pa.string()),
    "one page": lambda: pa.array(["y" * 200_000_000]),
    "many pages": lambda: pa.array(["y" * 1_000_000] * 200),
    "one wide emoji": lambda: repeated("x" * 1_000_000 + "\U0001f600", 1000),
    "a long list": lambda: pa.ListArray.from_arrays(pa.array([0, 30_000_000], pa.int32()), pa.nulls(30_000_000)),
}


BY_DAY = ("a long text", "many short texts", "one page")


@pytest.mark.parametrize("bomb", [b if b in BY_DAY else pytest.param(b, marks=pytest.mark.nightly) for b in BOMBS])
def test_a_small_file_that_unpacks_to_much_is_refused(bomb, tmp_path, monkeypatch):
    path = tmp_path / "bomb.parquet"
    column = BOMBS[bomb]()
    options = {"use_dictionary": bomb not in ("one page", "many pages")}
    parquet.write_table(pa.table({"text": column}), path, compression="zstd", **options)
    del column
    assert path.stat().st_size < 200_000
    monkeypatch.setattr(parquet_rows, "_KEPT", 60_000_000)
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ValueError, match=r"bomb\.parquet") as refused:
        read_examples(path)
    assert "unpack" in str(refused.value) and "\n" not in str(refused.value)
    assert time.process_time() - begun < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


@settings(max_examples=4, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=30).filter(str.strip), min_size=1, max_size=1500), st.booleans())
def test_what_a_file_holds_is_read_whole_and_in_order(tmp_path_factory, texts, dictionary):
    path = tmp_path_factory.getbasetemp() / "all.parquet"
    options = {"use_dictionary": dictionary, "row_group_size": 700, "data_page_size": 300}
    parquet.write_table(pa.table({"text": texts, "id": list(range(len(texts)))}), path, **options)
    assert read_examples(path) == [Example("", text) for text in texts]
