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


@pytest.mark.parametrize("name", ["pissa", pytest.param("pissa_niter_16", marks=pytest.mark.nightly), "olora"])
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


@pytest.mark.parametrize("method", [pytest.param("lora", marks=pytest.mark.nightly), "dora"])
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


def subspace(rows):
    """Give the projection onto what some rows span."""
    q, _ = np.linalg.qr(np.asarray(rows, np.float64).T)
    return q @ q.T


@pytest.mark.parametrize("rho", [pytest.param(1.0, marks=pytest.mark.nightly), 2.0])
def test_eva_takes_the_directions_and_the_ranks_of_peft(rho):
    model, fn, params = theirs_and_ours()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 14)) * 0.9 ** np.arange(14)
    # PEFT takes the mean off, which is here zero at both layers, as tanh is odd.
    x = np.concatenate([x, -x]).astype("f4")
    config = rslora.LoraConfig(rank=RANK, alpha=ALPHA)
    lora = rslora.wrap(fn, params, x, config=config)
    shared = starts.eva_config(lora, params, [(x,)], rho)
    lora = rslora.wrap(fn, params, x, config=shared)
    _, adapters = starts.eva(lora, params, jax.random.key(0), [(x,)])
    theirs = peft.get_peft_model(model, peft_config("eva", eva_config=peft.EvaConfig(rho=rho, tau=0.9999)))
    plain = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None, "show_progress_bar": False}
    data = torch.utils.data.DataLoader(torch.tensor(x), batch_size=len(x))
    peft.initialize_lora_eva_weights(theirs, data, forward_fn=lambda model, inputs: model(inputs), **plain)
    for path, site in lora.sites.items():
        a = theirs.get_submodule(f"base_model.model.{path}.lora_A")["default"].weight.detach().numpy()
        assert len(a) == site.rank
        assert_near(subspace(adapters[path]["a"].T), subspace(a), 1e-2)
        assert site.gamma == pytest.approx(ALPHA / site.rank**0.5)
    assert sum(site.rank for site in lora.sites.values()) == 2 * RANK
    assert (rho == 1) == all(site.rank == RANK for site in lora.sites.values())


def test_lora_ga_takes_the_directions_of_peft():
    model, fn, params = theirs_and_ours()
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((60, 14)).astype("f4"), rng.standard_normal((60, 9)).astype("f4")

    def loss(run, batch):
        return jnp.sum((run(batch) - y) ** 2), jnp.float32(y.size)

    lora = rslora.wrap(fn, params, x, config=rslora.LoraConfig(rank=RANK, alpha=ALPHA))
    _, adapters = starts.lora_ga(lora, params, jax.random.key(0), loss, [x])
    theirs = peft_config("lora_ga", lora_ga_config=peft.LoraGAConfig())
    peft.tuners.lora.loraga.preprocess_loraga(
        model, theirs, lambda: ((model(torch.tensor(x)) - torch.tensor(y)) ** 2).sum().backward()
    )
    made = peft.get_peft_model(model, theirs)
    for path, site in lora.sites.items():
        module = made.get_submodule(f"base_model.model.{path}")
        a, b = (getattr(module, f"lora_{of}")["default"].weight.detach().numpy() for of in "AB")
        assert_near(subspace(adapters[path]["a"].T), subspace(a), 1e-2)
        assert_near(subspace(adapters[path]["b"]), subspace(b.T), 1e-2)
        # The paper's scale, of both; PEFT's A is of length 1, and its B longer by the singular values.
        size = site.out_size**0.25 / 4
        assert_near(adapters[path]["a"].T @ adapters[path]["a"], size**2 * np.eye(RANK), 1e-4)
        assert_near(adapters[path]["b"] @ adapters[path]["b"].T, size**2 * np.eye(RANK), 1e-4)
