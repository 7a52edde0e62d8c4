"""Where a model is looked for: on this machine, or on a hub that is made up here; nothing is fetched unasked."""

from __future__ import annotations

import fnmatch
import json
import shutil
import sys
import types
from pathlib import Path

import pytest

from rslora_jax.interop.hub import fetch, is_hub_name
from rslora_jax.interop.load import folder_of, load_model

from . import folders

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]
COMMIT = "0123456789abcdef" * 2 + "01234567"
# What others keep beside the weights that are read.
OTHERS = [
    "consolidated.safetensors",
    "consolidated.00.pth",
    "pytorch_model.bin",
    "model.fp16.safetensors",
    "tf_model.h5",
    "a.gguf",
    "flax_model.msgpack",
    "rust_model.ot",
    "adapter_model.safetensors",
    "original/params.json",
    "onnx/model.onnx",
    "onnx/config.json",
    "README.md",
    "modeling.py",
]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Give the folder of a hub, with owner/whole and owner/parts in it; calls are kept in `hub.calls`."""
    root = tmp_path / "hub"
    folders.write(root / "owner" / "whole")
    folders.write(root / "owner" / "parts", shards=3)
    for model in ("whole", "parts"):
        for name in OTHERS:
            (root / "owner" / model / name).parent.mkdir(exist_ok=True)
            (root / "owner" / model / name).write_bytes(b"another format")
    calls = []

    def snapshot_download(name, *, revision=None, allow_patterns, ignore_patterns):
        calls.append((name, revision))
        if name == "owner/gated":
            raise RuntimeError("401 Client Error.\n\nAccess is restricted.")
        cache = tmp_path / "cache" / name / COMMIT
        for path in sorted((root / name).rglob("*")):
            relative = path.relative_to(root / name).as_posix()
            if not path.is_file() or any(fnmatch.fnmatch(relative, p) for p in ignore_patterns):
                continue
            if any(fnmatch.fnmatch(relative, p) for p in allow_patterns):
                cache.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, cache / relative)
        return str(cache)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    fetch.cache_clear()
    return types.SimpleNamespace(calls=calls, here=here)


@pytest.mark.parametrize("model", ["whole", "parts"])
def test_only_what_is_read_is_fetched_and_it_is_said(hub, model, capsys):
    assert load_model(f"owner/{model}").config.width == 16
    assert capsys.readouterr().err == f"owner/{model} is no folder here: asking the Hugging Face hub for it\n"
    # The weights are of the commit that the rest is of.
    assert hub.calls == [(f"owner/{model}", None), (f"owner/{model}", COMMIT)]
    found = {path.name for path in folder_of(f"owner/{model}").rglob("*")}
    assert not found & {Path(name).name for name in OTHERS} - {"config.json"}
    assert len([name for name in found if name.endswith(".safetensors")]) == (1 if model == "whole" else 3)
    assert len(hub.calls) == 2  # not asked again


def test_an_index_that_names_no_files_is_refused_when_it_is_read(hub, tmp_path):
    path = tmp_path / "hub" / "owner" / "parts" / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": 3}))
    with pytest.raises(ValueError, match="has no weight_map of tensors to files"):
        load_model("owner/parts")


def test_a_revision_is_asked_for(hub):
    load_model("owner/whole@v1.0")
    assert hub.calls == [("owner/whole", "v1.0"), ("owner/whole", COMMIT)]


# What is given, and what is there beside it.
PATHS = {
    "./owner/whole": "",
    "../owner/whole": "",
    ".owner/whole": "",
    "~/whole": "",
    "/owner/whole": "",
    "runs/2026/whole": "",
    "owner/whole/": "",
    "owner/whole": "owner",
    "whole": "",
    "https://huggingface.co/owner/whole": "",
    "owner whole": "",
    "owner/whole@": "",
}


@pytest.mark.parametrize("where", PATHS)
def test_what_looks_like_a_path_is_never_looked_for_on_the_hub(hub, where):
    if PATHS[where]:
        (hub.here / PATHS[where]).mkdir()
    assert not is_hub_name(where)
    for said in (where, Path(where)):
        with pytest.raises(
            ValueError, match=r"is no folder, no file, and no name|is no folder and no file; as owner is"
        ):
            load_model(said)
    assert not hub.calls
    with pytest.raises(ValueError, match="is no folder, no file"):
        load_model(Path("owner/other"))  # a Path is one, whatever it looks like


def test_a_mistyped_path_is_told_what_comes_close(hub, monkeypatch):
    for name in ("models/llama-7b", "models/qwen", "runs/one/merged"):
        (hub.here / name).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(hub.here))
    for said, near in {
        "models/llama-7": "models/llama-7b",
        "model/qwen": None,  # a name on the hub, by its looks
        "./model/qwen": "models/qwen",
        "runs/one/mergd": "runs/one/merged",
        "runs/on/merged": "runs/one/merged",
        "~/models/qwen": f"{hub.here}/models/qwen",
        "modles": "models",
    }.items():
        if near is None:
            assert is_hub_name(said)
            continue
        with pytest.raises(ValueError, match=rf"did you mean {near}\?$"):
            load_model(said)
    assert not hub.calls
    with pytest.raises(
        ValueError, match=r"as models is here it is taken for a path, and models/x@main for the name on"
    ):
        load_model("models/x")


def test_what_the_hub_refuses_and_what_is_not_installed_is_said(hub, monkeypatch):
    with pytest.raises(
        ValueError, match=r"owner/gated is no folder .* \(401 Client Error. Access is .*\): check the name"
    ):
        load_model("owner/gated")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"there is no folder other/name; .* run `pip install huggingface_hub`"):
        load_model("other/name")


def test_a_folder_or_a_file_goes_before_a_name_on_the_hub(hub):
    folders.write(hub.here / "owner" / "whole")
    assert load_model("owner/whole").config.width == 16
    assert folder_of("owner/whole") == Path("owner/whole")
    with pytest.raises(ValueError, match=r"is not a file: give the path of a .gguf file"):
        load_model("owner/name.gguf")
    assert not hub.calls
