"""Files of data, settings, metrics and tokens: how this library reads them, and what they hold by another reading."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rslora_jax import cli

# Data
from tests.readers.reading import once

_LINES = [
    {"prompt": "2 + 2 =", "completion": " 4", "id": 1},
    {"question": "Why?", "answer": "So."},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"text": "plain ü\u2028text"},
]


def written(name: str, data: bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / name).write_bytes(data)

    return make


JSONL = "".join(json.dumps(line) + "\n" for line in _LINES).encode()


def make_parquet(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    folder.mkdir()
    keys = ("prompt", "completion", "messages", "text")
    rows = [{key: line.get(key) for key in keys} for line in _LINES if "answer" not in line]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")


def _of_record(record: dict[str, Any]) -> tuple[Any, str]:
    if record.get("messages") is not None:
        *before, last = [(turn["role"], turn["content"]) for turn in record["messages"]]
        return before, last[1]
    if record.get("question") is not None:
        return [("user", record["question"])], record["answer"]
    return ("", record["text"]) if record.get("text") is not None else (record["prompt"], record["completion"])


def _check_records(records: list[dict[str, Any]], found: Any) -> None:
    def plain(prompt: Any) -> Any:
        return prompt if isinstance(prompt, str) else [(turn.role, turn.content) for turn in prompt]

    assert [(plain(e.prompt), e.completion) for e in found] == [_of_record(record) for record in records]


def check_jsonl(folder: Path, found: Any) -> None:
    lines = (folder / "a.jsonl").read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    _check_records([json.loads(line.decode(), object_pairs_hook=once) for line in lines if line.strip()], found)


def check_parquet(folder: Path, found: Any) -> None:
    from pyarrow import parquet

    _check_records(parquet.read_table(folder / "a.parquet").to_pylist(), found)


def check_text(folder: Path, found: Any) -> None:
    text = (folder / "a.txt").read_bytes().decode().removeprefix("\ufeff")
    assert [(one.prompt, one.completion) for one in found] == [("", text)]


def check_prompts(folder: Path, found: Any) -> None:
    lines = (folder / "p.jsonl").read_bytes().removeprefix(b"\xef\xbb\xbf").decode().split("\n")
    for line, prompt in zip([line for line in lines if line.strip()], found, strict=True):
        record = json.loads(line, object_pairs_hook=once)
        value = next(record[key] for key in ("prompt", "question", "messages") if key in record)
        asked = value[:-1] if isinstance(value, list) and value[-1]["role"] == "assistant" else value
        assert prompt.prompt == (asked if isinstance(asked, str) else tuple(asked))


TOML = b"""# settings
rank = 16
alpha = 8.0
"learning-rate" = 1e-3
targets = "all-linear"
steps = 30
optimizer = "adamw"
"""


def read_toml(folder: Path) -> Any:
    return cli.parse(["train", "--config", str(folder / "a.toml")])[1]


def check_toml(folder: Path, found: Any) -> None:
    said = tomllib.loads((folder / "a.toml").read_text(encoding="utf-8"))
    for name, value in said.items():
        assert getattr(found, name.lstrip("-").replace("-", "_")) == value, name


def make_metrics(folder: Path) -> None:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": n, "loss": 1 / n}) + "\n" for n in range(1, 5)))


def read_metrics(folder: Path) -> Any:
    from rslora_jax.train.metrics import read_metrics

    return read_metrics(folder / "metrics.jsonl", 3)


def check_metrics(folder: Path, found: Any) -> None:
    lines = (folder / "metrics.jsonl").read_bytes().split(b"\n")
    for n, record in enumerate(found):
        assert any(_loads(line) == record for line in lines[n:]), record


def _loads(line: bytes) -> Any:
    try:
        return json.loads(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None


def make_cache(folder: Path) -> None:
    folder.mkdir()
    arrays = {"ids_N": np.arange(7, dtype="i4"), "is_learnt_N": np.ones(7, bool)}
    np.savez(folder / "t.npz", **arrays, lengths_S=np.array([3, 4]), sequences_E=np.array([1, 1]))


def read_cache(folder: Path) -> Any:
    from rslora_jax.train import cache

    tokens = cache.load(folder / "t.npz", 2)
    return tokens and [(one.ids_N, one.is_learnt_N) for group in tokens.by_example() for one in group]


def check_cache(folder: Path, found: Any) -> None:
    assert found is None or [len(ids) for ids, _ in found] == [len(learnt) for _, learnt in found]
