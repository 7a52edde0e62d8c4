"""The benchmark, end to end at a tiny size, and that what it compares is the same."""

import csv
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.nightly  # four compilers' work

SCRIPTS = Path(__file__).parent.parent / "scripts"
# torch takes long to import; PEFT is compared apart, with the other references.
NAMES = ("floor", "full", "rslora", "qwix", "factored")


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmarks import measure, methods, problem

    from rslora_jax.models.decoder import DecoderConfig

    config = DecoderConfig(vocab_size=1, width=32, mlp_width=88, num_layers=1, num_heads=2, num_kv_heads=2)
    return measure, methods, problem, problem.Problem(config, tokens=24, length=12, rank=24, alpha=10.0)


SMALL = ["--width", "32", "--layers", "1", "--heads", "2", "--tokens", "24", "--length", "12"]


def installed(methods):
    return [name for name in NAMES if not methods.missing(name)]


def test_the_script_writes_a_csv_and_a_picture(tmp_path, parts):
    _, methods, _, _ = parts
    names = installed(methods)
    sizes = [*SMALL, "--ranks", "3,24,48", "--repeats", "1"]
    command = [sys.executable, str(SCRIPTS / "benchmark.py"), *sizes, "--methods", ",".join(names)]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "benchmark.csv").open() as file:
        rows = list(csv.DictReader(file))
    # 48 is above the width.
    assert [(r["rank"], r["method"]) for r in rows] == [(rank, name) for rank in ("3", "24") for name in names]
    for row in rows:
        assert float(row["step_s"]) > 0 and float(row["to_floor"]) > 0 and int(row["temp_bytes"]) > 0
        assert float(row["flops"]) > 0 and row["jax"] == jax.__version__ and row["dtype"] == "float32"
        # Nothing can need less than the least.
        assert float(row["flops"]) >= 0.995 * float(row["least_flops"])
        if row["method"] in methods.ADAPTED:
            assert float(row["disagreement"]) < 2e-4
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert f"| {' | '.join(names)} |" in (tmp_path / "benchmark.md").read_text()


def test_every_method_gives_the_gradients_of_the_merged_weights(parts):
    """dA and dB by the chain rule in float64, from the gradient at weights merged by numpy."""
    measure, methods, problem, p = parts
    data = problem.make_data(p)
    gamma = 10.0 / np.sqrt(24)

    def factor(path, name):
        return np.asarray(data.adapters[path][name], np.float64)

    def name_of(path):
        return jax.tree_util.keystr(path, simple=True, separator="/")

    def add(path, w):
        return merge(name_of(path), w, p.kernels, factor, gamma)

    merged = jax.tree_util.tree_map_with_path(add, data.variables)
    want_loss, (dw, _) = methods.jitted("full", p)(data.adapters, merged, data.x, data.target)
    by_path = {name_of(k): g for k, g in jax.tree.leaves_with_path(dw)}
    want = {}
    for path in p.kernels:
        g = np.asarray(by_path[path], np.float64)
        want[path] = {"a": gamma * g @ factor(path, "b").T, "b": gamma * factor(path, "a").T @ g}
    for name in installed(methods):
        if name in methods.ADAPTED:
            loss, (got, _) = methods.jitted(name, p)(*data.arguments)
            assert measure.disagreement((loss, got), (want_loss, want)) < 1e-4, name


def merge(path, w, kernels, factor, gamma):
    if path not in kernels:
        return w
    total = np.asarray(w, np.float64) + gamma * factor(path, "a") @ factor(path, "b")
    return jax.numpy.asarray(total, w.dtype)


@pytest.mark.parametrize("wrong", ["scale", "nan"])
def test_methods_that_differ_are_not_timed(parts, wrong):
    measure, _, _, _ = parts
    gradients = {"w": {"a": np.ones(3)}}
    bad = {"scale": (2.0, {"w": {"a": np.full(3, 1.01)}}), "nan": (2.0, {"w": {"a": np.full(3, np.nan)}})}[wrong]
    ready = {
        name: measure.Ready(lambda: None, lambda _: None, lambda _, out=out: out)
        for name, out in {"factored": (2.0, gradients), "rslora": bad}.items()
    }
    found, refused = measure.check(ready, "float32")
    assert list(refused) == ["rslora"] and "rslora and factored" in refused["rslora"] and found["factored"] == 0


def test_a_method_that_fails_is_a_row_that_says_why(parts, monkeypatch, tmp_path):
    import benchmark

    measure, *_ = parts

    def prepare(name, *rest):
        if name == "factored":
            raise RuntimeError("no room\nfor it")
        return measure.prepare(name, *rest)

    monkeypatch.setattr(benchmark, "prepare", prepare)
    sizes = [*SMALL, "--ranks", "3", "--repeats", "2"]
    benchmark.main([*sizes, "--methods", "floor,factored,rslora", "--out", str(tmp_path)])
    with (tmp_path / "benchmark.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert rows["factored"]["why"] == "RuntimeError: no room" and rows["factored"]["step_s"] == ""
    assert float(rows["floor"]["step_s"]) > 0 and float(rows["rslora"]["step_s"]) > 0
    assert "Not measured at 24 tokens, rank 3: factored" in (tmp_path / "benchmark.md").read_text()
