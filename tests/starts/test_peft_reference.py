"""Starts beside PEFT's own, and what was trained from one read by PEFT over the original base."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rslora_jax as rslora
from rslora_jax import starts
from rslora_jax.interop.names import Weight
from rslora_jax.interop.peft import save_peft
from tests.reference import assert_near
from tests.starts.test_starts import as_trained, products

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.reference,
    pytest.mark.by_day_on("oldest"),
    pytest.mark.xdist_group("reference"),
    pytest.mark.usefixtures("compile_fast"),
]

WIDTHS = (14, 20, 9)
RANK, ALPHA = 3, 7


def theirs_and_ours():
    """Give a model of two layers in torch, and as a function of its weights turned."""
    torch.manual_seed(0)
    first, second = (torch.nn.Linear(*WIDTHS[n : n + 2], bias=False) for n in range(2))
    for layer in (first, second):  # some directions are to be far stronger, so that random ones find them
        layer.weight.data *= 0.6 ** torch.arange(layer.in_features)
    model = torch.nn.Sequential(first, torch.nn.Tanh(), second)
    params = {name: jnp.asarray(model.get_submodule(name).weight.detach().numpy().T) for name in ("0", "2")}
    return model, lambda p, x: jnp.tanh(x @ p["0"]) @ p["2"], params


def peft_config(init, rank=RANK, **more):
    return peft.LoraConfig(
        r=rank, lora_alpha=ALPHA, use_rslora=True, target_modules=["0", "2"], init_lora_weights=init, **more
    )


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_16", "olora"])
def test_the_base_and_the_products_are_those_of_peft(name):
    model, fn, params = theirs_and_ours()
    lora = rslora.wrap(fn, params, jnp.ones((1, 14)), config=rslora.LoraConfig(rank=RANK, alpha=ALPHA))
    begin = {"pissa": starts.pissa, "olora": starts.olora}.get(name) or (lambda *args: starts.pissa(*args, niter=16))
    changed, adapters = begin(lora, params, jax.random.key(0))
    theirs = peft.get_peft_model(model, peft_config(name))
    for path, site in lora.sites.items():
        module = theirs.get_submodule(f"base_model.model.{path}")
        a, b = (getattr(module, f"lora_{of}")["default"].weight.detach().numpy() for of in "AB")
        ((got,), *_) = products(site, adapters[path])
        assert_near(got, (module.scaling["default"] * b @ a).T, 1e-4)
        assert_near(changed[path], module.get_base_layer().weight.detach().numpy().T, 1e-4)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_peft_reads_over_the_original_base_what_was_trained_from_a_start(method, tmp_path):
    model, fn, params = theirs_and_ours()
    config = rslora.LoraConfig(rank=RANK, alpha=ALPHA, method=method, rank_pattern={"2": 2}, alpha_pattern={"0": 5})
    x = np.random.default_rng(1).standard_normal((6, 14)).astype("f4")
    lora = rslora.wrap(fn, params, x, config=config)
    changed, start = starts.pissa(lora, params, jax.random.key(0))
    trained = as_trained(start)
    whole, adapters = starts.for_original_base(lora, trained, start)
    names = {path: Weight(f"{path}.weight", transposed=True) for path in params}
    save_peft(tmp_path / "adapter", whole, adapters, names, task_type=None)
    read = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    with torch.no_grad():
        got = read(torch.tensor(x)).numpy()
    assert_near(got, lora.apply(changed, trained, x), 1e-4)
