"""`rslora train --start`: a run of the original base, which resumes to the last bit and is opened as any other."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rslora_jax as rslora
from rslora_jax.cli import main
from rslora_jax.commands.runs import load_runs
from rslora_jax.interop.load import load_model
from rslora_jax.sites import from_paths, named_leaves
from rslora_jax.store import checkpoint, checksums, load_adapters, load_start
from tests.commands.conftest import SUMS
from tests.reference import assert_near

pytestmark = [pytest.mark.by_day_on("oldest"), pytest.mark.usefixtures("compile_fast")]
FLAGS = [
    "--rank",
    "2",
    "--alpha",
    "7",
    "--max-len",
    "48",
    "--heldout",
    "2",
    "--save-every",
    "1",
    "--learning-rate",
    "0.01",
]


@pytest.fixture(scope="module")
def command(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("starts")
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SUMS[:20]))
    return ["train", "--model", str(place.folder / "model.gguf"), "--data", str(folder / "mine.jsonl"), *FLAGS]


def arrays(folder):
    """Give the adapters as they are in the last checkpoint, and the training state."""
    where = checkpoint.find(folder, "last")
    about = checkpoint.read_about(where)
    return {name: word for name, word in about["checksums"].items() if name.startswith(("adapters", "training"))}


def merged_by_hand(base, config, lora, trained, start):
    """Give W + gamma (A B - A0 B0) in float64."""
    leaves = named_leaves(base)
    for path, site in lora.sites.items():

        def product(of, site=site):
            stack = site.sizes(site.stack_axes)
            a = np.asarray(of["a"], np.float64).reshape(*stack, site.in_size, site.rank)
            return a @ np.asarray(of["b"], np.float64).reshape(*stack, site.rank, site.out_size)

        change = 7 / np.sqrt(2) * (product(trained[path]) - product(start[path]))
        order = (*site.stack_axes, *site.in_axes, *site.out_axes)
        change = np.transpose(change.reshape(site.sizes(order)), np.argsort(order))
        leaves[path] = jnp.asarray(np.asarray(leaves[path], np.float64) + change, jnp.float32)
    return from_paths(base, leaves)


@pytest.mark.parametrize(
    "name", ["pissa:4", *(pytest.param(n, marks=pytest.mark.nightly) for n in ("olora", "lora-ga"))]
)
def test_a_run_from_a_start_is_one_of_the_original_base(command, name, tmp_path, capsys, place):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*command, "--start", name, "--steps", "2", "--schedule", "constant", "--out", str(whole)]) == 0
    assert main([*command, "--start", name, "--steps", "1", "--schedule", "constant", "--out", str(cut)]) == 0
    assert main(["train", "--resume", "--out", str(cut), "--steps", "2"]) == 0
    assert arrays(cut) == arrays(whole)

    base = load_model(place.folder / "model.gguf")
    start = load_start(whole)
    assert start.name == name and start.base == checksums(base.variables)
    config, joined = load_adapters(whole, params=base.variables)
    assert config.rank == 4 and config.alpha == pytest.approx(7 * 2**0.5)
    plain = rslora.LoraConfig(rank=2, alpha=7)
    tokens = jax.ShapeDtypeStruct((1, 8), "int32")
    lora = rslora.wrap(base.apply, base.variables, tokens, config=plain)
    trained = {p: {"a": of["a"][..., :2], "b": np.split(of["b"], 2, 1)[0]} for p, of in joined.items()}
    want = merged_by_hand(base.variables, plain, lora, trained, start.adapters)

    (run,) = load_runs([str(whole)]).runs
    assert_near(run.lora.merge(run.variables, run.adapters), want, 1e-5)
    capsys.readouterr()
    assert main(["inspect", str(whole), "--no-base", "--out", str(tmp_path)]) == 0
    assert f"started as {name}, as adapters of the original base" in capsys.readouterr().out
    other = "olora" if name != "olora" else "pissa"
    assert main(["train", "--resume", "--out", str(cut), "--steps", "4", "--start", other]) == 2
    assert f"--start {other} here, {name} was saved: leave it out" in capsys.readouterr().err
    (whole / "start" / "about" / "metadata").unlink()
    assert main(["inspect", str(whole), "--no-base"]) == 2
    assert "start/about is damaged" in capsys.readouterr().err


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["eva:2", "orthogonal"])
def test_a_start_that_leaves_the_base_needs_nothing_of_it_later(command, name, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*command, "--start", name, "--steps", "3", "--schedule", "constant", "--out", str(whole)]) == 0
    assert main([*command, "--start", name, "--steps", "2", "--schedule", "constant", "--out", str(cut)]) == 0
    assert f"starting the adapters as {name}" in capsys.readouterr().out
    assert main(["train", "--resume", "--out", str(cut), "--steps", "3"]) == 0
    assert f"starting the adapters as {name}" not in capsys.readouterr().out
    assert arrays(cut) == arrays(whole) and not (whole / "start").exists()
    config = load_adapters(whole)[0]
    assert config.rank == 2 and bool(config.rank_pattern) == (name == "eva:2")


def test_a_start_is_for_new_adapters(command, place, tmp_path, capsys):
    given = ["--adapters", str(place.folder / "one"), "--start", "olora", "--out", str(tmp_path / "run")]
    assert main([*command[:5], *given]) == 2
    assert "--start olora is for new adapters, and --adapters has its own" in capsys.readouterr().err
    assert main([*command[:5], "--start", "pisa", "--out", str(tmp_path / "run")]) == 2
    assert "start 'pisa' is not known: did you mean pissa?" in capsys.readouterr().err


@pytest.mark.nightly
@pytest.mark.parametrize("format", ["nf4", "int8", "float8"])
def test_loftq_is_a_start_over_the_base_that_quantize_makes_of_the_files(command, format, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    start = [*command, "--start", "loftq", "--quantize", format, "--schedule", "constant"]
    assert main([*start, "--steps", "2", "--out", str(whole)]) == 0
    assert main([*start, "--steps", "1", "--out", str(cut)]) == 0
    assert main(["train", "--resume", "--out", str(cut), "--steps", "2"]) == 0
    assert arrays(cut) == arrays(whole) and not (whole / "start").exists()
    (run,) = load_runs([str(whole)]).runs
    read = load_model(command[2], quantize=format).variables
    assert checksums(run.variables) == checksums(read)
    capsys.readouterr()
    for more, says in {
        (
            "--start",
            "loftq",
        ): "--start loftq makes up for what --quantize loses: give --quantize nf4, int8 or float8 too",
        ("--start", "loftq:3", "--quantize", "nf4"): "--start loftq:3: after more turns than one the base is not what",
        ("--start", "loftq:x"): "'x' is no option of loftq",
    }.items():
        assert main([*command, *more, "--out", str(tmp_path / "no")]) == 2
        assert says in capsys.readouterr().err
