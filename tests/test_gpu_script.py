"""scripts/gpu.sh, so that it is whole when a card comes: its command lines, and each part tiny on a CPU."""

import argparse
import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rslora_jax import cli

pytestmark = pytest.mark.by_day_on("newest")

ROOT = Path(__file__).parent.parent
PARTS = ["laws", "attention", "real", "7b", "loss", "profile", "1b", "train", "sweep"]


class Parsed(Exception):
    """The arguments are taken."""


def gpu(*words, out, timeout=60):
    environment = {**os.environ, "OUT": str(out), "PYTHON": sys.executable}
    command = ["sh", "scripts/gpu.sh", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize("mode", [[], ["--smoke"]])
def test_every_command_is_one_that_its_program_takes(monkeypatch, tmp_path, mode):
    shown = gpu("--show", *mode, out=tmp_path / "out")
    assert shown.returncode == 0 and not (tmp_path / "out").exists()
    lines = [shlex.split(line)[1:] for line in shown.stdout.splitlines()]
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # which one of the scripts changes
    parse = argparse.ArgumentParser.parse_args

    def stop(*args, **kwargs):
        parse(*args, **kwargs)
        raise Parsed

    seen = []
    for line in lines:
        seen.append(line[1] if line[0] == "-m" else line[0])
        if line[:2] == ["-m", "pytest"]:
            assert all((ROOT / word).exists() for word in line if word.startswith("tests/"))
        elif line[0] == "-m":
            assert not cli.parser().parse_known_args(line[2:])[1]
        else:
            main = importlib.import_module(Path(line[0]).stem).main
            with monkeypatch.context() as patch, pytest.raises(Parsed):
                patch.setattr(argparse.ArgumentParser, "parse_args", stop)
                patch.setattr(sys, "argv", line)
                main()
    wanted = ["attention_cost", "real_run", "benchmark", "loss_cost", "step_profile", "rank_sweep"]
    assert {*seen} == {"pytest", "rslora_jax", *(f"scripts/{name}.py" for name in wanted)}


def test_a_part_runs_alone_and_what_is_none_is_refused(tmp_path):
    """The whole way from the shell to the log, by the part that takes the least."""
    done = gpu("--smoke", "loss", out=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout
    log = (tmp_path / "log.txt").read_text()
    assert log == done.stdout and log.splitlines()[1].startswith("jax ") and "exit status 0" in log
    assert "300  chunks" in log and "== done after" in log and "failures" not in log
    refused = gpu("--smoke", "lost", out=tmp_path)
    assert refused.returncode == 2 and "lost is no part" in refused.stderr


def test_what_fails_is_said_and_the_rest_goes_on(tmp_path):
    """With a Python that ends at once there is nothing that does not fail."""
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": "false"}
    command = ["sh", "scripts/gpu.sh", "--smoke", *PARTS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert [line[3:] for line in done.stdout.splitlines() if line.startswith("== ")][:-1] == PARTS
    assert done.stdout.splitlines()[-1].endswith(f"with failures in {' '.join(PARTS)}")


def test_what_has_no_time_left_is_said(tmp_path):
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": "false", "BUDGET_S": "5"}
    command = ["sh", "scripts/gpu.sh", "loss", "sweep"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.count("-- no time is left for: false scripts/") == 2


@pytest.mark.nightly
@pytest.mark.parametrize("part", [part for part in PARTS if part != "loss"])
def test_each_part_runs_tiny(tmp_path, part):
    done = gpu("--smoke", part, out=tmp_path, timeout=1200)
    assert done.returncode == 0, done.stdout
    kept = {"real": "real.csv", "7b": "7b.csv", "1b": "1b.png", "sweep": "sweep.jsonl"}
    assert part not in kept or (tmp_path / kept[part]).stat().st_size
    assert "not measured at" not in done.stdout
