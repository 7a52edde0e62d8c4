"""What a compiled step holds: its activations and at most two dense layers, and of a table the rows that it reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rslora_jax as rslora
from rslora_jax.models.decoder import Decoder, DecoderConfig
from rslora_jax.sites import from_paths, named_leaves
from rslora_jax.stored import dense
from tests.reference import trained
from tests.stored.packed import FORMS, packed

WIDTH, MLP, LAYERS, VOCAB = 256, 768, 6, 512
LAYER = 3 * WIDTH * WIDTH + 3 * WIDTH * MLP  # the numbers of a layer's matrices
TOKENS = jax.ShapeDtypeStruct((2, 16), "int32")
NIGHT = pytest.mark.nightly


def shapes(form, base, dtype):
    """Return the shapes of a base in a format; nothing is computed."""

    def one(path, w):
        whole = jax.ShapeDtypeStruct(w.shape, dtype)
        return whole if form == "dense" else jax.eval_shape(lambda: packed(form, path, jnp.zeros(w.shape, dtype)))

    return from_paths(base, {path: one(path, w) for path, w in named_leaves(base).items()})


def temporary(form, dtype="float32", held="float32", scan=True, remat=None, **config):
    """Return the bytes that the gradient of a small decoder takes beside its arguments and results."""
    decoder = Decoder(
        DecoderConfig(
            **dict(vocab_size=VOCAB, width=WIDTH, mlp_width=MLP, num_layers=LAYERS, num_heads=4, num_kv_heads=2),
            **dict(scan_layers=scan, remat=remat, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(held)),
        )
    )
    params = shapes(form, jax.eval_shape(decoder.init, jax.random.key(0), TOKENS), held)
    lora = rslora.wrap(decoder.apply, params, TOKENS, config=rslora.LoraConfig(**{"rank": 6, "alpha": 10} | config))
    key = {"dropout_key": jax.random.key(0)} if config.get("dropout") else {}

    def loss(adapters, params, tokens):
        return jnp.sum(jnp.sin(lora.apply(params, adapters, tokens, **key)))

    step = jax.jit(jax.value_and_grad(loss)).lower(lora.adapter_shapes, params, TOKENS)
    return step.compile().memory_analysis().temp_size_in_bytes


CASES = {
    "scanned": dict(),
    "one by one": dict(scan=False),
    "scanned, remat": dict(remat="full"),
    "one by one, remat": dict(scan=False, remat="full"),
    "bfloat16": dict(dtype="bfloat16", held="bfloat16"),
    "bfloat16 one by one": dict(dtype="bfloat16", held="bfloat16", scan=False),
    "cast at its use": dict(dtype="bfloat16"),
    "through the weight": dict(rank=200, remat="full"),
    "through the weight, one by one": dict(rank=200, scan=False),
    "DoRA": dict(method="dora"),
    "DoRA, one by one": dict(method="dora", scan=False),
    "dropout": dict(dropout=0.1),
}
FORMATS = ("nf4", "int8", "float8", "Q4_1", "Q4_K")


@pytest.mark.nightly
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_a_step_holds_two_dense_layers_at_most_beside_its_activations(case, form):
    how = CASES[case]
    of_arrays = temporary("dense", **how | {"held": how.get("dtype", "float32")})  # weights that need no cast
    limit = 2 * LAYER * jnp.dtype(how.get("held", "float32")).itemsize
    assert temporary(form, **how) - of_arrays <= limit


def scanned(p, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["kernel"])[0]


def one_by_one(p, x):
    for n in range(6):
        x = jnp.tanh(x @ p["kernel"][n])
    return x


@pytest.mark.parametrize("fn", [scanned, one_by_one])
@pytest.mark.parametrize("form", [pytest.param(f, marks=() if f in ("nf4", "Q4_1") else NIGHT) for f in FORMATS])
def test_two_of_six_layers_are_dense_at_once_at_most(form, fn):
    params = jax.eval_shape(lambda: {"kernel": packed(form, "kernel", jnp.zeros((6, 256, 256)))})
    x = jax.ShapeDtypeStruct((8, 256), "float32")
    lora = rslora.wrap(fn, params, x, config=rslora.LoraConfig(rank=3, alpha=7))
    step = jax.jit(jax.value_and_grad(lambda a, p, x: jnp.sum(lora.apply(p, a, x) ** 2)))
    used = step.lower(lora.adapter_shapes, params, x).compile().memory_analysis().temp_size_in_bytes
    # And some activations; of layers taken out of a stack one by one, XLA on CPUs copies the packed arrays too.
    copies = 2 * params["kernel"].nbytes if fn is one_by_one else 0
    assert used < 2 * 4 * 256 * 256 + 200_000 + copies


def looked_up(p, at):
    filled = p["table"].at[at].get(mode="fill", fill_value=3.0)
    clipped = p["table"].at[at].get(mode="clip")
    return jnp.take(p["table"], at, axis=0), p["table"][at], filled, clipped, p["table"][at[0, 1]] @ p["out"]


@pytest.mark.parametrize("targets", ["table", "out"])
@pytest.mark.parametrize("form", [pytest.param(f, marks=() if f in ("nf4", "Q8_0", "int8") else NIGHT) for f in FORMS])
def test_of_a_table_the_rows_that_are_read_become_dense(form, targets):
    rng = np.random.default_rng(0)
    params = {
        "table": packed(form, "embedding", jnp.asarray(rng.standard_normal((4096, 256)), jnp.float32)),
        "out": jnp.ones((256, 8)),
    }
    at = jnp.array([[0, 5, 4095], [7, 5000, -1]])
    lora = rslora.wrap(looked_up, params, at, config=rslora.LoraConfig(rank=3, alpha=7, targets=targets))
    adapters = trained(lora)
    step = jax.jit(lora.apply).lower(params, adapters, at).compile()
    assert step.memory_analysis().temp_size_in_bytes < 4096 * 256 / 4
    table = np.asarray(dense(params["table"]))
    if targets == "table":
        table = table + lora.sites["table"].gamma * np.asarray(adapters["table"]["a"]) @ np.asarray(
            adapters["table"]["b"]
        )
    out = np.asarray(lora.merge(params, adapters)["out"])
    kept = np.where((at < 0) & (at >= -4096), at + 4096, at)
    nan = np.where((kept < 4096)[..., None], table[np.minimum(kept, 4095)], np.nan)
    want = (
        nan,
        table[np.clip(kept, 0, 4095)],
        np.where(np.isnan(nan), 3.0, nan),
        table[np.clip(kept, 0, 4095)],
        table[5] @ out,
    )
    for got, wanted in zip(step(params, adapters, at), want, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
