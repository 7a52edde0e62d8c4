"""What config.json says of the head, and what the file has: the logits are those of the file's numbers."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from rslora_jax.cli import main
from rslora_jax.interop import weights
from rslora_jax.interop.huggingface import load_huggingface
from rslora_jax.models.decoder import Decoder

from . import folders
from .runs import make_run

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def write(folder, said, head, dtype=np.float32, kind="llama"):
    """Write a model whose file has a head that is the token's table, another, or none."""
    config = folders.CONFIG | folders.FAMILIES[kind] | {"tie_word_embeddings": said}
    folders.write(folder, config)
    arrays = folders.tensors(config | {"tie_word_embeddings": True}, dtype)
    if head:
        arrays[HEAD] = arrays[TABLE].copy()
    if head == "another in its last number":
        arrays[HEAD][-1, -1] += 1
    if head == "another":
        arrays[HEAD] = np.random.default_rng(7).normal(0, 0.3, arrays[TABLE].shape).astype(dtype)
    (folder / "model.safetensors").write_bytes(folders.safetensors(arrays))
    return arrays


CASES = {
    (True, None): True,
    (True, "the same"): True,
    (True, "another"): False,
    (True, "another in its last number"): False,
    (False, "the same"): False,
    (False, "another"): False,
}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.nightly)])
@pytest.mark.parametrize(("said", "head"), CASES)
def test_the_head_is_what_the_file_has(said, head, dtype, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(weights, "CHUNK", 300)
    arrays = write(tmp_path, said, head, jnp.dtype(dtype), "qwen3" if dtype == "bfloat16" else "llama")
    config, variables, _ = load_huggingface(tmp_path)
    assert config.tie_head is CASES[said, head]
    told = capsys.readouterr().err
    assert ("is not the token table, though tie_word_embeddings says so" in told) is (said and not config.tie_head)
    tokens = np.array([[5, 1, 20]])
    logits, state = Decoder(config).apply(variables, tokens, capture_intermediates=True, mutable=["intermediates"])
    hidden_BxTxW = np.asarray(state["intermediates"]["norm"]["__call__"][0], np.float64)
    want = hidden_BxTxW @ arrays.get(HEAD, arrays[TABLE]).astype(np.float64).T
    np.testing.assert_allclose(logits, want, rtol=0, atol=1e-4)


def test_no_head_where_there_is_to_be_one_is_refused_with_what_to_do(tmp_path):
    write(tmp_path, False, None)
    with pytest.raises(
        ValueError, match=rf"{tmp_path} lacks tensor lm_head.weight, and tie_word_embeddings is false: "
    ):
        load_huggingface(tmp_path)
    write(tmp_path, True, None)
    arrays = folders.tensors(folders.CONFIG)
    arrays[HEAD] = arrays[HEAD][1:]
    (tmp_path / "model.safetensors").write_bytes(folders.safetensors(arrays))
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \(23, 16\)"):
        load_huggingface(tmp_path)


def test_merged_and_exported_it_stays_a_head_of_its_own(tmp_path):
    base = tmp_path / "base"
    arrays = write(base, True, "another")
    make_run(tmp_path / "run", base)
    assert main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    said = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert said == json.loads((base / "config.json").read_text()) | {
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    variables = load_huggingface(tmp_path / "merged").variables
    np.testing.assert_array_equal(variables["params"]["lm_head"]["kernel"].T, arrays[HEAD])
