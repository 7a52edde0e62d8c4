"""Folders merged into few bits as transformers loads them with bitsandbytes: the same matrices, the same logits."""

from __future__ import annotations

import os

import numpy as np
import pytest

from rslora_jax.interop import load_model
from rslora_jax.sites import named_leaves
from rslora_jax.stored import dense
from tests.interop import folders

from .test_merged_packed import WIDE, adapted, write

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
bnb = pytest.importorskip("bitsandbytes")
pytestmark = [pytest.mark.nightly, pytest.mark.reference, pytest.mark.xdist_group("reference")]


def in_float32(model):
    """Put matrices that the library dequantises in the place of its own products, which on CPUs are of bfloat16."""
    for name, module in [*model.named_modules()]:
        if isinstance(module, bnb.nn.Linear4bit):
            parent, _, own = name.rpartition(".")
            matrix = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            linear = torch.nn.Linear(*matrix.shape[::-1], bias=False)
            linear.weight.data = matrix.float()
            setattr(model.get_submodule(parent), own, linear)


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_bitsandbytes_has_our_matrices_and_logits(form, tmp_path):
    model, lora, adapters = adapted(folders.write(tmp_path / "base", WIDE))
    write(tmp_path / "out", model, lora, adapters, dtype=form, rest="float32", base=tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, device_map="cpu")
    ours = load_model(tmp_path / "out", scan_layers=False)
    weight = theirs.model.layers[1].mlp.up_proj.weight
    if form == "nf4":
        assert isinstance(theirs.model.layers[0].self_attn.q_proj, bnb.nn.Linear4bit)
        numbers = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).numpy()
    else:
        scales = theirs.model.layers[1].mlp.up_proj.weight.SCB.numpy() / np.float32(127)
        numbers = weight.data.numpy().astype(np.float32) * scales[:, None]
    kernel = dense(named_leaves(ours.variables)["params/layers_1/mlp/up_proj/kernel"])
    np.testing.assert_allclose(numbers, np.asarray(kernel).T, rtol=1e-6, atol=1e-7)
    in_float32(theirs)
    tokens = np.random.default_rng(1).integers(0, 16, (3, 17))
    with torch.no_grad():
        got = theirs(torch.tensor(tokens)).logits.float().numpy()
    want = np.asarray(ours.apply(ours.variables, tokens))
    # bitsandbytes rounds what an int8 matrix is multiplied by to 8 bits too.
    atol = 1e-4 if form == "nf4" else 0.1 * np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)
