"""The user's own data, read by the kind of file."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from rslora_jax.train.csv_rows import csv_rows, decode_row
from rslora_jax.train.examples import Example
from rslora_jax.train.forms import KEYS
from rslora_jax.train.hub_data import hub_rows, is_hub_name, is_saved_set
from rslora_jax.train.json_array import array_rows, is_array
from rslora_jax.train.parquet_rows import check_pyarrow, parquet_rows
from rslora_jax.train.records import an_object, decode_line, lines_of, parse_all
from rslora_jax.train.unpacked import content, text_of, unpacked_file

_RECORDS, _TEXTS = (".jsonl", ".json", ".csv", ".tsv", ".parquet"), (".txt", ".md")
# What lies beside the data in a folder, and is none.
_BESIDE = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "readme.md", "license.txt")
KINDS_HELP = (
    ".jsonl (one JSON object a line), .json (that, or one array), .csv, .tsv, .parquet, .txt or .md (plain text), each "
    "with or without .gz, a folder of them, or hf:NAME for a data set of Hugging Face"
)


def read_examples(
    path: str | PathLike[str], *, columns: Mapping[str, str] | None = None, skipped: list[str] | None = None
) -> list[Example]:
    """Read a data file; its suffix says how, without the .gz that it may end in.

    - `.jsonl`: one JSON object a line, as `read_jsonl` says. `.json`: that, or one array of such objects.
    - `.csv`, `.tsv`: the same forms, with columns for keys, which the first line names. An empty cell is a key that is
      not there; turns and tools are written as JSON.
    - `.parquet`: the same with columns of every kind; needs pyarrow. A null is a key that is not there, so
      one file may hold several forms. Other columns are not read.
    - `.txt`, `.md`: one document, all of which is learnt, just as it stands: blank lines, indents and line ends
      are kept. `prepare` splits what is longer than a row, so nothing is lost. For many documents in one
      file, write `{"text": ...}` lines.
    - A folder: all files of records in it and in its folders, in the order of their names; where there are none, all
      texts. One that `datasets` saved is read by `datasets`.
    - `hf:NAME`, with a configuration and a split as in `hf:NAME:CONFIG:SPLIT`: a data set of the hub, by `datasets`.

    Args:
      path: where it is.
      columns: what the keys of the form are called there, such as {"prompt": "question"}.
      skipped: where it is given, bad rows are left out, and told in it, one text each.

    Raises:
      ValueError: the suffix is none of these, the file cannot be read or holds no example, or rows are bad:
        the message names the file and the first bad rows, counted from 1.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp(), "rhyme.txt")
    >>> _ = path.write_text("One, two.\\n\\nBuckle my shoe.\\n")
    >>> [example.completion for example in read_examples(path)]
    ['One, two.\\n\\nBuckle my shoe.\\n']
    """
    how: dict[str, Any] = {"columns": columns, "skipped": skipped}
    if is_hub_name(path) or is_saved_set(path):
        return parse_all(path, hub_rows(str(path), _wanted(how)), _without_nulls, kind="row", **how)
    if Path(path).is_dir() and not kind_of(path):
        return [example for file in files_of(Path(path)) for example in _read_file(file, how)]
    return _read_file(path, how)


def files_of(folder: Path) -> list[Path]:
    """Return the files of a folder that are read: those of records, or else texts, in the order of their names.

    Raises:
      ValueError: there are none.
    """
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name.lower() not in _BESIDE]
    found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    for kinds in (_RECORDS, _TEXTS):
        if chosen := [path for path in found if kind_of(path) in kinds]:
            return chosen
    raise ValueError(f"{folder} has no file of data; give a file or a folder with {KINDS_HELP}")


def kind_of(path: str | PathLike[str]) -> str:
    """Return the suffix that says of which kind a file is; nothing for one of no kind.

    >>> kind_of("mine.JSONL.gz"), kind_of("mine.parquet"), kind_of("mine.doc")
    ('.jsonl', '.parquet', '')
    """
    name = str(path).lower().removesuffix(".gz")
    return next((kind for kind in (*_RECORDS, *_TEXTS) if name.endswith(kind)), "")


def _read_file(path: str | PathLike[str], how: dict[str, Any]) -> list[Example]:
    kind = kind_of(path)
    if not kind:
        raise ValueError(f"{path} is of no kind that can be read; give {KINDS_HELP}")
    path, wanted = Path(path), _wanted(how)
    if kind in _TEXTS:
        return [_read_text(path)]
    if kind == ".parquet":
        check_pyarrow(path)
        with unpacked_file(path, "Parquet") as file:
            return parse_all(path, parquet_rows(file, path, wanted), _without_nulls, kind="row", **how)
    if kind in (".csv", ".tsv"):
        rows = csv_rows(path, wanted, "\t" if kind == ".tsv" else ",")
        return parse_all(path, rows, decode_row, kind="row", **how)
    if kind == ".json" and is_array(path):
        return parse_all(path, array_rows(path), an_object, kind="object", **how)
    return parse_all(path, lines_of(path), decode_line, kind="line", **how)


def _wanted(how: Mapping[str, Any]) -> tuple[str, ...]:
    """Return which columns of a table are read."""
    return (*how["columns"].values(), "tools") if how["columns"] else KEYS


def _read_text(path: Path) -> Example:
    text = text_of(content(path, "text"), path)
    if not text.strip():
        raise ValueError(f"{path} holds no text; give a file that does")
    return Example("", text, origin=str(path))


def _without_nulls(value: Any) -> Any:
    # The columns of a table, and the fields of its structs, are the same in all rows: null says "not here".
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
