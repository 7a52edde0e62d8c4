"""`rslora train --trained`: what is trained whole goes with the run through every command."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from rslora_jax.cli import main
from rslora_jax.interop.adapter_folder import open_adapters
from rslora_jax.sites import named_leaves

pytestmark = [pytest.mark.usefixtures("compile_fast"), pytest.mark.nightly]
NORMS = ("params/layers/attn_norm/scale", "params/norm/scale")


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    model, sums = str(place.folder / "model.gguf"), str(place.folder / "sums.jsonl")
    (folder / "c.toml").write_text('trained = ["*/attn_norm/scale", "params/norm/scale"]\nalpha = 7\n')
    flags = ["--config", str(folder / "c.toml"), "--rank", "3", "--max-len", "48", "--heldout", "2"]
    out = str(folder / "run")
    assert (
        main(
            ["train", "--model", model, "--data", sums, "--out", out, "--steps", "2", "--learning-rate", "0.05", *flags]
        )
        == 0
    )
    assert main(["train", "--resume", "--out", out, "--steps", "4"]) == 0
    return folder / "run"


def test_a_run_saves_them_and_goes_on_with_them(run, place, capsys):
    opened, base = open_adapters(run), named_leaves(place.base.variables)
    assert opened.config.trained == ("*/attn_norm/scale", "params/norm/scale")
    assert all(np.abs(opened.adapters[path]["value"] - base[path]).max() > 1e-3 for path in NORMS)
    assert main(["train", "--resume", "--out", str(run), "--steps", "6", "--trained", "*/scale"]) == 2
    said = "*/scale here, */attn_norm/scale params/norm/scale was saved: leave it out"
    assert said in capsys.readouterr().err


def test_every_command_goes_by_them(run, place, capsys, tmp_path):
    asked = ["generate", str(run), "--prompt", "hi 1+1=", "--max-new", "9"]
    said = []
    for flags in ([], ["--merged"]):
        assert main([*asked, *flags]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    scores = tmp_path / "scores.json"
    assert main(["eval", str(run), "--json", str(scores)]) == 0
    base, ours = json.loads(scores.read_text())["models"]
    assert (
        main(
            [
                "eval",
                "--model",
                str(place.folder / "model.gguf"),
                "--data",
                str(place.folder / "sums.jsonl"),
                "--heldout",
                "2",
                "--max-len",
                "48",
                "--json",
                str(scores),
            ]
        )
        == 0
    )
    (alone,) = json.loads(scores.read_text())["models"]
    assert base["loss"] == pytest.approx(alone["loss"], rel=1e-6) and abs(ours["loss"] - base["loss"]) > 1e-3
    assert main(["merge", str(run), "--out", str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    merged, adapters = load_file(tmp_path / "merged" / "model.safetensors"), open_adapters(run).adapters
    np.testing.assert_array_equal(merged["model.norm.weight"], adapters[NORMS[1]]["value"])
    for layer, value in enumerate(adapters[NORMS[0]]["value"]):
        np.testing.assert_array_equal(merged[f"model.layers.{layer}.input_layernorm.weight"], value)
    capsys.readouterr()
    for flags in ([], ["--no-base"]):
        assert main(["inspect", str(run), "--out", str(tmp_path / "seen"), *flags]) == 0
        assert f"trained whole or by rows, and so without a spectrum: {', '.join(NORMS)}" in capsys.readouterr().out
