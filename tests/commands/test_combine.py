"""`rslora combine` on a tiny model in a file, against numpy in float64."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import rslora_jax as rslora
from rslora_jax.cli import main
from rslora_jax.interop.adapter_folder import attach, load_base, open_adapters
from tests.several.programs import update

from .conftest import save_run

pytestmark = [pytest.mark.usefixtures("compile_fast"), pytest.mark.by_day_on("oldest")]

GAMMAS = {"one": 7 / np.sqrt(3), "two": 5 / 3, "wide": 7 / np.sqrt(5)}


def sums(place, weights):
    """The sum of w gamma A B of some runs, by path."""
    total = {}
    for name, weight in weights.items():
        lora, adapters = place.runs[name]
        for path, site in lora.sites.items():
            total[path] = total.get(path, 0) + weight * update(site, GAMMAS[name], adapters[path])
    return total


def read(folder, model=None):
    opened = open_adapters(folder)
    lora, _, adapters, *_ = attach(opened, load_base(opened, model))
    return opened, lora, {path: update(site, site.gamma, adapters[path]) for path, site in lora.sites.items()}


def assert_sum(got, want):
    assert got.keys() == want.keys()
    for path in want:
        np.testing.assert_allclose(got[path], want[path], rtol=1e-4, atol=1e-5 * np.abs(want[path]).max())


def test_runs_become_a_run_or_a_folder_of_peft_with_the_sum_of_their_updates(place, capsys, tmp_path):
    folders = [str(place.folder / name) for name in ("one", "two", "wide")]
    want = sums(place, {"one": -0.7, "two": 0.3, "wide": 0.5})
    flags = ["--weights", "-0.7,0.3,0.5", "--method", "cat"]
    assert main(["combine", *folders, *flags, "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    of = {name: np.sqrt(sum((one**2).sum() for one in sums(place, {name: 1}).values())) for name in GAMMAS}
    whole = np.sqrt(sum((one**2).sum() for one in want.values()))
    for folder, name in zip(folders, GAMMAS, strict=True):
        assert any(folder in line and line.split()[-1] == f"{of[name]:.3g}" for line in said.splitlines()), said
    assert f"‖ΣwγAB‖ {whole:.3g}" in said and "wrote " in said
    opened, _, got = read(tmp_path / "run")
    assert_sum(got, want)
    assert opened.settings["weights"] == [-0.7, 0.3, 0.5] and opened.base == open_adapters(folders[0]).base
    assert (
        main(["combine", *folders, *flags, "--to", "peft", "--base-model", "me/it", "--out", str(tmp_path / "p")]) == 0
    )
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["use_rslora"]) == ("me/it", False)
    assert_sum(read(tmp_path / "p", place.folder / "model.gguf")[2], want)


def test_a_folder_of_peft_is_combined_as_the_run_that_it_was_exported_from(place, tmp_path, capsys):
    run, other = (str(place.folder / name) for name in ("one", "wide"))
    assert main(["export", run, "--out", str(tmp_path / "peft")]) == 0
    found = []
    for n, first in enumerate((run, str(tmp_path / "peft"))):
        flags = ["--method", "ties_svd", "--density", "0.5", "--out", str(tmp_path / str(n))]
        assert main(["combine", first, other, *flags]) == 0
        found.append(read(tmp_path / str(n))[2])
    assert_sum(found[1], found[0])
    assert "differs by" in capsys.readouterr().out


def test_what_a_run_trains_whole_moves_by_its_weight_and_goes_to_peft(place, capsys, tmp_path):
    model, scale = str(place.folder / "model.gguf"), "params/norm/scale"
    config = rslora.LoraConfig(rank=2, alpha=7, trained=scale)
    _, adapters = save_run(tmp_path / "whole", place.base, config, 3, {"model": model})
    folders = [str(tmp_path / "whole"), str(place.folder / "one")]
    flags = ["--weights", "0.5,2", "--method", "cat", "--to", "peft", "--out", str(tmp_path / "peft")]
    assert main(["combine", *folders, *flags]) == 0
    assert f"trained whole or by rows: 1, first {scale}" in capsys.readouterr().out
    opened = open_adapters(tmp_path / "peft")
    found = attach(opened, load_base(opened, model))
    base = np.asarray(place.base.variables["params"]["norm"]["scale"])
    want = base + 0.5 * (adapters[scale]["value"] - base)
    np.testing.assert_allclose(found.adapters[scale]["value"], want, rtol=1e-6)


def test_svd_of_a_rank_has_that_rank_and_the_default_is_an_equal_share(place, tmp_path):
    folders = [str(place.folder / name) for name in ("one", "two")]
    assert main(["combine", *folders, "--rank", "6", "--out", str(tmp_path / "run")]) == 0
    _, lora, got = read(tmp_path / "run")
    assert {site.rank for site in lora.sites.values()} == {6}
    assert_sum(got, sums(place, {"one": 0.5, "two": 0.5}))
    assert main(["generate", str(tmp_path / "run"), "--prompt", "hi", "--max-new", "3"]) == 0


REFUSED = {
    "--weights has 1 numbers for 2 folders": ["--weights", "1"],
    "argument --weights: 1,x are not numbers": ["--weights", "1,x"],
    "--method ties prunes: say with --density": ["--method", "ties"],
    "--method cat prunes nothing: leave out --density": ["--method", "cat", "--density", "0.5"],
    "--method linear has a rank of its own": ["--method", "linear", "--rank", "3"],
    "argument --method: invalid choice: 'tise'": ["--method", "tise"],
    "'magnitude_prune_svd'); did you mean ties?": ["--method", "tise"],
    "argument --density: 0 is not a number above 0": ["--density", "0"],
    "give --to peft too": ["--base-model", "me/it"],
    "is not empty: give another folder": ["--out", "FULL"],
    "no checkpoint of step 7": ["--step", "7"],
}


@pytest.mark.parametrize("said", list(REFUSED))
def test_bad_flags_are_one_sentence(said, place, tmp_path, capsys):
    flags = [str(place.folder) if flag == "FULL" else flag for flag in REFUSED[said]]
    folders = [str(place.folder / name) for name in ("one", "two")]
    assert main(["combine", *folders, "--out", str(tmp_path / "out"), *flags]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_adapters_of_other_bases_are_refused(place, tmp_path, capsys):
    lora, _ = place.runs["one"]
    model = str(place.folder / "model.gguf")
    moved = jax.tree.map(lambda leaf: leaf, place.base.variables)
    moved["params"]["norm"] = {"scale": 1 + moved["params"]["norm"]["scale"]}
    save_run(tmp_path / "moved", dataclasses.replace(place.base, variables=moved), lora.config, 0, {"model": model})
    one = str(place.folder / "one")
    out = ["--out", str(tmp_path / "out")]
    assert main(["combine", one, str(tmp_path / "moved"), *out]) == 2
    assert "is of another base than" in capsys.readouterr().err
    for n, name in enumerate(("me/it", "me/it@1", "you/it")):
        assert main(["export", one, "--base-model", name, "--out", str(tmp_path / str(n))]) == 0
    assert main(["combine", *(str(tmp_path / n) for n in "02"), "--model", model, *out]) == 2
    assert "(you/it, and me/it): take adapters of one" in capsys.readouterr().err
    assert main(["combine", *(str(tmp_path / n) for n in "01"), "--model", model, *out]) == 0
