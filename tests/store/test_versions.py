"""Checkpoints of other versions: those before configs named a method load and resume, those of later ones say so."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rslora_jax as rslora
from rslora_jax.store import checkpoint
from rslora_jax.train import fit

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]


def run(folder, steps, resume=False):
    params, x = {"w": jnp.linspace(-1, 1, 40).reshape(8, 5)}, jax.random.normal(jax.random.key(1), (4, 8))
    lora = rslora.wrap(lambda p, x: x @ p["w"], params, x, config=rslora.LoraConfig(rank=3, alpha=7))

    def loss(run, batch):
        return (jnp.sum((run(batch) - 1) ** 2), jnp.float32(batch.shape[0]))

    options = dict(batches=[x + n for n in range(9)], loss=loss, optimizer=optax.adam(1e-2), show=False)
    return fit(lora, params, lora.init(jax.random.key(0)), steps=steps, folder=folder, resume=resume, **options)


def changed(folder, step, change):
    """Write what a checkpoint tells about itself otherwise."""
    path = folder / "checkpoints" / str(step) / "about" / "metadata"
    about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))


def test_one_from_before_configs_named_a_method_loads_and_resumes(tmp_path):
    whole, _ = run(tmp_path / "whole", 6), run(tmp_path / "cut", 4)

    def as_before(about):
        assert about.pop("format") == checkpoint.FORMAT - 1 and about["config"].pop("method") == "lora"
        del about["checksum"]

    for path in (tmp_path / "cut" / "checkpoints").iterdir():
        changed(tmp_path / "cut", path.name, as_before)
    config, adapters = checkpoint.load_adapters(tmp_path / "cut")
    assert config == rslora.LoraConfig(rank=3, alpha=7) and adapters["w"]["a"].shape == (8, 3)
    resumed = run(tmp_path / "cut", 6, resume=True)
    for got, want in zip(jax.tree.leaves(resumed.adapters), jax.tree.leaves(whole.adapters), strict=True):
        np.testing.assert_array_equal(got, want)


def test_one_of_a_later_format_is_refused_in_a_sentence(tmp_path):
    run(tmp_path / "run", 2)

    def later(about):
        about["format"] = checkpoint.FORMAT + 1
        rest = {name: value for name, value in about.items() if name != "checksum"}
        about["checksum"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()

    changed(tmp_path / "run", 2, later)
    with pytest.raises(ValueError, match=r"is of format 4, and this version reads up to 3: install a newer rslora_jax"):
        checkpoint.load_adapters(tmp_path / "run")
