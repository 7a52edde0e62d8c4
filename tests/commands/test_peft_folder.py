"""A folder that PEFT would load is as good to every command as the run it was exported from."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rslora_jax.cli import main
from rslora_jax.interop.adapter_folder import attach, load_base, open_adapters
from rslora_jax.train import samples

pytestmark = [pytest.mark.usefixtures("compile_fast"), pytest.mark.by_day_on("newest")]


@pytest.fixture(scope="module")
def exported(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "peft"
    assert main(["export", str(place.folder / "one"), "--out", str(out)]) == 0
    return out


def test_every_command_takes_it(place, exported, capsys, tmp_path):
    run, model = str(place.folder / "one"), ["--model", str(place.folder / "model.gguf")]

    def both(command, *flags):
        said = []
        for folder, more in ((run, []), (str(exported), model)):
            assert main([command, folder, *more, *flags]) == 0
            said.append(capsys.readouterr().out)
        return said

    ours, theirs = both("generate", "--prompt", "hi 1+1=", "--max-new", "9")
    assert ours == theirs and ours.strip()
    scores = tmp_path / "scores.json"
    flags = ["--data", str(place.folder / "sums.jsonl"), "--max-len", "48", "--json", str(scores)]
    assert main(["eval", run, str(exported), *model, *flags]) == 0
    base, one, other = json.loads(scores.read_text())["models"]
    assert one["loss"] == other["loss"] != base["loss"] and (one["step"], other["step"]) == (5, None)
    for folder, more, out in ((run, [], "a"), (str(exported), model, "b")):
        assert main(["merge", folder, *more, "--out", str(tmp_path / out), "--dtype", "float32"]) == 0
        assert main(["inspect", folder, *more, "--out", str(tmp_path / out / "seen")]) == 0
    for file in ("model.safetensors", "config.json", "tokenizer.json", "seen/spectrum.csv"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    assert main(["export", str(exported), *model, "--out", str(tmp_path / "again")]) == 0
    again, before = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "again", exported))
    assert again.keys() == before.keys() and all((again[name] == before[name]).all() for name in before)


def test_weights_that_it_trains_whole_are_used_and_exported(place, exported, tmp_path):
    folder, model = tmp_path / "saved", str(place.folder / "model.gguf")
    folder.mkdir()
    config = json.loads((exported / "adapter_config.json").read_text()) | {"modules_to_save": ["model.norm"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(exported / "adapter_model.safetensors")
    norm = 1 + np.asarray(place.base.variables["params"]["norm"]["scale"])
    save_file(tensors | {"base_model.model.model.norm.weight": norm}, folder / "adapter_model.safetensors")
    opened = open_adapters(folder)
    found = attach(opened, load_base(opened, model))
    assert found.lora.config.trained == ("params/norm/scale",) and not found.replaced
    assert (found.adapters["params/norm/scale"]["value"] == norm).all()
    assert main(["export", str(folder), "--model", model, "--out", str(tmp_path / "again")]) == 0
    assert (
        load_file(tmp_path / "again" / "adapter_model.safetensors")["base_model.model.model.norm.weight"] == norm
    ).all()


def test_what_a_peft_folder_cannot_tell_is_asked_for(exported, capsys):
    for arguments, said in (
        (["inspect", exported], "is read beside its base: say with --model where that is"),
        (["generate", exported, "--prompt", "hi"], "does not tell on which model it was trained: say so with --model"),
        (["merge", exported, "--step", "3", "--out", os.devnull + "-"], "holds one state of adapters and no steps"),
    ):
        assert main([*map(str, arguments)]) == 2
        assert said in capsys.readouterr().err


def test_training_goes_on_from_it_and_is_resumed_without_it(place, exported, capsys, tmp_path, monkeypatch):
    model, sums = str(place.folder / "model.gguf"), str(place.folder / "sums.jsonl")
    start, out = tmp_path / "start", tmp_path / "out"
    shutil.copytree(exported, start)
    train = ["train", "--model", model, "--data", sums, "--max-len", "48", "--adapters", str(start), "--out", str(out)]
    assert main([*train, "--rank", "7"]) == 2
    assert "--rank 7 is for new adapters, and --adapters has its own: leave it out" in capsys.readouterr().err
    bases, write = [], samples.write
    monkeypatch.setattr(
        samples, "write", lambda apply, of, *args, **more: (bases.append(of), write(apply, of, *args, **more))[1]
    )
    assert main([*train, "--steps", "3", "--heldout", "4", "--learning-rate", "0.01"]) == 0
    # The answers after are those of the base itself and the adapters, not of a second base with these in it.
    before, (after, adapters) = bases
    assert all(one is other for one, other in zip(*map(jax.tree.leaves, (before, after)), strict=True)) and adapters
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    first, last = (next(r["heldout_loss"] for r in records if r["step"] == n and "heldout_loss" in r) for n in (0, 3))
    scores = tmp_path / "scores.json"
    flags = ["--model", model, "--data", sums, "--max-len", "48", "--heldout", "4", "--json", str(scores)]
    assert main(["eval", str(exported), str(out), *flags]) == 0
    _, there, now = json.loads(scores.read_text())["models"]
    assert first == pytest.approx(there["loss"], rel=1e-5) and last == pytest.approx(now["loss"], rel=1e-5)
    assert first != pytest.approx(last, rel=1e-3)
    config = open_adapters(out).config
    assert (config.rank, config.alpha, config.scaling) == (3, 7, "rslora")

    shutil.rmtree(start)
    assert main(["train", "--resume", "--out", str(out), "--steps", "5"]) == 0
    assert open_adapters(out).source.name == "5"


def test_an_imported_run_is_started_from_and_not_resumed(place, exported, capsys, tmp_path):
    model, sums = str(place.folder / "model.gguf"), str(place.folder / "sums.jsonl")
    run = str(tmp_path / "run")
    assert main(["import", str(exported), "--model", model, "--out", run]) == 0
    assert main(["train", "--resume", "--out", run]) == 2
    assert f"start from it in another folder, with rslora train --adapters {run}" in capsys.readouterr().err
    flags = ["--model", model, "--data", sums, "--max-len", "48", "--steps", "1", "--out", str(tmp_path / "next")]
    assert main(["train", "--adapters", run, *flags]) == 0
