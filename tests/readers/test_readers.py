"""Any bytes whatever, given to any reader, are read right or refused in one sentence, in bounded time and memory."""

from __future__ import annotations

import collections
import json
import os
import time
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rslora_jax import cli
from rslora_jax.interop import load_model
from tests.readers import files, worker
from tests.readers.kinds import KINDS

pytestmark = pytest.mark.by_day_on("newest")

# DAMAGED_FILES=7 draws other damages, such as those that failed; KEEP=folder keeps the files of what breaks the law,
# and `python -m tests.readers.worker 7 123 1` does case 123 alone.
SEED = os.environ.get("DAMAGED_FILES", "0")


@pytest.mark.parametrize("count", [10 * len(KINDS), pytest.param(5000, marks=pytest.mark.nightly)])
def test_damaged_files_are_read_right_or_refused(count):
    counted, breaches = collections.defaultdict(collections.Counter), []
    for case in worker.run(SEED, 0, count):
        counted[case["kind"]][case["outcome"]] += 1
        if case["outcome"] == "BREACH":
            breaches.append(f"DAMAGED_FILES={SEED} {json.dumps(case, indent=1)}")
    for kind, outcomes in counted.items():
        print(f"{kind}: {', '.join(f'{n} {outcome}' for outcome, n in sorted(outcomes.items()))}")
    assert not breaches, f"{len(breaches)} of {count}: " + "\n".join(breaches[:5])
    assert sum(n for outcomes in counted.values() for n in outcomes.values()) == count + len(KINDS)
    # Each reads its whole file, and refuses what is damaged; most damages leave a chat template that is one.
    lenient = ("metrics", "token cache", *(["chat template"] if count < 1000 else []))
    for kind in KINDS:
        assert counted[kind.name]["right"] and (counted[kind.name]["refused"] or kind.name in lenient)


@pytest.mark.parametrize(
    ("error", "wrong"),
    [
        (ValueError("/a/b.json is damaged"), ""),
        (FileNotFoundError(2, "no such file", "/a/b.json"), ""),
        (KeyError("/a"), "KeyError is raised"),
        (ValueError("it is damaged"), "names no file"),
        (ValueError("/a/b.json \x1b[2J"), "not printable"),
        (ValueError("/a/" + "b" * 300), "303 characters"),
    ],
)
def test_what_breaks_the_law_is_seen(error, wrong):
    found = worker.wrong_with(error, "/a")
    assert wrong in found and bool(found) == bool(wrong)


# Examples: of each damage that was read as something else, or never came to an end.

MILLION = 1_000_000


def refused(capsys, *arguments):
    """Run the command, which is to refuse at once in one sentence; return that."""
    began = time.perf_counter()
    assert cli.main([*map(str, arguments)]) == 2
    said = capsys.readouterr().err.removeprefix("reading the model\n")
    assert time.perf_counter() - began < 5
    assert said.startswith("rslora: error: ") and said.count("\n") == 1 and len(said) < 320
    return said


CONFIGS = {
    "a million layers": {"num_hidden_layers": MILLION},
    "a thousand layers": {"num_hidden_layers": 1000},
    "wide": {"hidden_size": 2**31 - 8},
    "long": {"vocab_size": 2**31 - 1},
    "400 digits": {"num_hidden_layers": 10**399},
    "layers of objects": {"layer_types": [{}, []]},
    "infinite": {"rms_norm_eps": float("inf")},
    "no number": {"rms_norm_eps": float("nan")},
    "zero": {"rms_norm_eps": 0},
    "negative": {"hidden_size": -8},
    "long text": {"hidden_act": "x" * 100_000},
    "deep": {"hidden_act": json.loads("[" * 500 + "]" * 500)},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_figures_that_no_weight_bears_out_are_refused_at_once(case, tmp_path, capsys):
    files.model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(files.MODEL | CONFIGS[case]))
    said = refused(capsys, "generate", "--model", tmp_path, "--prompt", "hi")
    assert str(tmp_path) in said


@pytest.mark.parametrize(("name", "count"), [("llama.block_count", MILLION), ("llama.block_count", 999)])
@pytest.mark.parametrize("scan", [True, False])
def test_layers_that_a_gguf_file_lacks_are_refused_at_once(name, count, scan, tmp_path):
    entries, tensors = files.gguf_parts()
    changed = [[own, kind, count if own == name else value] for own, kind, value in entries]
    (tmp_path / "a.gguf").write_bytes(files.gguf(changed, tensors))
    began = time.perf_counter()
    with pytest.raises(ValueError, match=r"a\.gguf"):
        load_model(tmp_path / "a.gguf", scan_layers=scan)
    assert time.perf_counter() - began < 5


def test_numbers_that_are_not_finite_are_told_of_a_model_and_refused_of_an_adapter(tmp_path):
    files.model(tmp_path / "model")
    files.adapter(tmp_path / "adapter")
    path, name = tmp_path / "model" / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    for dtype in (np.float32, np.float16):
        weights = {key: value.astype(dtype) for key, value in load_file(path).items()}
        save_file(weights, path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_model(tmp_path / "model")
        for number in (np.nan, -np.inf):
            broken = {key: value.copy() for key, value in weights.items()}
            broken[name][3, 2] = number
            save_file(broken, path)
            with pytest.warns(UserWarning, match=f"model.safetensors: tensor {name} holds numbers that are not finite"):
                load_model(tmp_path / "model")
        save_file(weights, path)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    factors = load_file(path)
    first = min(factors)
    factors[first][0, 0] = np.nan
    save_file(factors, path)
    kind = next(kind for kind in KINDS if kind.name == "adapter weights")
    with pytest.raises(ValueError, match=f"adapter_model.safetensors: {first} holds numbers that are not finite"):
        kind.read(tmp_path / "adapter")


@pytest.mark.parametrize("of", ["null", "{}", "[]", '{"a": 1}', '"x"', "0"])
@pytest.mark.parametrize("size", [1 << 20, pytest.param(1 << 28, marks=pytest.mark.nightly)])
def test_much_json_takes_bounded_time_and_memory(of, size, tmp_path):
    """In the worker's process, whose memory is counted."""
    from rslora_jax.interop.safetensors import open_file

    text = b'{"a": [' + b",".join([of.encode()] * (size // (len(of) + 1))) + b"]}"
    (tmp_path / "config.json").write_bytes(text)
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    began = time.perf_counter()
    with pytest.raises(ValueError, match=r"bytes|model_type"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match=r"header|lacks"):
        open_file(tmp_path / "a.safetensors")
    assert time.perf_counter() - began < 10
