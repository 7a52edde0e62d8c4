"""A packed base that waits in the host's memory: it comes to the device packed, where it is used, and stays there."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import rslora_jax as rslora
from rslora_jax.bare import Bare
from rslora_jax.stored import dense, is_stored
from tests.methods.gained import trained as moved
from tests.program_models import normal
from tests.reference import assert_near
from tests.stored.packed import packed

# XLA on CPUs may abort where a program over host memory is compiled without most optimisations, or donated some.
pytestmark = pytest.mark.by_day_on("newest")
NIGHT = pytest.mark.nightly
X, AT = normal(0, 4, 64), jnp.array([3, 60, 3])


def brought(w):
    """As programs say it themselves, of arrays they have to."""
    return jax.device_put(w, jax.memory.Space.Device)


def scanned(p, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["kernel"])[0]


def scanned_and_brought(p, x):
    return lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ brought(w)), None)), x, p["kernel"])[0]


def brought_whole(p, x):
    return x @ brought(p["kernel"])[1].T


def tied(p, x):
    return (p["embedding"][AT] @ x.T).T @ p["embedding"][AT] @ p["embedding"].T


PROGRAMS = (scanned, scanned_and_brought, brought_whole, tied)
BY_DAY = {("Q4_1", scanned, "lora")}
CASES = [(form, fn, how) for form in ("nf4", "Q4_1", "int8") for fn in PROGRAMS for how in ("lora", "dora", "rows")]


def base_of(form, fn):
    name = "embedding" if fn is tied else "kernel"
    return {name: packed(form, name, normal(1, 64, 64) if fn is tied else normal(1, 2, 64, 64))}


@pytest.mark.parametrize(
    ("form", "fn", "how"),
    [
        case if case in BY_DAY else pytest.param(*case, marks=NIGHT)
        for case in CASES
        if case[2] != "rows" or case[1] is tied
    ],
)
def test_a_base_in_the_hosts_memory_is_as_one_on_the_device(form, fn, how):
    base = base_of(form, fn)
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    waiting = jax.device_put(base, host)
    options = {"trained_rows": {"embedding": [63, 0]}} if how == "rows" else {"targets": "*", "method": how}
    lora = rslora.wrap(fn, waiting, X, config=rslora.LoraConfig(rank=3, alpha=7, on_fallback="error", **options))
    adapters = moved(lora.init(jax.random.key(0), waiting))

    @jax.jit
    def step(adapters, params):
        return jax.value_and_grad(lambda a: jnp.sum(jnp.sin(lora.apply(params, a, X))))(adapters)

    plain = {name: dense(w) for name, w in base.items()}
    assert_near(step(adapters, waiting), step(adapters, plain), 1e-4, floor=1e-3)
    merged = lora.merge(waiting, adapters)
    for name, w in lora.merge(plain, adapters).items():
        assert merged[name].sharding.memory_kind == "pinned_host" and not is_stored(merged[name])
        assert_near(merged[name], w, 1e-6)
    assert_near(jax.jit(Bare(fn))(waiting, X), fn(plain, X), 1e-5)
