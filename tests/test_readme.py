"""The README's programs run as they stand, on the real model, with fewer steps."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from rslora_jax.store import checkpoint

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_first_program_runs_on_any_model():
    model, tokens = nn.Sequential([nn.Embed(20, 96), nn.Dense(80)]), jnp.ones((2, 3), jnp.int32)
    names = {"model": model, "tokens": tokens, "variables": model.init(jax.random.key(0), tokens)}
    exec(BLOCKS[0], names)
    assert (names["logits"] == model.apply(names["variables"], tokens)).all()
    assert jax.tree.structure(names["merged"]) == jax.tree.structure(names["variables"])


@pytest.mark.by_day_on("newest")
@pytest.mark.usefixtures("compile_fast")
def test_the_notebook_program_trains_the_real_model_and_writes(tmp_path, monkeypatch, capsys):
    from rslora_jax.interop.gguf import find_smollm2

    try:
        find_smollm2()
    except ValueError as error:
        pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    source = BLOCKS[1]
    for old, new in {"steps=40": "steps=2", "max_len=256": "max_len=64", "[::16]": "[::240]"}.items():
        assert old in source
        source = source.replace(old, new)
    names: dict = {}
    exec(source, names)
    assert list(names["result"].heldout) == [0, 1, 2]
    assert len(capsys.readouterr().out.splitlines()[-1]) > 3
    config, adapters = checkpoint.load_adapters("notebook-run", params=names["variables"])
    assert config.rank == 32 and set(adapters) == set(names["lora"].sites)


@pytest.mark.by_day_on("oldest")
@pytest.mark.usefixtures("compile_fast")
def test_models_with_state_train_as_the_guide_says(tmp_path, monkeypatch):
    guide = (Path(__file__).parent.parent / "docs" / "training" / "README.md").read_text()
    _, section = guide.split("## Models with state")
    of_nnx, of_linen = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    monkeypatch.chdir(tmp_path)

    def draw(n):
        return jax.random.normal(jax.random.key(n), (16, 8))

    names: dict = {"batches": [{"x": draw(n), "y": jnp.flip(draw(n), -1)} for n in range(20)]}
    for source, statistics in ((of_nnx, "state"), (of_linen, "stats")):
        exec(source, names)
        losses = [r["loss"] for r in names["result"].records if "loss" in r]
        assert losses[-1] < losses[0]
        moved = jax.tree.leaves(names["result"].model_state)
        assert jax.tree.structure(names["result"].model_state) == jax.tree.structure(names[statistics])
        assert all(jnp.isfinite(leaf).all() for leaf in moved if jnp.issubdtype(leaf.dtype, jnp.floating))


@pytest.mark.by_day_on("newest")
def test_a_method_and_a_stored_form_of_ones_own_run_as_their_guide_says():
    guide = (Path(__file__).parent.parent / "docs" / "methods" / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    assert len(snippets) == 5
    names: dict = {"__name__": "guide"}
    for source in snippets:
        exec(source, names)


@pytest.mark.by_day_on("newest")
def test_several_adapters_go_side_by_side_as_the_guide_says():
    guide = (Path(__file__).parent.parent / "docs" / "adapters" / "README.md").read_text()
    (source,) = re.findall(r"```python\n(.*?)```", guide.split("## Several adapters")[1].split("\n## ")[0], re.DOTALL)
    exec(source, {})
