"""Ranks, alphas and targets of single layers from the command line, through every command."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from rslora_jax.cli import main
from rslora_jax.interop.adapter_folder import open_adapters

pytestmark = [pytest.mark.usefixtures("compile_fast"), pytest.mark.by_day_on("newest")]
UP = "params/layers/mlp/up_proj/kernel"


def begin(place, out, *flags):
    model, sums = str(place.folder / "model.gguf"), str(place.folder / "sums.jsonl")
    return main(
        ["train", "--model", model, "--data", sums, "--out", str(out), "--max-len", "48", "--heldout", "2", *flags]
    )


@pytest.mark.nightly
def test_a_run_trains_saves_and_hands_on_each_layers_own(place, tmp_path, capsys):
    (tmp_path / "c.toml").write_text(
        'exclude = ["*/layers_{0}/mlp/*"]\nalpha = 7\n[rank-pattern]\n"*/layers_{1}/mlp/*" = 5\n'
    )
    flags = [
        "--config",
        str(tmp_path / "c.toml"),
        "--rank",
        "3",
        "--alpha-pattern",
        "*/mlp/*=4",
        "--learning-rate",
        "0.05",
    ]
    assert begin(place, tmp_path / "run", "--steps", "2", *flags) == 0
    assert "5 (1 of 2)" in capsys.readouterr().out
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--steps", "3"]) == 0
    opened = open_adapters(tmp_path / "run")
    assert opened.config.rank_pattern == (("*/layers_{1}/mlp/*", 5),) and opened.config.alpha_pattern == (
        ("*/mlp/*", 4.0),
    )
    a, b = (np.asarray(opened.adapters[UP][name], np.float64) for name in ("a", "b"))
    assert not a[0].any() and not b[0].any() and np.abs(b[1]).max() > 1e-3

    assert main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "peft")]) == 0
    merged, factors = (
        load_file(tmp_path / name) for name in ("merged/model.safetensors", "peft/adapter_model.safetensors")
    )
    base = np.asarray(place.base.variables["params"]["layers"]["mlp"]["up_proj"]["kernel"], np.float64)
    np.testing.assert_array_equal(merged["model.layers.0.mlp.up_proj.weight"], base[0].T)
    want = (base[1] + 4 / 5**0.5 * a[1] @ b[1]).T
    np.testing.assert_allclose(merged["model.layers.1.mlp.up_proj.weight"], want, rtol=0, atol=1e-6)
    written = {name for name in factors if "mlp.up_proj" in name}
    assert {name.split("layers.")[1][0] for name in written} == {"1"} and all(
        5 in factors[name].shape for name in written
    )

    capsys.readouterr()
    for flags in ([], ["--no-base"]):
        assert main(["inspect", str(tmp_path / "run"), "--out", str(tmp_path / "seen"), "--all", *flags]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "up_proj" in line]
        assert len(lines) == 1 and "[1]" in lines[0] and " 1.789 " in lines[0]  # 4 / sqrt(5)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rank-pattern", "*/mlp/*"], "--rank-pattern */mlp/* has no number: write it as --rank-pattern '*/mlp/*=8'"),
        (["--rank-pattern", "*/mlp/*=0"], "--rank-pattern */mlp/*=0: 0 is not a whole number of at least 1"),
        (["--alpha-pattern", "*/layers_{7}/mlp/*=3"], "names layer 7 of params/layers/mlp/"),
        (["--exclude", "*/attention/*"], "exclude '*/attention/*' matches no weight: did you mean"),
    ],
)
def test_a_wrong_pattern_is_one_sentence(place, tmp_path, flags, said, capsys):
    assert begin(place, tmp_path / "run", *flags) == 2
    assert said in capsys.readouterr().err
