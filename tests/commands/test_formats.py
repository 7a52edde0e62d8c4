"""Bases in 4 and 8 bits at the terminal: what cannot be is one sentence, and what was there is there afterwards."""

import hashlib
import json
import shutil

import jax
import numpy as np
import pytest

import rslora_jax as rslora
from rslora_jax import cli
from rslora_jax.commands.settings import settings_to_save
from rslora_jax.interop import load_model
from rslora_jax.store import checkpoint
from tests.interop import bits, folders

pytestmark = [pytest.mark.by_day_on("oldest"), pytest.mark.usefixtures("compile_fast")]
AT_NIGHT = pytest.mark.nightly
WIDE = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_hidden_layers": 2}
FLAGS = ["--steps", "1", "--rank", "3", "--alpha", "7", "--max-len", "16", "--heldout", "2"]


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """Models, as arrays, with a number that is none, and in bits; and a run over the first in NF4."""
    folder = tmp_path_factory.mktemp("formats")
    folders.write(folder / "plain", WIDE)
    shutil.copytree(folder / "plain", folder / "odd")
    arrays = folders.tensors(folders.CONFIG | WIDE)
    arrays["model.layers.1.mlp.up_proj.weight"][3, 3] = np.nan
    (folder / "odd" / "model.safetensors").write_bytes(folders.safetensors(arrays))
    bits.write(folder / "bits", lambda rng, name, shape: bits.four_bits(rng, name, shape, "nf4"), WIDE)
    bits.write(folder / "eight", bits.eight_bits, WIDE)
    short = bits.write(folder / "short", lambda rng, name, shape: bits.four_bits(rng, name, shape, "nf4"), WIDE)
    short["model.layers.0.mlp.up_proj.weight.absmax"] = short["model.layers.0.mlp.up_proj.weight.absmax"][:-1]
    (folder / "short" / "model.safetensors").write_bytes(folders.safetensors(short))
    lines = [{"text": "hi " + "12a!"[n % 4] * (n + 1)} for n in range(8)]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    started = cli.parse([*train(folder, "plain"), "--out", str(folder / "run"), "--quantize", "nf4"])[1]
    config = rslora.LoraConfig(rank=3, alpha=7)
    base = load_model(folder / "plain", quantize="nf4")
    lora = rslora.wrap(base.apply, base.variables, jax.ShapeDtypeStruct((1, 4), "int32"), config=config)
    adapters = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, leaf.dtype), lora.adapter_shapes)
    about = checkpoint.describe(config, base.variables, settings_to_save(started, config)) | {"data": {"batch": 1}}
    with checkpoint.open_checkpoints(folder / "run") as opened:
        checkpoint.save(opened, 1, adapters, {"step": np.int32(1)}, about)
    return folder


def train(folder, model, *flags):
    return ["train", "--model", str(folder / model), "--data", str(folder / "a.jsonl"), *(flags or FLAGS)]


def digest(folder):
    """What is in a folder, to the last byte."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


HELD = "was trained on a base held in NF4, and this one is held"
CASES = {
    "a format that is not": (lambda f: [*train(f, "plain"), "--quantize", "nf5"], "nf4"),
    "in capitals": (lambda f: [*train(f, "plain"), "--quantize", "Int8"], "int8"),
    "both": (
        lambda f: [*train(f, "plain"), "--quantize", "int8", "--dequantize"],
        "to be quantised to int8 and dequantised: ask for one of the two",
    ),
    "again": (lambda f: [*train(f, "bits"), "--quantize", "int8"], "is quantised already, by bitsandbytes"),
    **{
        f"not finite in {name}": (
            lambda f, name=name: [*train(f, "odd"), "--quantize", name],
            "model.layers.1.mlp.up_proj.weight holds numbers that are not finite",
        )
        for name in ("nf4", "int8", "float8")
    },
    "wrong sizes": (lambda f: train(f, "short"), r"up_proj.weight.absmax is uint8[63] where"),
    "resumed in another": (
        lambda f: ["train", "--resume", "--out", str(f / "run"), "--steps", "2", "--quantize", "int8"],
        "--quantize int8 here, nf4 was saved",
    ),
    "resumed as arrays": (
        lambda f: ["train", "--resume", "--out", str(f / "run"), "--steps", "2", "--dequantize"],
        "--dequantize here, none was saved: leave it out to go on with the run",
    ),
    "gone on with in another": (
        lambda f: train(f, "plain", "--adapters", str(f / "run"), "--quantize", "float8"),
        f"{HELD} in Float8: give --quantize nf4",
    ),
    "gone on with as arrays": (
        lambda f: train(f, "plain", "--adapters", str(f / "run"), "--dequantize"),
        f"{HELD} as arrays: give --quantize nf4",
    ),
    **{
        f"{command} over {model}": (
            lambda f, command=command, model=model: [command, str(f / "run"), "--model", str(f / model)],
            said,
        )
        for command in ("merge", "export")
        for model, said in (("eight", f"{HELD} in Int8"), ("bits", "other values"))
    },
    "generated from another": (
        lambda f: ["generate", str(f / "run"), "--model", str(f / "eight"), "--prompt", "hi"],
        f"{HELD} in Int8",
    ),
}
BY_DAY = ("a format that is not", "not finite in nf4", "wrong sizes", "resumed in another", "merge over eight")


@pytest.mark.parametrize("case", [case if case in BY_DAY else pytest.param(case, marks=AT_NIGHT) for case in CASES])
def test_what_cannot_be_is_one_sentence_and_nothing_is_lost(case, there, capsys):
    arguments, said = CASES[case]
    arguments, before = arguments(there), digest(there)
    if "--resume" not in arguments and arguments[0] in ("train", "merge", "export"):
        arguments += ["--out", str(there / "new")]
    capsys.readouterr()
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("rslora: error: ") and said in error and len(error) < 400, error
    assert digest(there) == before
