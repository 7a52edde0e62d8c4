"""Norms and spectra of adapters against numpy's decomposition of the whole product, in float64."""

import csv
import dataclasses
import math

import jax
import jax.numpy as jnp
import matplotlib.image
import ml_dtypes
import numpy as np
import pytest

import rslora_jax as rslora
from rslora_jax.analysis import heatmap, spectrum
from rslora_jax.models.decoder import Decoder, DecoderConfig
from rslora_jax.sites import named_leaves

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]

RNG = np.random.default_rng(0)
CONFIG = DecoderConfig(vocab_size=40, width=32, mlp_width=48, num_layers=3, num_heads=4, num_kv_heads=2)


def by_hand(product, weight=None):
    """Return the figures of a matrix by the full decomposition of it."""
    values = np.linalg.svd(product, compute_uv=False)
    p = values / values.sum()
    entropy = -sum(x * math.log(x) for x in p if x > 1e-14)
    found = [math.sqrt((product**2).sum()), values[0], math.exp(entropy), sum(values > values[0] / 100)]
    return found if weight is None else [*found, np.linalg.norm(weight), np.linalg.norm(weight, 2)]


def figures(m):
    found = [m.update_frobenius, m.update_spectral, m.effective_rank, m.above]
    return found if m.weight_frobenius is None else [*found, m.weight_frobenius, m.weight_spectral]


@pytest.fixture(params=["looped", "scanned"], scope="module")
def trained(request):
    """A decoder with adapters of two ranks, none of whose spectra is flat."""
    model = Decoder(dataclasses.replace(CONFIG, scan_layers=request.param == "scanned"))
    tokens = jnp.zeros((1, 4), jnp.int32)
    variables = model.init(jax.random.key(0), tokens)
    config = rslora.LoraConfig(rank=3, alpha=7, rank_pattern={"*/mlp/*": 5}, alpha_pattern={"*/{k,v}_proj/*": 2.5})
    lora = rslora.wrap(model.apply, variables, tokens, config=config)

    def fill(path, factor):
        fading = 0.2 ** np.arange(lora.sites[path].rank) * (1 + len(path) % 7)
        return {
            "a": RNG.normal(size=factor["a"].shape).astype(np.float32),
            "b": np.moveaxis(np.moveaxis(RNG.normal(size=factor["b"].shape), -2, -1) * fading, -1, -2),
        }

    shapes = jax.eval_shape(lora.init, jax.random.key(0))
    return lora, variables, {path: fill(path, factor) for path, factor in shapes.items()}


def test_every_figure_is_that_of_the_whole_product(trained):
    lora, variables, adapters = trained
    found = spectrum.measure(lora.config, adapters, sites=lora.sites, weights=named_leaves(variables))
    assert len(found) == 21 and {m.layer for m in found} == {0, 1, 2}
    order = [
        "attn/q_proj",
        "attn/k_proj",
        "attn/v_proj",
        "attn/o_proj",
        "mlp/gate_proj",
        "mlp/up_proj",
        "mlp/down_proj",
    ]
    assert list(dict.fromkeys(m.module for m in found)) == order
    assert len({m.effective_rank for m in found}) == 21
    for m in found:
        factors, weight = adapters[m.path], np.asarray(named_leaves(variables)[m.path], np.float64)
        rank, alpha = 5 if "mlp" in m.path else 3, 2.5 if m.module[-6:] in ("k_proj", "v_proj") else 7
        assert m.rank == rank and m.gamma == pytest.approx(alpha / math.sqrt(rank))
        a, b, w = (np.asarray(x[m.index], np.float64) for x in (factors["a"], factors["b"], weight))
        assert figures(m) == pytest.approx(by_hand(alpha / math.sqrt(rank) * a @ b, w), rel=1e-6)
        assert m.relative_frobenius == pytest.approx(m.update_frobenius / np.linalg.norm(w), rel=1e-6)
        assert m.relative_spectral == pytest.approx(m.update_spectral / np.linalg.norm(w, 2), rel=1e-6)


def test_without_a_base_all_but_the_weights_norms_is_the_same(trained):
    lora, variables, adapters = trained
    whole = spectrum.measure(lora.config, adapters, sites=lora.sites, weights=named_leaves(variables))
    without = [dataclasses.replace(m, weight_frobenius=None, weight_spectral=None) for m in whole]
    shapes = {path: leaf.shape for path, leaf in named_leaves(variables).items()}

    def ordered(found):
        return sorted(found, key=lambda m: (m.path, m.index))  # there is no model to tell the order of use

    assert ordered(spectrum.measure(lora.config, adapters, shapes=shapes)) == ordered(without)
    assert ordered(spectrum.measure(lora.config, adapters)) == ordered(without)
    assert without[0].relative_frobenius is None


def test_kernels_of_many_axes_are_taken_as_matrices_in_by_out():
    # (in, heads, size), (heads, size, out) and a stack of experts; the factors come as `Site` has them.
    def attention(params, x_BxI):
        heads = jnp.einsum("bi,ihs->bhs", x_BxI, params["q"])
        out = jnp.tanh(jnp.einsum("bhs,hso->bo", heads, params["o"]))
        return jnp.einsum("ebi,eio->ebo", out * jnp.ones((6, 1, 1)), params["experts"])

    shapes = {"q": (10, 4, 5), "o": (4, 5, 9), "experts": (6, 9, 8)}
    params = {name: jnp.asarray(RNG.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    lora = rslora.wrap(attention, params, jnp.ones((2, 10)), config=rslora.LoraConfig(rank=3, alpha=7))
    adapters = jax.tree.map(lambda x: RNG.normal(size=x.shape), lora.init(jax.random.key(0)))
    found = spectrum.measure(lora.config, adapters, sites=lora.sites, weights=params)
    update = jax.tree.map(lambda merged, w: np.asarray(merged - w), lora.merge(params, adapters), params)

    def flat(tree):
        return [
            (tree["q"].reshape(10, 20)),
            (tree["o"].reshape(20, 9)),
            *tree["experts"],
        ]

    found = sorted(found, key=lambda m: (["q", "o", "experts"].index(m.path), m.index))
    assert [(m.in_size, m.out_size) for m in found] == [(10, 20), (20, 9)] + [(9, 8)] * 6
    for m, product, weight in zip(found, flat(update), flat(jax.tree.map(np.asarray, params)), strict=True):
        assert figures(m)[:2] == pytest.approx(by_hand(product)[:2], rel=1e-5)
        assert figures(m)[4:] == pytest.approx(by_hand(product, weight)[4:], rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "rank"), [((70, 50), 7), ((50, 70), 7), ((12, 70), 20), ((70, 12), 20), ((9, 8), 20), ((50, 50), 1)]
)
def test_singular_values_from_the_factors(shape, rank):
    a, b = RNG.normal(size=(shape[0], rank)), RNG.normal(size=(rank, shape[1])) * 10.0 ** -np.arange(rank)[:, None]
    values = spectrum.singular_values(a, b)
    count = min(*shape, rank)
    assert values.shape == (count,)
    assert np.allclose(values, np.linalg.svd(a @ b, compute_uv=False)[:count], rtol=1e-9, atol=1e-14 * values[0])


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_effective_rank_of_known_spectra(scale):
    orthogonal = np.linalg.qr(RNG.normal(size=(30, 8)))[0]
    flat = spectrum.singular_values(orthogonal, scale * orthogonal.T)
    assert spectrum.effective_rank(flat) == pytest.approx(8) and spectrum.count_above(flat) == 8
    one = spectrum.singular_values(orthogonal[:, :1] @ np.ones((1, 4)), scale * np.ones((4, 30)))
    assert spectrum.effective_rank(one) == pytest.approx(1) and spectrum.count_above(one) == 1
    halves = scale * 2.0 ** -np.arange(60)  # p = 1/2, 1/4, ...: the entropy is 2 ln 2
    assert spectrum.effective_rank(halves) == pytest.approx(4) and spectrum.count_above(halves) == 7


@pytest.mark.parametrize("shape", [(120, 90), (90, 120), (64, 9), (1, 80)])
@pytest.mark.parametrize("kind", ["flat", "one stands out", "fading", "zero", "rank two"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_the_spectral_norm_without_a_decomposition(shape, kind, dtype):
    w = RNG.normal(size=shape)
    if kind == "one stands out":
        w = w + 3 * np.outer(np.ones(shape[0]), np.ones(shape[1]))
    if kind == "fading":
        w = w * 0.9 ** np.arange(shape[1])
    if kind == "zero":
        w = w * 0
    if kind == "rank two":
        w = np.outer(w[:, 0], w[0]) + np.outer(np.ones(shape[0]), w[-1])
    w = w.astype(dtype)
    want = np.linalg.norm(w.astype(np.float64), 2)
    assert spectrum.spectral_norm(w) == pytest.approx(want, rel=1e-3 if kind == "flat" else 1e-5)


def test_adapters_that_have_not_moved_have_no_rank():
    factors = {"a": np.ones((3, 6, 2)), "b": np.zeros((3, 2, 5))}
    found = spectrum.measure(rslora.LoraConfig(rank=2, alpha=3), {"layers/w": factors})
    assert [(m.update_frobenius, m.effective_rank, m.above) for m in found] == [(0.0, 0.0, 0)] * 3


def test_the_picture_has_every_module_and_layer_and_the_csv_every_number(trained, tmp_path):
    lora, variables, adapters = trained
    found = spectrum.measure(lora.config, adapters, sites=lora.sites, weights=named_leaves(variables))
    heatmap.draw(found, tmp_path / "a.png", "title")
    picture = matplotlib.image.imread(tmp_path / "a.png")
    assert picture.shape[0] > 200 and picture.shape[1] > 400 and picture.std() > 0.05
    modules, layers = heatmap.modules_of(found), heatmap.layers_of(found)
    grid = heatmap.grid_of(found, lambda m: m.effective_rank, modules, layers)
    assert grid.shape == (7, 3)
    for m in found:
        assert grid[modules.index(m.module), m.layer] == m.effective_rank
    heatmap.write_csv(found, tmp_path / "a.csv")
    lines = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert len(lines) == 21
    for line, m in zip(lines, found, strict=True):
        assert (line["path"], line["module"], int(line["layer"])) == (m.path, m.module, m.layer)
        assert line["index"] == " ".join(map(str, m.index))
        for name in ("update_frobenius", "weight_spectral", "relative_frobenius", "relative_spectral"):
            assert float(line[name]) == pytest.approx(getattr(m, name), rel=1e-8)
        assert int(line["singular_values_above_1_percent"]) == m.above


def test_a_table_has_a_line_for_each_module_or_matrix(trained):
    lora, variables, adapters = trained
    found = spectrum.measure(lora.config, adapters, sites=lora.sites, weights=named_leaves(variables))
    head, lines = heatmap.summarise(found)
    assert len(lines) == 7 and len(head) == len(lines[0])
    q = next(line for line in lines if line[0] == "attn/q_proj")
    sizes = [m.relative_frobenius for m in found if m.module == "attn/q_proj"]
    assert q[1:5] == ["3", "32 x 32", "3", f"{7 / math.sqrt(3):.4g}"]
    assert q[5] == f"{np.mean(sizes):.2e} ({min(sizes):.2e} to {max(sizes):.2e})"
    head, lines = heatmap.summarise(found, every=True)
    assert len(lines) == 21 and len(head) == len(lines[0]) and len({line[0] for line in lines}) == 21
