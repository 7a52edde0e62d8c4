"""A key that is there twice is refused in every file, by its name and the file's; files are read once."""

from __future__ import annotations

import json
import shutil

import pytest

from rslora_jax.cli import main
from rslora_jax.interop import load_model, load_peft, read_config, save_peft
from rslora_jax.interop.json_files import read_json
from rslora_jax.interop.peft import files

from . import folders
from .peft.folders import CONFIG, llama, random_adapters, shapes_of, wrapped

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]

# The file, and a key that it is given twice, the second time with another value.
MODEL_FILES = {
    "config.json": "vocab_size",
    "tokenizer_config.json": "eos_token",
    "special_tokens_map.json": "bos_token",
    "generation_config.json": "eos_token_id",
    "model.safetensors.index.json": "weight_map",
    "model-00001-of-00002.safetensors": "model.embed_tokens.weight",
}


def double(path, key):
    """Put a key into a JSON file's object again, or into that of a safetensors file's header."""
    again = json.dumps({key: 7})[1:-1].encode()
    data = path.read_bytes() if path.exists() else b'{"bos_token": "<s>", "eos_token_id": 1}'
    if path.suffix == ".safetensors":
        length = int.from_bytes(data[:8], "little")
        text = data[8 : 8 + length].rstrip()[:-1] + b"," + again + b"}"
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    else:
        path.write_bytes(data.rstrip()[:-1] + b"," + again + b"}")


@pytest.mark.parametrize("file", MODEL_FILES)
def test_a_doubled_key_of_a_models_file_is_named(file, tmp_path):
    folders.write(tmp_path, shards=2)
    load_model(tmp_path)
    double(tmp_path / file, MODEL_FILES[file])
    with pytest.raises(ValueError) as caught:
        load_model(tmp_path)
    said = f'{tmp_path / file} is damaged: its JSON cannot be read ("{MODEL_FILES[file]}" is there twice)'
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("adapter_config.json", "r"),
        ("adapter_model.safetensors", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
    ],
)
def test_a_doubled_key_of_an_adapters_file_is_named(file, key, tmp_path):
    lora = wrapped(llama(), CONFIG)
    save_peft(tmp_path / "a", lora, random_adapters(lora))
    double(tmp_path / "a" / file, key)
    with pytest.raises(ValueError, match="is there twice") as caught:
        load_peft(tmp_path / "a", lora)
    assert str(tmp_path / "a" / file) in str(caught.value) and json.dumps(key)[:80] in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"[]", b"3", b"{", b"\xff\xfe", b'{"a": ' * 5000, b"[" * 200_000])
def test_what_is_no_object_is_refused_with_the_file(text, tmp_path):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"a\.json is damaged: its JSON cannot be read \("):
        read_json(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"b\.json cannot be read: no such file"):
        read_json(tmp_path / "b.json")


def test_import_reads_each_file_once(tiny, tmp_path, monkeypatch):
    model = load_model(tiny.write(tmp_path / "tiny.gguf"))
    lora = wrapped(model.module, CONFIG)
    save_peft(tmp_path / "peft", lora, random_adapters(lora))
    for pattern in ("all-linear", CONFIG.targets):  # the first is resolved by the names of the tensors
        config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
        targets = pattern if pattern == "all-linear" else config["target_modules"]
        whole = shutil.copytree(tmp_path / "peft", tmp_path / f"peft-{len(pattern)}")
        (whole / "adapter_config.json").write_text(json.dumps(config | {"target_modules": targets}))
        read = []

        def noted(function, read=read):
            return lambda path, *args: read.append(path.name) or function(path, *args)

        with monkeypatch.context() as patch:
            patch.setattr(files, "read_json", noted(files.read_json))
            patch.setattr(files, "open_file", noted(files.open_file))
            out = str(tmp_path / f"run-{len(pattern)}")
            assert main(["import", str(whole), "--model", str(tmp_path / "tiny.gguf"), "--out", out]) == 0
        assert sorted(read) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_config_is_read_without_the_weights_beside_it(tmp_path):
    lora = wrapped(llama(), CONFIG)
    save_peft(tmp_path / "a", lora, random_adapters(lora))
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    assert read_config(tmp_path / "a", shapes_of(llama())).rank == 5
