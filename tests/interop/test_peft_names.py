"""Adapters of a model with a table of names of its own, here and in PEFT: the same outputs from the same base."""

from __future__ import annotations

import copy
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import rslora_jax as rslora
from rslora_jax.interop.peft import load_peft, read_config, replace, save_peft
from rslora_jax.sites import path_name

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.reference,
    pytest.mark.xdist_group("reference"),
    pytest.mark.usefixtures("compile_fast"),
]

from .test_peft_reference import TOKENS, VOCABULARY, loaded, random_adapters, run, shake, wrapped  # noqa: E402


class Block(nn.Module):
    """Kernels of three axes, a convolution and a position table."""

    @nn.compact
    def __call__(self, tokens_BxT):
        x = nn.Embed(VOCABULARY, 12, name="tok")(tokens_BxT)
        x = nn.Conv(12, (3,), padding="SAME", name="conv")(x)
        return nn.MultiHeadDotProductAttention(4, qkv_features=20, out_features=9, name="mha")(x)


class TorchBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.tok = torch.nn.Embedding(VOCABULARY, 12)
        self.conv = torch.nn.Conv1d(12, 12, 3, padding=1)
        self.query, self.key, self.value = (torch.nn.Linear(12, 20) for _ in range(3))
        self.out = torch.nn.Linear(20, 9)

    def forward(self, tokens):
        x = self.conv(self.tok(tokens).mT).mT

        def heads(y):
            return y.unflatten(-1, (4, 5)).transpose(1, 2)

        q, k, v = (heads(one(x)) for one in (self.query, self.key, self.value))
        return self.out(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


BLOCK = {
    "params/tok/embedding": "tok.weight",
    "params/conv/kernel": "conv.weight",
    "params/conv/bias": "conv.bias",
    "params/mha/{i}/kernel": "never.{i}.weight",
    **{f"params/mha/{n}/{leaf}": f"{n}.{t}" for n in ("query", "key", "value", "out") for leaf, t in
       (("kernel", "weight"), ("bias", "bias"))},
}  # fmt: skip


def block_variables(base, model):
    """Give the Flax model's variables the numbers of torch's."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    state = base.state_dict()

    def weight(path, leaf):
        tensor = state[BLOCK[path_name(path)]].numpy()
        if path_name(path) == "params/conv/kernel":
            tensor = tensor.transpose(2, 1, 0)
        elif path_name(path).endswith("kernel"):
            tensor = tensor.T
        return jnp.array(tensor.reshape(leaf.shape))

    return jax.tree_util.tree_map_with_path(weight, shapes)


def block_outputs(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).numpy()


def test_a_model_with_its_own_table_of_names(tmp_path):
    torch.manual_seed(0)
    base, model = TorchBlock().eval(), Block()
    variables, plain = block_variables(base, model), block_outputs(base)
    np.testing.assert_allclose(model.apply(variables, TOKENS), plain, rtol=0, atol=1e-5)

    config = rslora.LoraConfig(rank=3, alpha=7, targets=["*/kernel", "*/embedding"], rank_pattern={"*/out/*": 2})
    lora = wrapped(model.apply, variables, config)
    # Small enough for outputs of about 1: float32 rounds those of 40 by a good part of the tolerance.
    adapters = jax.tree.map(lambda leaf: 0.4 * leaf, random_adapters(lora))
    want = run(lora, variables, adapters)
    assert np.abs(want - plain).max() > 0.1 and np.abs(want).max() < 10
    save_peft(tmp_path / "out", lora, adapters, BLOCK, task_type=None)
    theirs = loaded(base, tmp_path / "out")
    np.testing.assert_allclose(block_outputs(theirs), want, rtol=0, atol=1e-4)

    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    lora_2 = wrapped(model.apply, variables, read_config(tmp_path / "theirs", variables, BLOCK))
    back, replaced = load_peft(tmp_path / "theirs", lora_2, BLOCK)
    jax.tree.map(np.testing.assert_array_equal, (back, replaced), (adapters, {}))
    with pytest.raises(ValueError, match="vLLM has no adapter for"):
        save_peft(tmp_path / "vllm", lora, adapters, BLOCK, server="vllm")


def test_a_convolution_that_was_trained_whole_goes_both_ways(tmp_path):
    torch.manual_seed(0)
    base, model = TorchBlock().eval(), Block()
    variables = block_variables(base, model)
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["query"], modules_to_save=["conv"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    shake(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    want = block_outputs(theirs.eval())
    lora = wrapped(model.apply, variables, read_config(tmp_path / "theirs", variables, BLOCK))
    adapters, replaced = load_peft(tmp_path / "theirs", lora, BLOCK)
    changed = replace(variables, replaced)
    np.testing.assert_allclose(run(lora, changed, adapters), want, rtol=0, atol=1e-4)
    save_peft(tmp_path / "again", lora, adapters, BLOCK, task_type=None, replaced=replaced)
    np.testing.assert_allclose(block_outputs(loaded(base, tmp_path / "again")), want, rtol=0, atol=1e-4)
