"""What is kept for the backward pass changes no value and no gradient; "offload" keeps a layer's input on the host."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rslora_jax as rslora
from rslora_jax.models.decoder import Decoder, DecoderConfig
from rslora_jax.models.layout import stack_layers
from rslora_jax.models.remat import REMAT_POLICIES
from rslora_jax.sites import from_paths, named_leaves
from tests.devices import run_on
from tests.reference import assert_near
from tests.stored.packed import packed
from tests.zoo.model import filled

pytestmark = [pytest.mark.by_day_on("oldest"), pytest.mark.usefixtures("compile_fast")]
NIGHT = pytest.mark.nightly
CONFIG = DecoderConfig(vocab_size=40, width=16, mlp_width=24, num_layers=3, num_heads=4, num_kv_heads=2, max_len=2048)
TOKENS = jax.random.randint(jax.random.key(1), (2, 7), 0, CONFIG.vocab_size)
# What other families add, all of it at once.
ADDED = dict(qkv_bias=True, qk_norm=True, post_norms=True, window=3, window_layers=(True, False, True), logit_cap=5.0)
CASES = {
    "scanned": dict(scan_layers=True),
    "one by one": dict(),
    "bfloat16": dict(scan_layers=True, dtype="bfloat16"),
    "windows and caps": dict(scan_layers=True, **ADDED),
    "chunked": dict(attention="chunked"),
    "NF4": dict(scan_layers=True, form="nf4"),
    "GGUF": dict(form="Q8_0", head_dim=8, width=32, mlp_width=32),
    "DoRA": dict(method="dora"),
    "through the weight": dict(scan_layers=True, rank=8),
    "dropout": dict(scan_layers=True, dropout=0.3),
}
BY_DAY = {"scanned", "one by one", "NF4"}


@functools.cache
def problem(case):
    """Return the fields of a case's decoder, its weights, and the config of the adapters."""
    how = dict(CASES[case])
    adapters = {name: how.pop(name) for name in ("method", "rank", "dropout") if name in how}
    form = how.pop("form", None)
    config = dataclasses.replace(CONFIG, **how)
    looped = dataclasses.replace(config, scan_layers=False)
    variables = filled(jax.eval_shape(Decoder(looped).init, jax.random.key(0), TOKENS))
    variables = stack_layers(variables) if config.scan_layers else variables
    if form:
        leaves = named_leaves(variables).items()
        variables = from_paths(
            variables, {path: packed(form, path, w) if "layers" in path else w for path, w in leaves}
        )
    return config, variables, rslora.LoraConfig(**{"rank": 3, "alpha": 7} | adapters)


def gradient(case, remat, around=lambda f: f):
    """Return the loss and the gradients of adapters."""
    config, variables, of_adapters = problem(case)
    lora = rslora.wrap(Decoder(dataclasses.replace(config, remat=remat)).apply, variables, TOKENS, config=of_adapters)
    key = {"dropout_key": jax.random.key(3)} if of_adapters.dropout else {}

    def loss(adapters):
        return jnp.sum(jnp.sin(lora.apply(variables, adapters, TOKENS, **key)))

    rng = np.random.default_rng(7)
    adapters = jax.tree.map(lambda a: jnp.asarray(0.15 * rng.standard_normal(a.shape), a.dtype), lora.adapter_shapes)
    return around(jax.value_and_grad(loss))(adapters)


@pytest.mark.parametrize("case", [c if c in BY_DAY else pytest.param(c, marks=NIGHT) for c in CASES])
def test_offload_gives_what_full_gives_to_the_last_bit(case):
    for around in (jax.jit, *([] if case in BY_DAY else [lambda f: f])):
        jax.tree.map(np.testing.assert_array_equal, *(gradient(case, remat, around) for remat in ("offload", "full")))


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["none", "full", *REMAT_POLICIES])
@pytest.mark.parametrize("case", ["scanned", "one by one"])
def test_no_policy_changes_a_value_or_a_gradient(case, name):
    assert_near(gradient(case, name, jax.jit), gradient(case, None, jax.jit), 5e-6)


def for_tpu(config):
    """Return the text of a gradient as it is lowered for a TPU, where host and device have memories of their own."""
    variables = jax.eval_shape(Decoder(config).init, jax.random.key(0), TOKENS)
    lora = rslora.wrap(Decoder(config).apply, variables, TOKENS, config=rslora.LoraConfig(rank=3, alpha=7)).on("tpu")

    def step(adapters, variables, tokens):
        return jax.grad(lambda adapters: jnp.sum(jnp.sin(lora.apply(variables, adapters, tokens))))(adapters)

    traced = jax.jit(step).trace(lora.adapter_shapes, variables, TOKENS)
    return traced.lower(lowering_platforms=("tpu",)).as_text()


def moved(text):
    """Return (memory, shape) of everything that a lowered program takes to a memory."""
    lines = [line for line in text.splitlines() if "annotate_device_placement" in line]
    memories = ["pinned_host" if "pinned_host" in line else "device" for line in lines]
    return sorted(zip(memories, (line.rpartition("tensor<")[2].split(">")[0] for line in lines), strict=True))


@pytest.mark.parametrize("scan", [True, False])
def test_a_layers_input_waits_on_the_host_and_nothing_else(scan):
    config = dataclasses.replace(CONFIG, scan_layers=scan, remat="offload")
    times = 1 if scan else CONFIG.num_layers
    assert moved(for_tpu(config)) == [*times * [("device", "2x7x16xf32")], *times * [("pinned_host", "2x7x16xf32")]]
    assert not moved(for_tpu(dataclasses.replace(config, remat="full")))


def temporary(remat, scan):
    config = dataclasses.replace(CONFIG, scan_layers=scan, remat=remat)
    variables = jax.eval_shape(Decoder(config).init, jax.random.key(0), TOKENS)
    ids = jnp.zeros((2, 1024), jnp.int32)
    step = jax.jit(jax.grad(lambda v: Decoder(config).apply(v, ids, method="hidden").sum())).lower(variables)
    return step.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.nightly
@pytest.mark.parametrize("scan", [True, False])
def test_where_the_host_is_the_device_offload_takes_what_full_takes(scan):
    assert temporary("offload", scan) == temporary("full", scan)


@pytest.mark.nightly
def test_offload_on_a_mesh_gives_what_full_gives():
    ways = ["data=2,fsdp=2,tensor=2 remat offload", "data=2,fsdp=2,tensor=2 remat full"]
    said = run_on(8, "tests.mesh_program", *ways, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    offload, full = json.loads(said.splitlines()[-1]).values()
    np.testing.assert_array_equal(offload["losses"], full["losses"])
    for path, want in full["adapters"].items():
        np.testing.assert_array_equal(offload["adapters"][path], want)


def test_an_unknown_name_is_refused_with_what_comes_close():
    for name, near in (
        ("ofload", "offload"),
        ("product", "products"),
        ("Full", "full"),
        ("dots_savable", "dots_saveable"),
    ):
        with pytest.raises(
            ValueError, match=f"remat='{name}' is unknown .did you mean '{near}'.*: use None, 'full' or"
        ):
            dataclasses.replace(CONFIG, remat=name)
    with pytest.raises(ValueError, match="remat='zzz' is unknown: use None"):
        dataclasses.replace(CONFIG, remat="zzz")
