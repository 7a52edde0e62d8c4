from __future__ import annotations

import json
import sys

import pyarrow as pa
import pytest
from pyarrow import parquet

from rslora_jax.train.examples import Example, Message
from rslora_jax.train.reading import read_examples
from rslora_jax.train.records import read_jsonl

pytestmark = pytest.mark.by_day_on("newest")

RECORDS = [
    {"prompt": " p ", "completion": " c\n"},
    {"question": "q", "answer": "Zoë ∑ 🎉"},
    {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
    {"text": "t\n\nt"},
]
COLUMNS = ("prompt", "completion", "question", "answer", "messages", "text")


def write(path, table: dict, **options):
    parquet.write_table(pa.table(table), path, **options)
    return path


def test_parquet_gives_what_the_same_rows_give_as_json_lines(tmp_path):
    lines = tmp_path / "mine.jsonl"
    lines.write_text("\n".join(map(json.dumps, RECORDS)))
    table = {key: [record.get(key) for record in RECORDS] for key in COLUMNS} | {"id": [1, 2, 3, 4]}
    path = write(tmp_path / "mine.PARQUET", table)
    examples = read_examples(path)
    assert examples == read_jsonl(lines) == read_examples(lines)
    assert [example.origin for example in examples] == [f"{path}:{n}" for n in (1, 2, 3, 4)]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()])
def test_every_kind_of_string_column_is_read_over_batches_and_row_groups(tmp_path, kind):
    texts = [f"text {n}" for n in range(3000)]
    path = write(tmp_path / "mine.parquet", {"text": pa.array(texts).cast(kind)}, row_group_size=700)
    examples = read_examples(path)
    assert [example.completion for example in examples] == texts
    assert examples[2999].origin == f"{path}:3000"


def test_fields_that_other_messages_have_may_be_null(tmp_path):
    turns = [
        {"role": "user", "content": "u", "name": None},
        {"role": "assistant", "content": "a", "name": None},
    ]
    fields = pa.struct([(name, pa.string()) for name in ("role", "content", "name")])
    path = write(tmp_path / "mine.parquet", {"messages": pa.array([turns], pa.list_(fields))})
    assert read_examples(path) == [Example((Message("user", "u"),), "a")]


BAD_TABLES = {
    "a null": ({"question": ["q", "q"], "answer": ["a", None]}, ':2 lacks the key "answer"; write it as'),
    "empty": ({"text": ["t", " "]}, ':2 has "text" that is empty; fill it in or delete'),
    "a number": ({"prompt": ["p"], "completion": [4]}, ':1 has "completion" that is a number; make it a string'),
    "bytes": ({"text": [b"t"]}, ':1 has "text" that is bytes; make it a string'),
    "several": ({"text": [1] * 5}, "5 bad rows: {path}:1 has"),
    "a role": (
        {"messages": [[{"role": "usr", "content": "u"}, {"role": "assistant", "content": "a"}]]},
        ":1 has in message 1 the role 'usr'; use one of",
    ),
    "no rows": ({"text": pa.array([], pa.string())}, " holds no examples; write one example a row, as {{prompt"),
    "other columns": ({"words": ["i"]}, ' has the columns "words"; name them as {{prompt'),
    "no columns": ({}, " has the columns none; name them as"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_bad_row_is_named_by_file_and_row_with_what_to_do(tmp_path, case):
    table, message = BAD_TABLES[case]
    path = write(tmp_path / "mine.parquet", table)
    message = message.format(path=path)
    with pytest.raises(ValueError) as caught:
        read_examples(path)
    assert str(caught.value).startswith(message if message[0].isdigit() else f"{path}{message}")


def test_columns_of_one_name_and_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "mine.parquet"
    parquet.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), path)
    with pytest.raises(ValueError, match=r"mine\.parquet has the column \"text\" twice; keep one of them"):
        read_examples(path)
    broken = pa.array([b"good", b"caf\xe9"], pa.binary()).view(pa.string())
    write(path, {"text": ["a", "b"], "id": broken})
    assert len(read_examples(path)) == 2  # other columns are not read
    write(path, {"text": broken})
    with pytest.raises(ValueError, match=r"mine\.parquet:1 or one of the 1 rows after it is not UTF-8"):
        read_examples(path)


def test_a_file_that_is_not_parquet_or_is_cut_off_is_refused(tmp_path):
    path = write(tmp_path / "mine.parquet", {"text": ["t"] * 100})
    whole = path.read_bytes()
    for content in (b"", b'{"text": "t"}', whole[:-20], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"mine\.parquet is damaged or not Parquet \("):
            read_examples(path)


def test_without_pyarrow_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"mine\.parquet needs pyarrow to be read: pip install pyarrow"):
        read_examples(tmp_path / "mine.parquet")


@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_a_text_file_is_one_document_as_it_stands(tmp_path, suffix):
    path = tmp_path / f"mine{suffix}"
    path.write_bytes(b"\xef\xbb\xbf  One.\r\n\n\n\tTwo \xe2\x88\x91.\n")
    (example,) = read_examples(path)
    assert example == Example("", "  One.\r\n\n\n\tTwo ∑.\n")
    assert example.origin == str(path)


def test_what_is_no_text_is_refused(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes(b"one\ncaf\xe9\n")
    with pytest.raises(ValueError, match=r"mine\.txt:2 is not UTF-8; save the file as UTF-8"):
        read_examples(path)
    path.write_bytes(b" \n\n")
    with pytest.raises(ValueError, match=r"mine\.txt holds no text"):
        read_examples(path)


def test_a_file_of_another_kind_is_refused_with_the_kinds_there_are(tmp_path):
    for name in ("mine.xlsx", "mine", "mine.zip"):
        with pytest.raises(ValueError, match=rf"{name} is of no kind .* \.jsonl .* \.json .* \.parquet, \.txt or"):
            read_examples(tmp_path / name)


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".parquet"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, suffix):
    with pytest.raises(ValueError, match=r"cannot be read \(.*no such file or directory.*\); give the path of a"):
        read_examples(tmp_path / f"none{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(ValueError, match=r"folder.* cannot be read \(.*(is a directory|not a regular file).*\)"):
        read_examples(tmp_path / f"folder{suffix}")
