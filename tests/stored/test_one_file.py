"""A stored form is one file: one of a test's own, in 8 bits, gives what dense weights give, and is never kept dense."""

import dataclasses
import functools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import rslora_jax as rslora
from rslora_jax.parallel import sharding
from rslora_jax.sites import from_paths, named_leaves
from rslora_jax.store.checksum import checksums
from rslora_jax.stored import dense, float8, int8, nf4
from tests.program_models import normal
from tests.programs import CASES, each_at_night
from tests.reference import assert_near, trained
from tests.stored.eight_bits import EightBits, eight_bits

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]


def packed(params, form=eight_bits):
    """All weights of two axes or more in a form, and what they stand for."""

    def of(leaf):
        return leaf.ndim >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.finfo(leaf.dtype).bits >= 16

    stored = {path: form(leaf) if of(leaf) else leaf for path, leaf in named_leaves(params).items()}
    return from_paths(params, stored), from_paths(params, {path: dense(leaf) for path, leaf in stored.items()})


def wrapped(case, params):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rslora.RsloraWarning)
        config = rslora.LoraConfig(rank=6, alpha=10, targets=case.targets)
        return rslora.wrap(case.fn, params, *case.args, config=config)


def gradient(lora, case):
    def loss(a, p):
        return jnp.sum(jnp.sin(jax.tree.leaves(lora.apply(p, a, *case.args))[0].real.astype(jnp.float32)))

    return jax.grad(loss)


def rounded(name):
    """A format of the package, with blocks small enough for the programs' weights."""
    made = {"nf4": functools.partial(nf4, block=2), "nf4 flat": nf4, "int8": int8, "float8": float8}[name]
    return lambda w: made(w, -2, w.ndim - 2)


@pytest.mark.filterwarnings("ignore::rslora_jax.RsloraWarning")
@pytest.mark.parametrize("name", each_at_night())
def test_every_program_gives_what_it_gives_on_the_dense_weights(name):
    holds_on_the_dense_weights(name, eight_bits)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::rslora_jax.RsloraWarning")
@pytest.mark.parametrize("form", ["nf4", "nf4 flat", "int8", "float8"])
@pytest.mark.parametrize("name", CASES)
def test_so_it_does_in_the_formats_of_the_package(name, form):
    holds_on_the_dense_weights(name, rounded(form))


def holds_on_the_dense_weights(name, form):
    case = CASES[name]()
    stored, plain = packed(case.params, form)
    lora, other = wrapped(case, stored), wrapped(case, plain)
    by_kind = {path: dataclasses.replace(site, fallbacks=()) for path, site in lora.sites.items()}
    # Dense before its use only where a mesh cuts its own axes, which its arrays may lack, or stacks it there.
    own_axes = ("mapped shard_map_by_in", "arithmetic stacked_here")
    assert (by_kind if name in own_axes else lora.sites) == other.sites or name == "control scan_of_rows"
    assert lora.left_out == other.left_out and lora.unused == other.unused
    adapters = trained(lora)
    apply = jax.jit(lambda p, a: lora.apply(p, a, *case.args))
    assert_near(apply(stored, adapters), apply(plain, adapters), max(case.tolerance, 1e-5))
    if not name.startswith("control while"):  # of which JAX has no reverse mode
        step = jax.jit(gradient(lora, case))
        assert_near(step(adapters, stored), step(adapters, plain), 20 * max(case.tolerance, 1e-5), floor=1e-3)
    merged = lora.merge(stored, adapters)
    chex.assert_trees_all_close(
        {path: dense(leaf) for path, leaf in named_leaves(merged).items()},
        named_leaves(lora.merge(plain, adapters)),
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    "name",
    [
        "lookup tied",
        "stacked by_scan",
        "arithmetic fused",
        pytest.param("linen tied, every matrix", marks=pytest.mark.nightly),
    ],
)
def test_op_by_op_no_bit_differs(name):
    case = CASES[name]()
    stored, plain = packed(case.params)
    lora = wrapped(case, stored)
    adapters = trained(lora)
    with jax.disable_jit():
        chex.assert_trees_all_equal(*(gradient(lora, case)(adapters, params) for params in (stored, plain)))


def llama_like(p, ids):
    """A tied table, a scan of layers, a cast, a transposed and a fused use, and weights without adapters."""
    x = p["table"][ids].astype(jnp.bfloat16)

    def layer(x, w):
        q, k = jnp.split(x @ jnp.concatenate([w["q"], w["k"]], 1).astype(jnp.bfloat16), 2, -1)
        x = x + jnp.tanh(q * k) @ w["o"].T.astype(jnp.bfloat16)
        return x, None

    x, _ = lax.scan(layer, x, p["layers"])
    return (x.astype(jnp.float32) @ p["head"]) @ p["table"].T


def llama_case(width=64, layers=3, vocab=96):
    params = {
        "table": normal(0, vocab, width),
        "layers": {name: normal(n, layers, width, width) for n, name in enumerate("qko", 1)},
        "head": normal(7, width, width),
    }
    return params, jax.random.randint(jax.random.key(1), (2, 8), 0, vocab)


def test_nothing_falls_back_and_nothing_dense_is_kept_for_the_backward_pass():
    width, layers = 256, 6
    params, ids = llama_case(width, layers)
    stored, plain = packed(params)
    config = rslora.LoraConfig(rank=3, alpha=10, targets="*", exclude="head")
    lora = rslora.wrap(llama_like, stored, ids, config=config)
    assert not any(site.fallbacks for site in lora.sites.values()) and len(lora.sites) == 4
    adapters = trained(lora)

    def temporary(params):
        step = jax.jit(jax.grad(lambda a, p: jnp.sum(lora.apply(p, a, ids) ** 2)))
        return step.lower(adapters, params).compile().memory_analysis().temp_size_in_bytes

    one = 4 * width * width
    # A layer's dense weights at a time: q and k, and these beside each other, o. Of arrays, all layers' casts wait.
    assert temporary(stored) < 9 * one < 14 * one < temporary(plain)


@pytest.mark.parametrize("targets", ["*", "w"])  # of both, or of one, with the other as it is
@pytest.mark.parametrize("rows", [3, 40])  # factored, and through the weight
def test_no_array_of_a_weights_shape_waits_for_the_backward_pass(rows, targets):
    stored, _ = packed({"w": normal(0, 9, 7), "v": normal(1, 7, 11)})
    x, fn = normal(2, rows, 9), lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"].T.T
    config = rslora.LoraConfig(rank=2, alpha=10, targets=targets)
    lora = rslora.wrap(fn, stored, x, config=config)
    _, backward = jax.vjp(lambda adapters: lora.apply(stored, adapters, x), trained(lora))
    kept = [leaf for leaf in jax.tree.leaves(backward) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert kept and not {leaf.shape for leaf in kept} & {(9, 7), (7, 11), (11, 7)}


@pytest.mark.parametrize("rank", [2, 7])  # factored, and through the weight
def test_a_gradient_by_its_own_arrays_is_that_of_the_dense_weight(rank):
    stored, x = packed({"w": normal(0, 9, 7)})[0]["w"], normal(1, 40, 9)
    lora = rslora.wrap(lambda p, x: x @ p["w"], {"w": stored}, x, config=rslora.LoraConfig(rank=rank, alpha=10))
    adapters, gamma = trained(lora), lora.sites["w"].gamma
    a, b = adapters["w"]["a"], adapters["w"]["b"]

    def adapted(scale):
        return jnp.sum(jnp.sin(lora.apply({"w": dataclasses.replace(stored, scale=scale)}, adapters, x)))

    def plain(scale):
        return jnp.sum(jnp.sin(x @ (stored.codes * scale + gamma * a @ b)))

    got, want = jax.grad(adapted)(stored.scale), jax.grad(plain)(stored.scale)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_it_is_one_leaf_wherever_the_base_is_gone_over():
    params, ids = llama_case()
    stored, plain = packed(params)
    assert named_leaves(stored).keys() == named_leaves(plain).keys()
    sums = checksums(stored)
    assert sums["head"].startswith("EightBits of float32[64,64] ") and sums.keys() == named_leaves(plain).keys()
    other = stored | {"head": EightBits(stored["head"].codes, 2 * stored["head"].scale, stored["head"].dtype)}
    assert checksums(other)["head"] != sums["head"] and checksums(other)["table"] == sums["table"]
    mesh = sharding.make_mesh("fsdp=-1")
    where = sharding.param_shardings(stored, mesh, [("layers/*", ("fsdp", None))])
    assert isinstance(jax.device_put(stored, where)["layers"]["q"], EightBits)
    lora = rslora.wrap(llama_like, jax.eval_shape(lambda: stored), ids, config=rslora.LoraConfig(rank=3, alpha=10))
    assert lora.shapes["layers/q"] == (3, 64, 64)
