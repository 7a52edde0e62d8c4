"""tunix's Qwen3 with experts: Pallas kernels on a TPU, plain products on a CPU, and the same adapters on both."""

import functools
import types

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import rslora_jax as rslora
from tests.third_party.checks import assert_exact, axes_of, wrapped
from tests.zoo.model import filled

why = "needs google-tunix: see tests/third_party/README.md"
qwen3 = pytest.importorskip("tunix.models.qwen3.model", reason=why, exc_type=ImportError)
megablox = pytest.importorskip("jax.experimental.pallas.ops.tpu.megablox", reason=why, exc_type=ImportError)

pytestmark = [pytest.mark.nightly, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

EXPERTS = [f"layers/{n}/mlp/{name}_proj" for n in range(2) for name in ("gate", "up", "down")]
ATTENTION = [f"layers/{n}/attn/{name}_proj/w" for n in range(2) for name in "qkvo"]
ROUTERS = [f"layers/{n}/mlp/router/kernel" for n in range(2)]


class OnTpu:
    """jax, as the model sees it on a TPU."""

    def __getattr__(self, name):
        return getattr(jax, name)

    def devices(self):
        return [types.SimpleNamespace(platform="tpu")]


@pytest.fixture
def on_tpu(monkeypatch):
    """Make the model take its TPU path; the kernels are interpreted, so that it also runs."""
    monkeypatch.setattr(qwen3, "jax", OnTpu())
    monkeypatch.setattr(qwen3.megablox, "gmm", functools.partial(megablox.gmm, interpret=True))


@pytest.fixture
def mesh():
    with jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2) as mesh:
        yield mesh


def model():
    """Return a new function each time: one that JAX has traced before keeps the path it took."""
    config = qwen3.ModelConfig(
        num_layers=2, vocab_size=50, embed_dim=16, hidden_dim=24, num_heads=4, head_dim=8, num_kv_heads=2,
        rope_theta=10_000, norm_eps=1e-6, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    fn, params = rslora.from_nnx(qwen3.Qwen3(config, rngs=nnx.Rngs(0)))
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, 50)
    args = (tokens, jnp.tile(jnp.arange(8), (2, 1)), None, jnp.tril(jnp.ones((2, 8, 8), bool)))
    return (lambda params, *args: fn(params, *args)[0]), filled(params), args


def kernels(fn, params, args):
    return str(jax.make_jaxpr(lambda p, t: fn(p, t, *args[1:]))(params, args[0])).count("pallas_call")


def test_on_a_cpu_every_expert_is_a_site(mesh):
    fn, params, args = model()
    assert not kernels(fn, params, args)
    lora, said = wrapped(fn, params, *args)
    assert set(lora.sites) == {*EXPERTS, *ATTENTION, *ROUTERS}
    assert not said and not any(site.fallbacks for site in lora.sites.values())
    assert_exact(lora, params, *args)


def test_on_a_tpu_the_sites_are_the_same_and_the_kernels_are_reported(mesh, on_tpu, monkeypatch):
    fn, params, args = model()
    assert kernels(fn, params, args)
    lora, said = wrapped(fn, params, *args)
    assert {path for path, site in lora.sites.items() if site.fallbacks} == set(EXPERTS)
    (text,) = said
    assert text.startswith("6 of 16 adapted weights are materialised") and EXPERTS[0] in text
    assert_exact(lora, params, *args)

    monkeypatch.undo()
    fn, params, args = model()
    assert not kernels(fn, params, args)
    there = wrapped(fn, params, *args)[0]
    assert axes_of(there) == axes_of(lora) and dict(there.left_out) == dict(lora.left_out)


def test_adapters_trained_on_one_platform_serve_on_the_other(mesh, on_tpu, monkeypatch):
    fn, params, args = model()
    on = wrapped(fn, params, *args)[0]
    adapters = jax.tree.map(lambda f: f + 0.1, on.init(jax.random.key(2)))
    there = jax.jit(lambda p, a, t: on.apply(p, a, t, *args[1:]))(params, adapters, args[0])
    monkeypatch.undo()
    off = wrapped(model()[0], params, *args)[0]
    here = jax.jit(lambda p, a, t: off.apply(p, a, t, *args[1:]))(params, adapters, args[0])
    assert jnp.abs(there - here).max() < 2e-5 * jnp.abs(here).max()
