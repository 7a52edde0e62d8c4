"""The files that examples come in: whatever the kind, the same examples, and errors that say file and line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rslora_jax.train import read_examples, unpacked
from rslora_jax.train.examples import Example

from . import chats

pytestmark = pytest.mark.by_day_on("newest")

RECORDS = st.lists(
    st.one_of(
        st.fixed_dictionaries({"prompt": chats.TEXTS, "completion": chats.TEXTS}),
        st.fixed_dictionaries({"instruction": chats.TEXTS, "input": chats.TEXTS | st.just(""), "output": chats.TEXTS}),
        st.fixed_dictionaries({"messages": chats.conversations()}),
        st.fixed_dictionaries({"text": chats.TEXTS}),
    ),
    min_size=1,
    max_size=5,
)
COLUMNS = ("id", "prompt", "completion", "instruction", "input", "output", "messages", "text")


def as_csv(records, delimiter):
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(COLUMNS)
    for record in records:
        cells = [record.get(name, "") for name in COLUMNS]
        writer.writerow([json.dumps(cell) if isinstance(cell, list) else cell for cell in cells])
    return out.getvalue()


def as_lines(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\r\n\n" for record in records)


KINDS = {
    "jsonl": as_lines,
    "json": as_lines,
    "JSON": lambda records: json.dumps(records, indent=2),
    "array.json": lambda records: "\n" + json.dumps(records) + "\n",
    "csv": lambda records: as_csv(records, ","),
    "semicolons.csv": lambda records: as_csv(records, ";"),
    "tsv": lambda records: as_csv(records, "\t"),
}


@settings(deadline=None)
@given(RECORDS, st.sampled_from([*KINDS]), st.booleans(), st.booleans())
def test_the_kind_of_a_file_changes_no_example(tmp_path_factory, records, kind, packed, marked):
    folder = tmp_path_factory.mktemp("kinds")
    plain = folder / "a.jsonl"
    plain.write_text(as_lines(records), encoding="utf-8", newline="")
    data = KINDS[kind](records).encode()
    data = b"\xef\xbb\xbf" + data if marked else data
    path = folder / f"mine.{kind}{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(data) if packed else data)
    assert read_examples(path) == read_examples(plain)


def test_a_long_cell_and_cells_of_several_lines_are_read_and_said_by_line(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text('text,id\n"one\ntwo, ""three""",1\n\n' + "x" * 200_000 + ",2\nfour,3\n", encoding="utf-8")
    limit = csv.field_size_limit()
    examples = read_examples(path)
    assert [e.completion for e in examples] == ['one\ntwo, "three"', "x" * 200_000, "four"]
    assert [e.origin.rpartition(":")[2] for e in examples] == ["2", "5", "6"]
    assert csv.field_size_limit() == limit


def test_objects_of_an_array_are_said_by_line_and_of_a_line_by_their_own_number(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('[\n {"text": "a"},\n\n {"text": "b"}, {"text":\n "c"},\n {"text": "d"}]')
    assert [e.origin.rpartition(":")[2] for e in read_examples(path)] == ["2", "4", "4", "6"]
    path.write_text('\n[{"text": "a"}, {"text": "b"}, {"text": "c"}]\n')
    assert [e.origin.rpartition(":")[2] for e in read_examples(path)] == ["1", "2", "3"]


GOOD = gzip.compress(b'{"text": "a"}\n' * 5000, mtime=0)
BAD = {
    "no array": ("a.json", b'[{"text": "a"}\n{"text": "b"}]', ":2 has no comma after an object"),
    "half an array": (
        "a.json",
        b'[{"text": "a"},\n{"text": ',
        ":2 is not JSON (expecting value at column 10); write one",
    ),
    "an open array": ("a.json", b'[{"text": "a"}\n', ":2 has no comma after an object, or no ] at its end"),
    "more behind it": ("a.json", b'[{"text": "a"}] 7', " goes on behind its array"),
    "a number in it": ("a.json", b'[{"text": "a"},\n7]', ":2 is a number, not an object"),
    "latin-1 in it": ("a.json", b'[{"text": "a"},\n{"text": "caf\xe9"}]', ":2 is not UTF-8; save the file as UTF-8"),
    "twice": ("a.json", b'[\n{"text": "a", "text": "b"}]', ':2 has the key "text" twice'),
    "an empty array": ("a.json", b"[]", " holds no examples; write one example an object"),
    "deep": ("a.json", b"[" * 100_000, ":1 is nested too deeply"),
    "another column": ("a.csv", b"words,deeds\na,b\n", ':1 has the columns "words", "deeds"; name them as {prompt'),
    "columns of one name": ("a.csv", b"text,text\na,b\n", ':1 has the column "text" twice; keep one of them'),
    "too many cells": (
        "a.csv",
        b"prompt,completion\np,c\np,c,d\n",
        ":3 has 3 cells for 2 columns; put text with commas",
    ),
    "an open quote": ("a.csv", b'text\n"a\nb\n', ":2 is not CSV ("),
    "UTF-16": ("a.csv", "text\na\n".encode("utf-16"), ":1 is not UTF-8; save the file as UTF-8"),
    "latin-1": ("a.csv", b"text\na\ncaf\xe9\n", ":3 is not UTF-8; save the file as UTF-8"),
    "only a header": ("a.csv", b"text\n", " holds no examples; write one example a row"),
    "nothing": ("a.csv", b"", " holds no examples"),
    "half a gz": ("a.jsonl.gz", GOOD[: len(GOOD) // 2], " is cut off, damaged or not gzip ("),
    "no gz": ("a.jsonl.gz", b'{"text": "a"}', ":1 is cut off, damaged or not gzip ("),
    "a gz of nothing": ("a.jsonl.gz", b"", " holds no examples"),
    "a bad line in a gz": ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n7\n'), ":2 is a number, not an object"),
    "half a gz of text": ("a.txt.gz", GOOD[:-9], " is cut off, damaged or not gzip ("),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_sentence_with_its_line(tmp_path, case):
    name, data, said = BAD[case]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError) as caught:
        read_examples(path)
    message = str(caught.value)
    assert (
        message.startswith(str(path))
        and said in message
        and "\n" not in message
        and len(message) < 330 + len(str(path))
    )


@settings(deadline=None)
@given(st.binary(max_size=40), st.integers(0, 10**6), st.sampled_from(["a.jsonl.gz", "a.csv", "a.json", "a.csv.gz"]))
def test_damaged_bytes_are_refused_or_read(tmp_path_factory, extra, at, name):
    path = tmp_path_factory.getbasetemp() / name
    good = b'text\n"a ""b"" c"\nd\n' if "csv" in name else b'[{"text": "a"},\n {"text": "b"}]'
    data = gzip.compress(good) if name.endswith("gz") else good
    at %= len(data) + 1
    path.write_bytes(data[:at] + extra + data[at + len(extra) // 2 :])
    try:
        assert all(isinstance(example, Example) for example in read_examples(path))
    except ValueError as error:
        assert str(error).partition(" bad ")[0].isdigit() or str(error).startswith(str(path))


def test_a_packed_file_that_unpacks_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(unpacked, "_MOST", 10_000)
    for name, line in (("a.jsonl.gz", b'{"text": "a"}\n'), ("b.txt.gz", b"a"), ("c.json.gz", b"["), ("d.csv.gz", b"a")):
        packer = zlib.compressobj(9, zlib.DEFLATED, 31)
        (tmp_path / name).write_bytes(packer.compress(line * 300_000) + packer.flush())
        with pytest.raises(
            ValueError, match=r"unpacks to more than .* MB, 100 times its size|is longer than|too deeply"
        ):
            read_examples(tmp_path / name)


def test_a_folder_is_all_files_of_data_in_it(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "0.csv").write_text("text\nfour\n")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "a.json").write_text('[{"text": "zero"}]')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three"}'))
    (tmp_path / "README.md").write_text("About the data.")
    (tmp_path / "notes.txt").write_text("Beside data, no data.")
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / ".hidden.jsonl").write_text("7")
    (tmp_path / "picture.png").write_bytes(b"x")
    words = ["zero", "one", "two", "three", "four"]
    assert sorted(e.completion for e in read_examples(tmp_path)) == sorted(words)
    texts = tmp_path / "texts"
    texts.mkdir()
    with pytest.raises(ValueError, match=r"texts has no file of data; give a file or a folder with \.jsonl"):
        read_examples(texts)
    (texts / "b.md").write_text("b")
    (texts / "a.txt").write_text("a")
    assert [e.completion for e in read_examples(texts)] == ["a", "b"]


def test_a_data_set_of_hugging_face_without_its_package_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    for name in ("hf:gsm8k", "trl-lib/Capybara"):
        with pytest.raises(
            ValueError, match=f"{name} is no file here, and a data set of Hugging Face .*pip install datasets"
        ):
            read_examples(name)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"saved is no file here.*pip install datasets"):
        read_examples(tmp_path / "saved")
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match="data/mine is of no kind that can be read"):
        read_examples("data/mine")


def test_columns_and_bad_rows_are_as_in_every_kind(tmp_path):
    for name, data in (
        ("a.jsonl", '{"q": "1", "a": "2", "text": "t"}\n7\n{"q": "3"}\n'),
        ("a.csv", "q,a,text\n1,2,t\n7\n3,,\n"),
        ("a.json", '[{"q": "1", "a": "2", "text": "t"},\n7,\n{"q": "3"}]'),
    ):
        (tmp_path / name).write_text(data)
        skipped = []
        found = read_examples(tmp_path / name, columns={"prompt": "q", "completion": "a"}, skipped=skipped)
        assert found == [Example("1", "2")] and len(skipped) == 2, name
        assert 'lacks the key "a" that --columns names' in skipped[1] and skipped[1].startswith(f"{tmp_path / name}:")
        with pytest.raises(ValueError, match=r"2 bad (line|row|object)s: "):
            read_examples(tmp_path / name, columns={"prompt": "q", "completion": "a"})
