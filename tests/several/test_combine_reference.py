"""Adapters that PEFT combines, where it is right about their scale (one rank, one alpha, alpha / r): the same here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

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


LAID = {  # their factors in our layout
    "table": lambda of, name: (of.lora_embedding_A[name].T, of.lora_embedding_B[name].T),
    "kernel": lambda of, name: (of.lora_A[name].weight.permute(2, 3, 1, 0), of.lora_B[name].weight[..., 0, 0].T),
    "linear": lambda of, name: (of.lora_A[name].weight.T, of.lora_B[name].weight.T),
}


def factors_of(model, adapter):
    """Return views of their factors in our layout, by the modules that have some."""
    modules = {path: getattr(model.base_model.model, path) for path in PARAMS}
    there = {path: of for path, of in modules.items() if adapter in getattr(of, "scaling", {})}
    return {path: LAID[path](of, adapter) for path, of in there.items()}


def wrapped(rank, alpha, targets):
    config = rslora.LoraConfig(rank=rank, alpha=alpha, scaling="lora", targets=targets)
    return rslora.wrap(ours, PARAMS, jnp.zeros((2, 4), int), config=config)


def theirs_of(pairs):
    """Return their model with the adapters "0", "1", ..."""
    model = None
    for n, (lora, adapters) in enumerate(pairs):
        config = peft.LoraConfig(r=lora.config.rank, lora_alpha=lora.config.alpha, target_modules=[*lora.sites])
        if model is None:
            model = peft.get_peft_model(Theirs(), config, adapter_name="0")
        else:
            model.add_adapter(str(n), config)
        for path, its in factors_of(model, str(n)).items():
            for theirs, mine in zip(its, adapters[path].values(), strict=True):
                theirs.data.copy_(torch.tensor(mine))
    return model


@pytest.fixture(scope="module")
def both():
    lora = wrapped(RANK, ALPHA, ["*"])
    pairs = [(lora, drawn(lora, seed)) for seed in range(2)]
    return pairs, theirs_of(pairs)


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
    assert_same(pairs, WEIGHTS, model, name, method, **their)


def assert_same(pairs, weights, model, name, method, **options):
    key = jax.random.key(0) if "dare" in method else None
    lora, adapters = rslora.combine(pairs, weights, method, key=key, **options)
    found = factors_of(model, name)
    assert found.keys() == lora.sites.keys()
    for path, factors in found.items():
        site = lora.sites[path]
        module = getattr(model.base_model.model, path)
        a, b = (factor.detach().numpy() for factor in factors)
        want = update(site, module.scaling[name], {"a": a, "b": b})
        got = update(site, site.gamma, adapters[path])
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max() + 1e-9, path


of_one = st.tuples(
    st.integers(1, 5),  # its rank, which is its alpha
    st.sets(st.sampled_from([*PARAMS]), min_size=1).map(sorted),
    st.sampled_from([-1.2, -0.4, 0.0, 0.7, 2.0]),
)


@given(
    st.lists(of_one, min_size=2, max_size=3),  # of one alone PEFT prunes nothing
    st.sampled_from(METHODS),
    st.sampled_from([0.1, 0.55, 1.0]),
    st.sampled_from(["total", "frequency"]),
)
@settings(max_examples=12, deadline=None, phases=[Phase.generate])
def test_adapters_of_other_ranks_and_targets_as_by_peft(drawn_, method, density, election):
    ranks, targets, weights = map(list, zip(*drawn_, strict=True))
    if "svd" not in method and method != "cat":
        ranks = ranks[:1] * len(ranks)  # which PEFT asks for, as it sums factors as they are
    loras = [wrapped(rank, rank, names) for rank, names in zip(ranks, targets, strict=True)]
    pairs = [(lora, drawn(lora, seed)) for seed, lora in enumerate(loras)]
    model = theirs_of(pairs)
    density = None if method in ("linear", "cat", "svd") else 1.0 if "dare" in method else density
    their = {"density": density, "majority_sign_method": election}
    rank = max(ranks) if "svd" in method else None  # there the largest of all, here of those that adapt a weight
    model.add_weighted_adapter([*map(str, range(len(pairs)))], weights, "new", method, svd_rank=rank, **their)
    assert_same(pairs, weights, model, "new", method, rank=rank, **their)
