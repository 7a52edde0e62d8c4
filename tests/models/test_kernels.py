"""Attention by kernels: in rows that are in order it is attention, in others NaN, and what a kernel cannot do is said.

There is no accelerator here. Splash attention runs in Pallas's interpreter; programs for GPUs and TPUs are lowered.
"""

import functools
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rslora_jax.commands import train_flags
from rslora_jax.commands.devices import check_attention
from rslora_jax.models import attention, kernels
from rslora_jax.models.attention import attend
from rslora_jax.models.decoder import Decoder, DecoderConfig, init_cache
from rslora_jax.models.decoder_config import ATTENTION
from rslora_jax.models.places import Places, seen
from rslora_jax.train.batches import heldout_batches, prepare
from rslora_jax.train.bytelevel import ByteTokenizer
from rslora_jax.train.examples import Example
from rslora_jax.train.loss import states
from tests.devices import run_on

pytestmark = pytest.mark.by_day_on("newest")


@pytest.fixture
def interpreted(monkeypatch):
    made = functools.partial(kernels.splash_kernel, interpret=True)
    monkeypatch.setattr(kernels, "splash_kernel", made)


def arrays(tokens, heads=4, kv_heads=2, size=16, rows=2, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(tokens), 4)
    counts = (heads, kv_heads, kv_heads, heads)
    return [jax.random.normal(key, (rows, tokens, n, size), dtype) for key, n in zip(keys, counts, strict=True)]


def places(kind, tokens, rows=2):
    """Rows in order: padding before and behind, documents side by side."""
    positions, segments = np.tile(np.arange(tokens), (rows, 1)), None
    if kind == "packed":
        segments = np.stack([np.arange(tokens) // 77, np.arange(tokens) // 130 + 4])
        positions = np.stack([np.arange(tokens) % 77, np.arange(tokens) % 130])
        positions[0, -9:], segments[0, -9:] = -1, 0
    if kind == "padded":
        positions = positions - [[30], [0]]
        positions[1, -40:] = -1
    segments = None if segments is None else jnp.asarray(segments, jnp.int32)
    return Places(jnp.asarray(positions, jnp.int32), segments, is_plain=kind == "plain")


def value_and_gradients(how, given, at, window=None, windowed=None, cap=None):
    *qkv, dout = given

    def of(q, k, v):
        out = attend(q, at, [(k, v, at)], window, windowed=windowed, size=11.0, cap=cap, how=how)
        return jnp.vdot(out.astype(jnp.float32), dout.astype(jnp.float32)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(of, (0, 1, 2), has_aux=True))(*qkv)
    return out, *gradients


CASES = {
    "packed": dict(kind="packed", tokens=200),
    "padded window": dict(kind="padded", tokens=128, window=40),
    "cap": dict(kind="packed", tokens=130, cap=2.0),
    "window here": dict(kind="packed", tokens=200, window=30, windowed=True),
    "window elsewhere": dict(kind="padded", tokens=200, window=30, windowed=False),
    "plain": dict(kind="plain", tokens=200),
    "plain window": dict(kind="plain", tokens=200, window=30, windowed=True),
    "large blocks": dict(kind="packed", tokens=1024),
}


@pytest.mark.parametrize(
    "name", [name if name == "packed" else pytest.param(name, marks=pytest.mark.nightly) for name in CASES]
)
def test_splash_attention_is_attention(interpreted, name):
    case = dict(CASES[name])
    at, given_arrays = places(case.pop("kind"), case["tokens"]), arrays(case.pop("tokens"))
    if "windowed" in case:
        case["windowed"] = jnp.asarray(case["windowed"])
    got, want = (value_and_gradients(how, given_arrays, at, **case) for how in ("pallas", "xla"))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6 * float(jnp.abs(other).max()) + 2e-6)


@pytest.mark.nightly
def test_in_bfloat16_splash_attention_is_as_near_as_all_scores_are(interpreted):
    at, given_arrays = places("packed", 256), arrays(256)
    exact = value_and_gradients("xla", given_arrays, at)
    rounded = [a.astype(jnp.bfloat16) for a in given_arrays]
    for got, want in zip(value_and_gradients("pallas", rounded, at), exact, strict=True):
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.03 * float(jnp.abs(want).max()))


@st.composite
def rows(draw):
    """Rows of any order: positions and segments of small numbers, and often such as are in order."""
    tokens = draw(st.integers(1, 7))
    if draw(st.booleans()):
        numbers = st.lists(st.integers(-1, 3), min_size=tokens, max_size=tokens)
        return np.array(draw(numbers)), np.array(draw(numbers)) if draw(st.booleans()) else None
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    before, step = draw(st.integers(0, 2)), draw(st.integers(1, 2))
    positions = [-1] * before + [step * n for length in lengths for n in range(length)] + [-1]
    segments = (
        [7] * before + [3 * n for n, length in enumerate(lengths) for _ in range(length)] + [draw(st.integers(0, 9))]
    )
    return np.array(positions), np.array(segments)


@pytest.mark.parametrize("examples", [60, pytest.param(1000, marks=pytest.mark.nightly)])
def test_in_rows_that_are_in_order_a_kernel_sees_what_is_seen(examples):
    settings(max_examples=examples, deadline=None, derandomize=True)(
        given(rows(), st.none() | st.integers(1, 4))(sees)
    )()


def sees(row, window):
    positions, segments = row
    at = Places(jnp.asarray(positions)[None], None if segments is None else jnp.asarray(segments)[None])
    if not kernels.in_order(at, window)[0]:
        return
    n = np.arange(len(positions))
    by_place = (n[None] <= n[:, None]) & (window is None or n[None] > n[:, None] - window)
    ids = np.where(positions >= 0, 0 if segments is None else segments, -99)
    in_kernel = by_place & (ids[:, None] == ids[None])
    is_token = positions >= 0
    np.testing.assert_array_equal(in_kernel[is_token], np.asarray(seen(at, at, window)[0])[is_token])


@pytest.mark.parametrize("packed", [True, False])
def test_rows_of_a_batch_reach_a_decoder_in_order(packed):
    lines = [Example("1+1=", "2" * n) for n in (1, 9, 30, 4, 4, 17)]
    rows = prepare(ByteTokenizer(), lines, max_len=40, packed=packed)
    (batch,) = heldout_batches(rows, batch_size=7)
    assert (batch.segment_ids_BxT == 0).any() and (batch.segment_ids_BxT.max() > 1) == packed
    given = {}

    def run(tokens, positions, segments, method):
        given.update(at=Places(positions, jnp.asarray(segments)))
        return jnp.zeros((*tokens.shape, 4))

    as_it_is = Places(jnp.asarray(batch.positions_BxT), jnp.asarray(batch.segment_ids_BxT))
    assert not kernels.in_order(as_it_is, window=None).all()
    states(run, batch)
    assert kernels.in_order(given["at"], window=None).all() and kernels.in_order(given["at"], window=5).all()
    np.testing.assert_array_equal(
        given["at"].positions[batch.segment_ids_BxT > 0], batch.positions_BxT[batch.segment_ids_BxT > 0]
    )


def test_padding_may_be_on_either_side():
    for kind in ("plain", "padded", "packed"):
        assert kernels.in_order(places(kind, 300), window=None).all()
        assert kernels.in_order(places(kind, 300), window=20).all()


@pytest.mark.nightly
def test_a_row_out_of_order_is_nan_and_the_others_are_not(interpreted):
    at = places("plain", 128)
    at = Places(at.positions.at[0].set(at.positions[0][::-1]))
    out = value_and_gradients("pallas", arrays(128), at)[0]
    assert jnp.isnan(out[0]).all() and jnp.isfinite(out[1]).all()


def on(monkeypatch, platform, kind="", count=1):
    device = types.SimpleNamespace(platform=platform, device_kind=kind)
    monkeypatch.setattr(kernels, "get_default_device", lambda: device)
    monkeypatch.setattr(jax, "device_count", lambda: count)


def form(how, tokens=512, dtype="bfloat16", size=64, cap=None, blocks=1, plain=False):
    q, at = jax.ShapeDtypeStruct((1, tokens, 4, size), dtype), places("plain", tokens, rows=1)
    at = Places(at.positions, is_plain=plain)
    return attention.form_of(how, q, blocks * tokens, at, [(q, q, at)] * blocks, False, cap)


CHOICES = [
    (("tpu", ""), {}, "pallas"),
    (("tpu", ""), dict(cap=5.0, size=80, dtype="float32", tokens=9000), "pallas"),
    (("tpu", ""), dict(blocks=2), "xla"),
    (("tpu", ""), dict(tokens=16), "xla"),
    (("tpu", "", 8), {}, "xla"),  # with no mesh in context
    (("gpu", "NVIDIA H100"), {}, "cudnn"),
    (("gpu", "NVIDIA H100"), dict(dtype="float32"), "xla"),
    (("gpu", "NVIDIA H100"), dict(dtype="float32", tokens=4096), "chunked"),
    (("gpu", "NVIDIA H100"), dict(tokens=8192), "chunked"),
    (("gpu", "NVIDIA H100"), dict(tokens=8192, plain=True), "cudnn"),
    (("gpu", "NVIDIA H100"), dict(size=256), "xla"),
    (("gpu", "NVIDIA H100"), dict(cap=5.0), "xla"),
    (("gpu", "AMD Instinct"), {}, "xla"),
    (("cpu", "cpu"), {}, "chunked"),
]


@pytest.mark.parametrize(("where", "case", "want"), CHOICES)
def test_the_best_form_is_chosen_by_platform_dtype_and_shape(monkeypatch, where, case, want):
    on(monkeypatch, *where)
    monkeypatch.setattr(jax, "default_backend", lambda: where[0])
    assert form("auto", **case) == want


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_no_choice_holds_all_scores_of_more_than_4096_tokens(monkeypatch, platform):
    on(monkeypatch, platform, "NVIDIA")
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    for dtype in ("float32", "bfloat16"):
        for size, cap, blocks in ((64, None, 1), (256, 5.0, 1), (64, None, 2)):
            assert form("auto", 4097, dtype, size, cap, blocks) != "xla"


@pytest.mark.parametrize(
    ("how", "case", "why"),
    [
        ("cudnn", dict(dtype="float32"), "takes bfloat16 and float16, not float32"),
        ("cudnn", dict(size=200), "heads of at most 128"),
        ("cudnn", dict(cap=2.0), "has no cap"),
        ("cudnn", dict(tokens=4097), "at most 4096, and there are 4097"),
        ("pallas", dict(blocks=2), "without a cache"),
    ],
)
def test_what_a_kernel_cannot_do_is_said_and_done_in_chunks(how, case, why):
    with pytest.warns(UserWarning, match=why):
        assert form(how, **case) == "chunked"


@pytest.mark.parametrize(("how", "kind"), [("cudnn", "NVIDIA GPUs"), ("pallas", "TPUs and GPUs")])
def test_a_kernel_of_another_device_is_refused_before_a_run(how, kind):
    with pytest.raises(ValueError, match=f"^--attention {how} is for {kind}, and this is a cpu: leave it out"):
        check_attention(how)
    check_attention("chunked")


def test_without_tokamax_a_gpu_has_no_kernel_of_pallas(monkeypatch):
    on(monkeypatch, "gpu", "NVIDIA")
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="tokamax on GPUs, which is not installed"):
        assert form("pallas") == "chunked"


def test_tokamax_takes_the_same_arguments():
    pytest.importorskip("tokamax")
    *qkv, _ = arrays(200)
    for kind, window in (("packed", None), ("padded", 30)):
        at = places(kind, 200)
        mask = kernels.mask_of(at, window)
        got = kernels.by_tokamax(*qkv, 2.0, "xla_chunked", mask=mask, scale=0.3, is_causal=True)
        want = attend(qkv[0], at, [(*qkv[1:], at)], window, size=0.3**-2, cap=2.0, how="xla")
        is_token = np.asarray(at.positions >= 0)
        np.testing.assert_allclose(got[is_token], want[is_token], atol=2e-6)


def decoder(how, **more):
    sizes = dict(vocab_size=32, width=64, mlp_width=32, num_layers=2, num_heads=4, num_kv_heads=2, scan_layers=True)
    return Decoder(DecoderConfig(**{**sizes, "attention": how, "remat": "full", **more}))


def lowered(how, platform, tokens=512, **more):
    """Return the program of a decoder's gradient for a platform that is not here."""
    model, ids = decoder(how, **more), jax.ShapeDtypeStruct((2, tokens), "int32")
    variables = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((2, 8), "int32"))
    step = jax.jit(jax.grad(lambda v, ids: model.apply(v, ids, method="hidden").astype("float32").sum()))
    return step.trace(variables, ids).lower(lowering_platforms=(platform,)).as_text()


WINDOWS = {"window": 100, "window_layers": (True, False)}


@pytest.mark.parametrize(("more", "calls"), [({}, 4), (WINDOWS, 8)])
def test_on_tpus_a_decoder_is_compiled_with_the_kernel_and_no_array_of_all_scores(more, calls):
    program = lowered("pallas", "tpu", **more)
    assert program.count("@tpu_custom_call") == calls  # forward, again for the gradient, of queries, of keys and values
    assert "512x512x" not in program
    assert "512x512x" in lowered("xla", "tpu", **more)


@pytest.mark.parametrize("more", [{}, WINDOWS])
def test_on_gpus_cudnn_is_called_without_a_mask_or_with_one_of_no_heads(monkeypatch, more):
    stablehlo = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(stablehlo, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(stablehlo, "is_cuda_compute_capability_equal", lambda capability: False)
    program = lowered("cudnn", "cuda", dtype="bfloat16", **more)
    if not more:  # rows that are plain need none
        assert program.count("@__cudnn$fmhaSoftmax(") == 2 and program.count("@__cudnn$fmhaSoftmaxBackward(") == 1
        assert "512x512x" not in program
        return
    assert program.count("@__cudnn$fmhaScaleBiasSoftmax(") == 2
    assert program.count("@__cudnn$fmhaScaleBiasSoftmaxBackward(") == 1
    assert not re.search(r"[2-9]x512x512xf32|2x[2-9]x512x512x", program)
    assert "CAUSAL" in program


@pytest.mark.nightly
@pytest.mark.parametrize("more", [{}, WINDOWS | {"window": 20, "score_cap": 5.0}])
def test_a_decoder_gives_the_same_by_the_kernel(interpreted, more):
    tokens = jax.random.randint(jax.random.key(0), (2, 200), 0, 32)
    variables = decoder("xla", **more).init(jax.random.key(1), tokens)
    want, got = (jax.jit(decoder(how, **more).apply)(variables, tokens) for how in ("xla", "pallas"))
    np.testing.assert_allclose(got, want, atol=1e-5)
    logits, cache = decoder("pallas", **more).apply(variables, tokens, cache=init_cache(decoder("xla").config, 2, 0))
    np.testing.assert_allclose(logits, want, atol=1e-5)
    assert cache["k"].shape[2] == 200


def test_every_form_has_a_name():
    assert set(kernels.KERNELS) < set(ATTENTION) == set(train_flags.ATTENTION)
    with pytest.raises(ValueError, match="'flash' is unknown"):
        decoder("flash")


@pytest.mark.nightly
def test_on_a_mesh_each_device_attends_to_its_rows_by_its_heads():
    found = json.loads(run_on(4, "tests.models.kernel_mesh_program"))
    for none, shared, difference in found.values():
        assert none == 0 and shared > 0
        assert difference < 3e-6
