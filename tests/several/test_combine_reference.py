"""Adapters that PEFT combines, where it is right about their scale (one rank, one alpha, alpha / r): the same here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rslora_jax as rslora
from rslora_jax.several.combine import METHODS
from tests.several.programs import drawn, update

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.reference,
    pytest.mark.xdist_group("reference"),
    pytest.mark.by_day_on("oldest"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

RANK, ALPHA, WEIGHTS, DENSITY = 3, 7, [0.7, -0.4], 0.55
PARAMS = {"table": jnp.ones((11, 8)), "kernel": jnp.ones((3, 2, 8, 6)), "linear": jnp.ones((6, 9))}


def ours(p, tokens):
    x = jnp.broadcast_to(p["table"][tokens][:, :, None], (2, 4, 4, 8))
    spec = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=spec) @ p["linear"]


class Theirs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(11, 8)
        self.kernel = torch.nn.Conv2d(8, 6, (3, 2))
        self.linear = torch.nn.Linear(6, 9)


def factors_of(model, adapter):
    """Return views of their factors in our layout, by module."""
    table, kernel, linear = (getattr(model.base_model.model, name) for name in PARAMS)
    a, b = (
        (of.lora_A[adapter].weight for of in (kernel, linear)),
        (of.lora_B[adapter].weight for of in (kernel, linear)),
    )
    (kernel_a, linear_a), (kernel_b, linear_b) = a, b
    return {
        "table": (table.lora_embedding_A[adapter].T, table.lora_embedding_B[adapter].T),
        "kernel": (kernel_a.permute(2, 3, 1, 0), kernel_b[..., 0, 0].T),
        "linear": (linear_a.T, linear_b.T),
    }


@pytest.fixture(scope="module")
def both():
    lora = rslora.wrap(
        ours,
        PARAMS,
        jnp.zeros((2, 4), int),
        config=rslora.LoraConfig(rank=RANK, alpha=ALPHA, scaling="lora", targets=["*"]),
    )
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(PARAMS))
    model = peft.get_peft_model(Theirs(), config, adapter_name="0")
    model.add_adapter("1", config)
    pairs = [(lora, drawn(lora, seed)) for seed in range(2)]
    for n, (_, adapters) in enumerate(pairs):
        for name, its in factors_of(model, str(n)).items():
            for theirs, mine in zip(its, adapters[name].values(), strict=True):
                theirs.data.copy_(torch.tensor(mine))
    return pairs, model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("election", ["total", "frequency"])
def test_combined_as_by_peft(both, method, election):
    pairs, model = both
    if election == "frequency" and "ties" not in method:
        pytest.skip("elects no sign")
    name = f"{method} {election}".replace(" ", "_")
    # What is dropped at random is not the same there: here nothing is.
    density = None if method in ("linear", "cat", "svd") else 1.0 if "dare" in method else DENSITY
    their = {"density": density, "majority_sign_method": election}
    model.add_weighted_adapter(["0", "1"], WEIGHTS, name, method, **their)
    key = jax.random.key(0) if "dare" in method else None
    lora, adapters = rslora.combine(pairs, WEIGHTS, method, key=key, **their)
    for path, factors in factors_of(model, name).items():
        site = lora.sites[path]
        module = getattr(model.base_model.model, path)
        a, b = (factor.detach().numpy() for factor in factors)
        want = update(site, module.scaling[name], {"a": a, "b": b})
        got = update(site, site.gamma, adapters[path])
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max(), path
