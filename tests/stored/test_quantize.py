"""`rslora.quantize`: what is put into fewer bits of any pytree, what it costs, and what is refused."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import rslora_jax as rslora
from rslora_jax.sites import named_leaves
from rslora_jax.stored import NF4, Float8, Int8, dense, float8, int8, is_stored, nf4
from rslora_jax.stored.kept import kept_dense
from rslora_jax.stored.quantize import measured
from rslora_jax.stored.rounding import FORMATS, rounding
from tests.devices import run_on
from tests.program_models import normal
from tests.reference import assert_near

pytestmark = [pytest.mark.usefixtures("compile_fast"), pytest.mark.by_day_on("newest")]
AT_NIGHT = pytest.mark.nightly
ONE_BY_DAY = ["nf4", *(pytest.param(name, marks=AT_NIGHT) for name in ("int8", "float8"))]
KINDS = {"nf4": NF4, "int8": Int8, "float8": Float8}
ROUND = {"nf4": nf4, "int8": int8, "float8": float8}


def model() -> dict[str, Any]:
    return {
        "embed": {"embedding": normal(0, 20, 64)},
        "layers": {"q": {"kernel": normal(1, 3, 64, 32), "bias": normal(2, 3, 32)}, "attn_norm": normal(3, 3, 64)},
        "mlp": {"kernel": normal(4, 96, 33).astype(jnp.bfloat16)},
        "lm_head": {"kernel": normal(5, 64, 20)},
        "step": jnp.arange(4),
    }


CHOSEN = {"layers/q/kernel": 1, "mlp/kernel": 0}  # and how many axes their stacks have


@pytest.mark.parametrize("format", FORMATS)
def test_layers_are_rounded_each_for_itself_and_the_error_is_that_of_float64(format):
    params, plain = model(), named_leaves(model())
    small, made = rslora.quantize(params, format)
    leaves = named_leaves(small)
    assert {path for path, leaf in leaves.items() if is_stored(leaf)} == CHOSEN.keys() == made.weights.keys()
    for path, depth in CHOSEN.items():
        leaf, whole = leaves[path], plain[path]
        assert isinstance(leaf, KINDS[format]) and leaf.stack == whole.shape[:depth] and leaf.dtype == whole.dtype
        one_by_one = [ROUND[format](w).dense() for w in whole] if depth else ROUND[format](whole).dense()
        np.testing.assert_array_equal(dense(leaf), jnp.asarray(one_by_one))
        wide = [np.asarray(of, np.float64) for of in (dense(leaf), whole)]
        error = np.linalg.norm(wide[0] - wide[1]) / np.linalg.norm(wide[1])
        found = made.weights[path]
        assert found.error == pytest.approx(error, rel=1e-5) and found.before == whole.nbytes
        assert found.after == leaf.nbytes and found.bits == pytest.approx(8 * leaf.nbytes / whole.size)
    assert made.kept_bytes == sum(of.nbytes for path, of in plain.items() if path not in CHOSEN)
    assert all(leaf is plain_leaf for leaf, plain_leaf in [(small["step"], params["step"])])
    assert "layers/q/kernel" in str(made) and "2 weights" in str(made) and "5 stay" in str(made)


@pytest.mark.parametrize("format", ONE_BY_DAY)
def test_the_program_is_that_of_the_dense_weights_and_trains(format):
    params, x = {"up": normal(0, 64, 96), "down": normal(1, 96, 64)}, normal(2, 8, 64)

    def fn(p, x):
        return jnp.tanh(x @ p["up"]) @ p["down"]

    small, _ = rslora.quantize(params, format)
    lora = rslora.wrap(fn, small, x, config=rslora.LoraConfig(rank=3, alpha=7))
    adapters = lora.init(jax.random.key(0))
    assert_near(lora.apply(small, adapters, x), fn({name: dense(w) for name, w in small.items()}, x), 1e-6)


NAMES = {
    "": "layers_0/mlp/up_proj/kernel h/3/MultiHeadDotProductAttention_0/query/kernel blocks/attn/head_dim_proj w 0/1",
    "table": "params/embed_tokens/embedding wte model/tok_embeddings/weight Embed_0/embedding embedder/input_embedding",
    "position table": "wpe pos_emb/w encoder/position_ids/kernel",
    "head": "lm_head/kernel params/cls_head/w logits/kernel score/classifier/kernel head/weight",
    "norm or bias": "input_layernorm/weight RMSNorm_0/w ln_1/g layers/attn/q_norm/w attn/relative_attention_bias/w",
    "router": "moe/router/kernel",
}


@pytest.mark.parametrize(("why", "paths"), NAMES.items())
def test_names_tell_what_stays(why, paths):
    assert {path: kept_dense(path, (3, 64, 64)) for path in paths.split()} == dict.fromkeys(paths.split(), why)
    assert all(kept_dense(path, shape) == "norm or bias" for path in paths.split() for shape in ((), (9,), (1, 9)))


def test_patterns_name_tables_and_heads_and_leave_norms_among_others():
    def paths(**options):
        return set(rslora.quantize(model(), "int8", **options)[1].weights)

    head, table = "lm_head/kernel", "embed/embedding"
    assert paths(targets=("all-linear", "lm_head/*")) == {*CHOSEN, head}
    assert paths(targets="*") == {*CHOSEN, head, table}
    assert paths(targets="layers/*") == {"layers/q/kernel"} == paths(exclude="{mlp,lm_head}/*")
    small, made = rslora.quantize(model(), "int8", targets=table)
    assert small["embed"]["embedding"].scale.shape == (20, 1)  # one for each row, as it is looked up
    assert made.kept["mlp/kernel"] == "no target names it"


def test_sites_tell_axes_that_the_shape_does_not():
    params = {
        "q": normal(0, 64, 4, 16),
        "out": normal(1, 2, 64, 8),
        "turned": normal(2, 48, 64),
        "table": normal(3, 10, 64),
        "middle": normal(4, 64, 3, 64),
    }

    def fn(p, ids):
        x = p["table"][ids]
        x = jnp.einsum("thd,hdo->to", jnp.einsum("ti,ihd->thd", x, p["q"])[:, :2].repeat(4, -1), p["out"])
        x = jnp.concatenate([x] * 8, -1) @ p["turned"].T
        x = jnp.pad(x, ((0, 0), (0, 16)))
        return jax.lax.scan(lambda x, w: (x @ w, None), x, jnp.moveaxis(p["middle"], 1, 0))[0]

    lora = rslora.wrap(fn, params, jnp.arange(3), config=rslora.LoraConfig(rank=2, alpha=7, targets="*"))
    small, made = rslora.quantize(params, "int8", lora=lora)
    assert made.kept == {"table": "table"}
    scales = {name: small[name].scale.shape for name in made.weights}
    assert scales == {"q": (1, 4, 16), "out": (1, 1, 8), "turned": (48, 1), "middle": (1, 3, 64)}
    for name, axes in {"q": 0, "out": (0, 1), "turned": 1, "middle": 0}.items():
        w = np.asarray(params[name])
        scale = np.abs(w).max(axes, keepdims=True) / np.float32(127)
        np.testing.assert_array_equal(dense(small[name]), np.round(w / scale) * scale)
    small, _ = rslora.quantize(params, "nf4", lora=lora, targets=("all-linear", "table"))
    assert {name: (w.axis, w.is_flat) for name, w in small.items()} == {
        "q": (0, False), "out": (1, False), "turned": (1, False), "table": (1, False), "middle": (0, False)
    }  # fmt: skip
    assert not small["q"].stack and not small["out"].stack


@pytest.mark.parametrize(
    ("shape", "double"),
    [((65, 3), True), ((2, 1, 9), False)]
    + [pytest.param(s, d, marks=AT_NIGHT) for s in [(5, 7), (2, 3, 70, 5)] for d in (True, False)],
)
def test_a_block_size_that_does_not_divide_is_filled_up_and_nothing_cut(shape, double):
    w = normal(0, *shape)
    stored = rslora.quantize({"w": w}, "nf4", block=32, double=double)[0]["w"]
    assert stored.is_flat and stored.shape == shape and (stored.nested is not None) == double
    assert float(jnp.abs(dense(stored) - w).max()) < 0.16 * float(jnp.abs(w).max()) + 0.05


WRONG = {
    "the format 'nf5' is not known: did you mean nf4": dict(format="nf5"),
    "the format 'mxfp' is not known: use nf4, int8, float8": dict(format="mxfp"),
    "int8 has one scale for each out channel": dict(format="int8", block=64),
    "block=63 is no size of blocks": dict(block=63),
    "block=0 is no size of blocks": dict(block=0),
    "block=True is no size of blocks": dict(block=True),
    "target '\\*/kernal' matches no weight: did you mean mlp/kernel, lm_head/kernel, layers/q/kernel": dict(
        targets="*/kernal"
    ),
    "exclude 'mlp/kernle' matches no parameter: did you mean mlp/kernel": dict(exclude="mlp/kernle"),
    "target 'layers/attn_norm' matches layers/attn_norm, which stays as it is: norm or bias": dict(
        targets="layers/attn_norm"
    ),
    "target 'step' matches step, which stays as it is: no floating numbers": dict(targets="step"),
    "nothing is left to quantise": dict(exclude="*"),
}


@pytest.mark.parametrize(("says", "options"), WRONG.items())
def test_what_cannot_be_done_is_said(says, options):
    with pytest.raises(ValueError, match=says):
        rslora.quantize(model(), **options)


@pytest.mark.parametrize("format", ONE_BY_DAY)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named(format, value):
    with pytest.raises(ValueError, match=r"^w/1 is not finite everywhere"):
        rslora.quantize({"w": [normal(0, 64, 8), normal(1, 2, 64, 8).at[1, 3, 2].set(value)]}, format)


def test_what_is_stored_already_is_refused_by_name():
    small, _ = rslora.quantize(model(), "nf4", targets="mlp/*")
    with pytest.raises(ValueError, match=r"^mlp/kernel is stored as NF4 already"):
        rslora.quantize(small, "int8")
    both, _ = rslora.quantize(small, "int8", exclude="mlp/*")
    assert isinstance(both["mlp"]["kernel"], NF4) and isinstance(both["layers"]["q"]["kernel"], Int8)


def test_boxes_of_linen_and_variables_of_nnx_keep_their_place():
    box = nn.Partitioned(normal(0, 64, 8), names=("rows", None))
    state = nnx.state(nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
    small, made = rslora.quantize({"linen": {"kernel": box}, "nnx": state}, "nf4")
    assert set(made.weights) == {"linen/kernel", "nnx/kernel"}
    assert isinstance(small["linen"]["kernel"], nn.Partitioned) and isinstance(small["linen"]["kernel"].value, NF4)
    assert isinstance(small["nnx"]["kernel"], nnx.Param) and is_stored(named_leaves(small)["nnx/kernel"])


def test_of_shapes_and_under_jit_it_is_the_same_without_an_error():
    params = model()
    small, _ = rslora.quantize(params)
    shapes, made = rslora.quantize(jax.eval_shape(lambda: params))
    assert jax.tree.structure(shapes) == jax.tree.structure(small)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(shapes)] == [(a.shape, a.dtype) for a in jax.tree.leaves(small)]
    assert made.weights["mlp/kernel"].error is None and made.weights["mlp/kernel"].bits < 5
    assert " - " in str(made)
    compiled = jax.jit(lambda p: rslora.quantize(p)[0])(params)
    for one, other in zip(jax.tree.leaves(compiled), jax.tree.leaves(small), strict=True):
        np.testing.assert_array_equal(one, other)


def test_dense_weights_go_one_by_one_where_they_may():
    params = model() | {"again": {"kernel": normal(9, 64, 64)}}
    params["tied"] = params["again"]
    kept = dict(named_leaves(params))
    rslora.quantize(params, "int8", donate=True)
    gone = {path for path, leaf in kept.items() if leaf.is_deleted()}
    assert gone == CHOSEN.keys()  # what is in two places is not taken from either


def test_no_more_than_an_element_of_a_stack_is_dense_beside_the_result():
    for format in FORMATS:
        w = jax.ShapeDtypeStruct((16, 256, 256), "float32")
        made = functools.partial(measured, how=rounding(format), axes=(0,), depth=1, split=(False,))
        used = jax.jit(made).lower(w).compile().memory_analysis().temp_size_in_bytes
        assert used < 8 * 4 * 256 * 256, (format, used)


@AT_NIGHT
def test_on_a_mesh_weights_stay_where_they_lie():
    said = run_on(4, "tests.stored.mesh_program", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    assert "all held on 4 devices" in said
