"""What is measured of a base, or told of it, where it is stored: as of the weights that it stands for."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import rslora_jax as rslora
from rslora_jax.analysis import spectrum, stability
from rslora_jax.parallel.sharding import make_mesh
from rslora_jax.store.checksum import checksums
from rslora_jax.stored import dense
from tests.program_models import normal
from tests.reference import assert_near, trained
from tests.stored.blocks import blocks
from tests.stored.eight_bits import EightBits, eight_bits

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]


def two_layers(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"]


def made(targets: str = "*") -> Any:
    params = {"up": normal(0, 9, 7), "down": normal(1, 7, 5)}
    stored = {name: eight_bits(w) for name, w in params.items()}
    lora = rslora.wrap(two_layers, stored, normal(2, 4, 9), config=rslora.LoraConfig(rank=3, alpha=7, targets=targets))
    return lora, stored, {name: dense(w) for name, w in stored.items()}, trained(lora)


def test_stability_is_that_of_the_dense_base_whether_a_weight_has_an_adapter_or_not():
    lora, stored, plain, adapters = made("up")
    x = normal(2, 4, 9)
    found = [stability.measure(lora, lambda run, x: jnp.sum(run(x) ** 2), p, adapters, x) for p in (stored, plain)]
    assert_near(found[0]["up"], found[1]["up"], 1e-5)


def test_the_spectrum_is_beside_that_of_the_dense_weights():
    lora, stored, plain, adapters = made()
    one, other = (spectrum.measure(lora.config, adapters, sites=lora.sites, weights=w) for w in (stored, plain))
    assert one == other
    assert one[0].weight_frobenius == pytest.approx(np.linalg.norm(np.asarray(plain["up"], np.float64)), rel=1e-6)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coded(EightBits):
    """The same in a code that is named beside the arrays."""

    code: str = dataclasses.field(default="linear", metadata={"static": True})


def test_what_is_not_in_the_arrays_tells_bases_apart_too():
    eight = eight_bits(normal(0, 9, 7))
    fields = {f.name: getattr(eight, f.name) for f in dataclasses.fields(eight)}
    linear, signed = Coded(**fields), Coded(**fields, code="signed")
    assert checksums({"w": linear}) != checksums({"w": signed})
    assert checksums({"w": linear}) == checksums({"w": Coded(**fields)})


def of_one_scale(w):
    """In 8 bits with one scale for the whole weight, which has no axes."""
    scale = jnp.max(jnp.abs(w)) / 127
    return EightBits(jnp.round(w / scale).astype(jnp.int8), scale, jnp.dtype(w.dtype))


@pytest.mark.parametrize("form", [eight_bits, lambda w: blocks(w, w.ndim - 2), of_one_scale])
def test_a_spec_may_be_longer_than_the_arrays_of_a_form(form):
    w, x = form(normal(0, 9, 7)), normal(2, 4, 9)
    fn = jax.shard_map(
        lambda w, x: x @ w, mesh=make_mesh("data=-1", jax.devices()[:1]), in_specs=(P(None, None), P()), out_specs=P()
    )
    lora = rslora.wrap(lambda p, x: fn(p["w"], x), {"w": w}, x, config=rslora.LoraConfig(rank=3, alpha=7))
    adapters = trained(lora)
    want = x @ lora.merge({"w": w}, adapters)["w"]
    assert_near(lora.apply({"w": w}, adapters, x), want, 1e-5)
