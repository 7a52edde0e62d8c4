"""All formats: the numbers are those of independent references, and a base in each is as the one of the arrays."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rslora_jax as rslora
from rslora_jax.sites import from_paths, named_leaves
from rslora_jax.stored import NF4, Float8, Gguf, Stored, dense, float8, gguf, int8, nf4
from rslora_jax.stored.gguf import KINDS
from rslora_jax.stored.nf4 import LEVELS, NESTED_LEVELS
from tests.methods.gained import trained as moved
from tests.program_models import normal
from tests.reference import assert_near

pytestmark = [pytest.mark.usefixtures("compile_fast"), pytest.mark.by_day_on("oldest")]
AT_NIGHT = pytest.mark.nightly
F32 = np.float32


class Form(NamedTuple):
    """A format: what makes it of a weight (in, out), and its numbers by definition, in numpy."""

    make: Callable[[Any], Stored]
    numbers: Callable[[Stored], np.ndarray]


def of_nf4(stored: NF4) -> np.ndarray:
    """The rule of arXiv 2305.14314, on the flat weight with its blocks' axis last, in float32."""

    def last(array: Any) -> np.ndarray:
        return np.asarray(array if stored.is_flat else np.moveaxis(array, stored.axis, -1)).ravel()

    packed, absmax = last(stored.codes), last(stored.absmax)
    if stored.nested is not None:
        each = np.repeat(np.asarray(stored.nested), 256)[: absmax.size]
        absmax = NESTED_LEVELS[absmax] * each + np.asarray(stored.offset)
    codes = np.stack([packed >> 4, packed & 15], -1).ravel()
    flat = np.array(LEVELS, F32)[codes] * np.repeat(absmax, stored.block)
    others = [n for m, n in enumerate(stored.inner) if m != stored.axis]
    whole = flat[: math.prod(stored.inner)].reshape(*others, stored.inner[stored.axis])
    return np.moveaxis(whole, -1, stored.axis)


def of_scales(stored: Any) -> np.ndarray:
    codes = stored.numbers if isinstance(stored, Float8) else stored.codes
    return np.asarray(codes).astype(F32) * np.asarray(stored.scale)


def of_rows(stored: Gguf) -> np.ndarray:
    quants = pytest.importorskip("gguf.quants")
    from gguf import GGMLQuantizationType

    data = np.ascontiguousarray(np.moveaxis(np.asarray(stored.data), stored.axis, -1))
    if stored.which is not None:
        each = range(len(stored.which))
        return np.stack([of_rows(one_kind(stored, n)) for n in each])
    return np.moveaxis(quants.dequantize(data, GGMLQuantizationType[stored.kinds[0]]), -1, stored.axis)


def one_kind(stored: Gguf, n: int) -> Gguf:
    """An element of a stack whose elements are of several kinds."""
    name = stored.kinds[int(stored.which[n])]
    length = stored.inner[stored.axis] // KINDS[name].block * KINDS[name].bytes
    data = np.take(stored.data[n], range(length), stored.axis)
    return dataclasses.replace(stored, data=data, which=None, kinds=(name,))


def rows_of(w: Any, kind: str) -> np.ndarray:
    """Bytes that such rows may have: any, but for scales that are about as large as the weight."""
    block, size, _ = KINDS[kind]
    count = w.shape[0] // block
    rows = np.random.default_rng(w.size).integers(0, 256, (w.shape[1], count, size), np.uint8)
    at = {"Q6_K": [208], "Q4_0": [0], "Q5_0": [0], "Q8_0": [0]}.get(kind, [0, 2])
    most = np.asarray(np.abs(np.asarray(w, F32)).max() / 100).clip(1e-5, 600)
    for place in at:
        rows[:, :, place : place + 2] = np.float16(most).reshape(1).view(np.uint8)
    return rows.reshape(w.shape[1], -1)


def of_kind(kind: str, axis: int = 0) -> Callable[[Any], Gguf]:
    return lambda w: gguf(rows_of(w if axis == 0 else w.T, kind), kind, w.dtype, is_turned=axis == 0)


def mixed(w: Any) -> Gguf:
    """A stack of two, of two kinds."""
    kinds = ("Q4_0", "Q8_0")
    rows = [rows_of(w + n, kind) for n, kind in enumerate(kinds)]
    longest = max(len(row[0]) for row in rows)
    data = np.stack([np.pad(row, ((0, 0), (0, longest - len(row[0])))).T for row in rows])
    return Gguf(jnp.asarray(data), jnp.array([0, 1]), tuple(w.shape), jnp.dtype(w.dtype), 0, kinds)


FORMS = {
    "nf4": Form(nf4, of_nf4),
    "nf4 single": Form(functools.partial(nf4, double=False), of_nf4),
    "nf4 turned": Form(functools.partial(nf4, axis=1), of_nf4),
    "nf4 of 128": Form(functools.partial(nf4, block=128), of_nf4),
    "nf4 of 32": Form(functools.partial(nf4, block=32, double=False), of_nf4),
    "int8": Form(int8, of_scales),
    "int8 turned": Form(functools.partial(int8, axis=1), of_scales),
    "float8": Form(float8, of_scales),
    **{kind: Form(of_kind(kind), of_rows) for kind in KINDS},
    **{f"{kind} turned": Form(of_kind(kind, 1), of_rows) for kind in KINDS},
    "mixed": Form(mixed, of_rows),
}
BY_DAY = ("nf4", "int8", "float8", "Q4_K", "mixed")
each = pytest.mark.parametrize("name", [n if n in BY_DAY else pytest.param(n, marks=AT_NIGHT) for n in FORMS])
SHAPES = [
    (256, 6),
    (768, 4),
    (256, 256),
    (130, 3),
    (5, 7),
    (1, 9),
    (64, 65),
]  # the last few for blocks that are filled up


@st.composite
def weights(draw: Any, whole: bool, least: int = -35) -> np.ndarray:
    """Weights of all sizes: whole blocks of zeros, outliers, negative zeros, numbers of few bits."""
    shape = draw(st.sampled_from(SHAPES[:3] if whole else SHAPES))
    w = np.random.default_rng(draw(st.integers(0, 99))).standard_normal(shape)
    w *= 10.0 ** draw(st.integers(least, 30))
    what = draw(st.sampled_from(["as drawn", "zero rows", "an outlier", "negative zeros", "one number", "zero"]))
    if what == "zero rows":
        w[: len(w) // 2] = 0
    if what == "an outlier":
        w[0, -1] *= 1e6
    if what == "negative zeros":
        w[w < 0] = -0.0
    if what == "one number":
        w[:] = w[0, 0]
    if what == "zero":
        w *= -0.0
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    limit = 6e4 if dtype == "float16" else 3e38
    return np.clip(w, -limit, limit).astype(dtype if dtype != "bfloat16" else ml_dtypes.bfloat16)


compiled = jax.jit(dense)


@each
def test_its_numbers_are_those_of_its_definition_to_the_last_bit_op_by_op_and_compiled(name):
    form, whole = FORMS[name], not name.startswith(("nf4", "int8", "float8"))
    turned = name.endswith("turned") and whole

    @settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(weights(whole))
    def check(w: np.ndarray) -> None:
        stored = form.make(jnp.asarray(w.T if turned else w))
        with np.errstate(all="ignore"):
            want = form.numbers(stored).astype(w.dtype)
        assert stored.shape == want.shape and stored.dtype == w.dtype
        for got in (stored.dense(), compiled(stored)):
            np.testing.assert_array_equal(np.asarray(got), want)

    check()


@each
def test_every_number_gets_the_nearest_code(name):
    if not name.startswith(("nf4", "int8", "float8")):
        pytest.skip("made by others")
    form = FORMS[name]

    @settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(weights(False))
    def check(w: np.ndarray) -> None:
        wide = np.asarray(w, np.float64)
        axis = 1 if name.endswith("turned") else 0
        stored = form.make(jnp.asarray(w))
        if isinstance(stored, NF4):
            stored = dataclasses.replace(stored, dtype=jnp.dtype("float32"))
            flat = np.moveaxis(wide, axis, -1).ravel()
            blocks = np.pad(flat, (0, -flat.size % stored.block)).reshape(-1, stored.block)
            most = np.abs(blocks).max(-1, keepdims=True)
            packed = np.asarray(stored.codes if stored.is_flat else np.moveaxis(stored.codes, axis, -1)).ravel()
            codes = np.stack([packed >> 4, packed & 15], -1).reshape(blocks.shape)
            scaled = blocks / np.maximum(most, 1e-38)
            levels = np.array(LEVELS)
            best = np.abs(scaled[..., None] - levels).min(-1)
            assert (np.abs(scaled - levels[codes]) <= best + 1e-6).all()
            return
        scale = np.asarray(stored.scale, np.float64)
        most = np.abs(wide).max(axis, keepdims=True)
        step = 0.5 * scale if name.startswith("int8") else np.maximum(np.abs(wide) / 16, scale * 2**-10)
        is_normal = most > 1e-35
        codes = np.asarray(stored.numbers if name == "float8" else stored.codes).astype(np.float64)
        error = np.abs(wide - codes * scale)
        assert (error <= step * (1 + 1e-5) + 1e-38)[np.broadcast_to(is_normal, wide.shape)].all()
        np.testing.assert_allclose(
            scale[most > 0], most[most > 0] / (127 if name.startswith("int8") else 448), 1e-6, 1e-44
        )

    check()


@pytest.mark.reference
@pytest.mark.parametrize(
    ("block", "double"),
    [
        (64, True),
        *(pytest.param(b, d, marks=AT_NIGHT) for b, d in [(64, False), (128, True), (128, False), (256, True)]),
    ],
)
def test_codes_and_scales_are_those_of_bitsandbytes(block, double):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.set_num_threads(1)

    @settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(weights(False, -25), st.integers(0, 1))  # of smaller ones XLA takes differences of scales for 0
    def check(w: np.ndarray, axis: int) -> None:
        theirs = torch.from_numpy(np.ascontiguousarray(np.asarray(w, F32).T if axis == 0 else np.asarray(w, F32)))
        theirs = theirs.to({"float32": torch.float32, "float16": torch.float16}.get(str(w.dtype), torch.bfloat16))
        packed, state = functional.quantize_4bit(theirs, blocksize=block, compress_statistics=double, quant_type="nf4")
        ours = nf4(jnp.asarray(w), axis, block=block, double=double)

        def last(array: Any) -> np.ndarray:
            return np.asarray(array if ours.is_flat else np.moveaxis(array, axis, -1)).ravel()

        got = last(ours.codes)
        np.testing.assert_array_equal(got[: packed.numel()], packed.numpy().ravel())
        assert not (got[packed.numel() :] & 0x0F).any() or (got[packed.numel() :] == 0x77).all()
        if not double:
            np.testing.assert_allclose(last(ours.absmax), state.absmax.numpy(), 0, 2e-38)  # of no block but zeros
        else:
            offset = np.float32(state.offset)
            np.testing.assert_allclose(ours.offset, offset, 1e-6, 2e-38)  # of float32 sums, in an order of its own
            if np.asarray(ours.offset) == offset:  # a mean: what follows from it is then the same
                np.testing.assert_array_equal(last(ours.absmax), state.absmax.numpy())
                np.testing.assert_array_equal(np.asarray(ours.nested), state.state2.absmax.numpy())
        want = functional.dequantize_4bit(packed, state).to(torch.float32).numpy()
        if not double or np.asarray(ours.offset) == np.float32(state.offset):
            got = np.asarray(ours.dense(), F32)
            np.testing.assert_array_equal(got.T if axis == 0 else got, want)

    check()


CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"method": "dora"},
    "dropout": {"dropout": 0.3},
    "trained": {"trained": "head", "targets": ("table", "layers/*")},
    "ranks": {"rank_pattern": {"layers/{1}/q": 5, "head": 2}, "alpha_pattern": {"*/o": 11}},
}
LAWS = {
    "nf4": lambda w: nf4(w, -2, w.ndim - 2),
    "nf4 flat": lambda w: nf4(w, -2, w.ndim - 2, block=48),
    "nf4 rows": lambda w: nf4(w, -1, w.ndim - 2, double=False),
    "int8": lambda w: int8(w, -2, w.ndim - 2),
    "float8": lambda w: float8(w, -2, w.ndim - 2),
    "gguf": lambda w: of_stack(of_kind("Q8_0"), w),
    "gguf rows": lambda w: of_stack(of_kind("Q4_1", 1), w),
    "mixed": lambda w: mixed(w[0]) if w.ndim > 2 else of_kind("Q5_0")(w),
}


def of_stack(make: Callable[[Any], Stored], w: Any) -> Stored:
    if w.ndim == 2:
        return make(w)
    return jax.tree.map(lambda *parts: jnp.stack(parts), *(make(one) for one in w))


def model(p: Any, ids: Any) -> Any:
    """A tied table, a scan of layers with a fused and a turned use, and a head."""

    def layer(x: Any, w: Any) -> Any:
        q, k = jnp.split(x @ jnp.concatenate([w["q"], w["k"]], 1), 2, -1)
        return x + jnp.tanh(q * k) @ w["o"].T, None

    x, _ = jax.lax.scan(layer, p["table"][ids], p["layers"])
    return (x @ p["head"]) @ p["table"].T


@functools.cache
def bases(form: str) -> tuple[Any, Any, Any]:
    """A stored base, that of the arrays which it stands for, and an argument."""
    layers = {name: 0.1 * normal(n, 2, 64, 64) for n, name in enumerate("qko", 1)}
    params = {"table": normal(0, 96, 64), "layers": layers, "head": 0.1 * normal(7, 64, 64)}
    ids = jax.random.randint(jax.random.key(1), (2, 8), 0, 96)
    stored = {path: LAWS[form](w) for path, w in named_leaves(params).items()}
    plain = {path: w.dense() for path, w in stored.items()}
    return from_paths(params, stored), from_paths(params, plain), ids


def cases() -> list[Any]:
    by_day = {("nf4", "lora"), ("gguf", "dropout")}
    every = [(form, config) for form in LAWS for config in CONFIGS]
    return [case if case in by_day else pytest.param(*case, marks=AT_NIGHT) for case in every]


def made(form: str, config: str) -> tuple[rslora.Lora, Any]:
    stored, _, ids = bases(form)
    options = {"targets": "*", **CONFIGS[config]}
    lora = rslora.wrap(model, stored, ids, config=rslora.LoraConfig(rank=3, alpha=7, **options))
    return lora, lora.init(jax.random.key(0), stored)


def step(lora: rslora.Lora, ids: Any) -> Callable[..., Any]:
    key = jax.random.key(5) if lora.config.dropout else None

    def loss(adapters: Any, params: Any) -> Any:
        return jnp.mean(jnp.sin(lora.apply(params, adapters, ids, dropout_key=key)))

    return jax.value_and_grad(loss)


@pytest.mark.parametrize(("form", "config"), cases())
def test_a_base_in_it_is_as_that_of_the_arrays_and_op_by_op_to_the_last_bit(form, config):
    stored, plain, ids = bases(form)
    lora, fresh = made(form, config)
    assert not any(site.fallbacks for site in lora.sites.values())
    adapters = moved(fresh)
    with jax.disable_jit():
        chex.assert_trees_all_equal(step(lora, ids)(adapters, stored), step(lora, ids)(adapters, plain))
        if config == "ranks":
            chex.assert_trees_all_equal(lora.apply(stored, fresh, ids), model(plain, ids))
    act = jax.jit(step(lora, ids))
    assert_near(act(adapters, stored), act(adapters, plain), 1e-4, floor=1e-3)
    merged = lora.merge(stored, adapters)
    assert_near(named_leaves(merged), named_leaves(lora.merge(plain, adapters)), 1e-6)
    assert_near(model(merged, ids), lora.apply(stored, adapters, ids), 1e-4)


@pytest.mark.parametrize("form", ["nf4", *(pytest.param(n, marks=AT_NIGHT) for n in LAWS if n != "nf4")])
def test_no_gradient_or_copy_of_it_is_in_the_backward_pass(form):
    stored, _, ids = bases(form)
    lora, adapters = made(form, "lora")
    _, backward = jax.vjp(lambda adapters: lora.apply(stored, adapters, ids), adapters)
    shapes = {leaf.shape for leaf in jax.tree.leaves(backward) if leaf.dtype == jnp.float32}
    assert shapes and not shapes & {(2, 64, 64), (64, 64), (96, 64), (64, 96)}
