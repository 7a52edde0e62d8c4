"""The count of a step's FLOPs: by hand, by XLA, and the same however the program is written."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import rslora_jax as rslora
from rslora_jax import train
from rslora_jax.models.decoder import Decoder, DecoderConfig
from rslora_jax.train.flops import count, peak_flops, step_flops

TOKENS, IN, WIDE, OUT = 10, 24, 36, 20  # so few tokens that all products are factored


def shape(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


def squares(run, x):
    return jnp.sum(run(x) ** 2), jnp.float32(1)


def mlp(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def mlp_flops(rank, targets="all-linear"):
    params, x = {"up": shape(IN, WIDE), "down": shape(WIDE, OUT)}, shape(TOKENS, IN)
    lora = rslora.wrap(mlp, params, x, config=rslora.LoraConfig(rank=rank, alpha=7, targets=targets))
    return step_flops(lora, squares, params, jax.eval_shape(lora.init, jax.random.key(0)), x)


def product(*sizes):
    return 2 * int(np.prod(sizes))


def test_a_two_layer_mlp_is_what_it_is_by_hand():
    """The input needs no gradient."""
    r, base_up, base_down = 3, product(TOKENS, IN, WIDE), product(TOKENS, WIDE, OUT)
    met, left = product(TOKENS, IN, r), product(TOKENS, r, WIDE)
    up = base_up + met + left  # x W + (x A) B
    up += 2 * left + met  # dy B', dB, dA
    met, left = product(TOKENS, WIDE, r), product(TOKENS, r, OUT)
    down = 2 * base_down + met + left + 2 * left + met + met  # and dx: dy W', (dy B') A'
    assert mlp_flops(r) == up + down


def test_a_frozen_weight_costs_4io_where_an_adapter_is_before_it_and_2io_where_none_is():
    base_up, base_down = product(TOKENS, IN, WIDE), product(TOKENS, WIDE, OUT)
    met, left = product(TOKENS, WIDE, 3), product(TOKENS, 3, OUT)
    assert mlp_flops(3, targets="down") == base_up + base_down + 2 * met + 3 * left
    met, left = product(TOKENS, IN, 3), product(TOKENS, 3, WIDE)
    assert mlp_flops(3, targets="up") == base_up + 2 * met + 3 * left + 2 * base_down


def test_at_high_rank_the_order_is_the_chosen_one_and_a_sum_formed_twice_counts_once():
    """A square weight of 32 for 256 rows at rank 11: y and dx through W + AB, dA and dB through dW."""
    n, rows, r = 32, 256, 11
    params, x = {"first": shape(n, n), "w": shape(n, n)}, shape(rows, n)

    def model(p, x):
        return jnp.tanh(x @ p["first"]) @ p["w"]

    lora = rslora.wrap(model, params, x, config=rslora.LoraConfig(rank=r, alpha=7))
    adapters = jax.eval_shape(lora.init, jax.random.key(0))
    base, full = product(rows, n, n), product(r, n, n)
    first = base + full + base + 2 * full  # y, dW, then dA and dB from it
    assert step_flops(lora, squares, params, adapters, x) == first + first + base  # and dx by the same sum


def nightly(*values):
    return pytest.param(*values, marks=pytest.mark.nightly)


@functools.cache
def llama(rank, tokens, width=128, layers=2, scan=False, remat=None, attention="xla"):
    sizes = dict(width=width, mlp_width=2 * width, num_layers=layers, num_heads=4, num_kv_heads=2)
    model = Decoder(DecoderConfig(vocab_size=64, scan_layers=scan, remat=remat, attention=attention, **sizes))
    tokens = shape(1, tokens, dtype="int32")
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    config = rslora.LoraConfig(rank=rank, alpha=7, allow_large_rank=True)
    lora = rslora.wrap(model.apply, params, tokens, config=config)

    def loss(run, t):
        return (train.cross_entropy(run(t), t, jnp.ones(t.shape)), jnp.float32(1))

    return lora, loss, params, jax.eval_shape(lora.init, jax.random.key(0)), tokens


@pytest.mark.filterwarnings("ignore:rank .* is above")
@pytest.mark.parametrize(
    ("rank", "tokens", "width", "layers"),
    [(3, 64, 192, 1), (96, 256, 96, 1), nightly(3, 64, 256, 2), nightly(96, 512, 128, 2)],
)
def test_a_llama_is_what_xla_counts(rank, tokens, width, layers):
    """XLA also counts what is no product: 1 to 3 % here. The last weight's gradient alone would be more."""
    lora, loss, params, adapters, batch = llama(rank, tokens, width, layers)
    step = jax.jit(jax.grad(lambda a, p, b: loss(functools.partial(lora.apply, p, a), b)[0]))
    compiled = step.lower(adapters, params, batch).compile().cost_analysis()["flops"]
    assert 1 <= compiled / step_flops(lora, loss, params, adapters, batch) < 1.035


@pytest.mark.filterwarnings("ignore:rank .* is above")
@pytest.mark.parametrize(
    ("rank", "tokens", "options"),
    [
        (3, 64, {"scan": True}),
        (3, 64, {"remat": "full"}),
        (96, 512, {"scan": True, "remat": "dots_saveable"}),
        nightly(96, 512, {"scan": True}),
        nightly(96, 512, {"remat": "full"}),
    ],
)
def test_a_scan_and_remat_change_nothing(rank, tokens, options):
    assert step_flops(*llama(rank, tokens, **options)) == step_flops(*llama(rank, tokens))


def test_attention_in_chunks_counts_as_all_scores_and_the_scores_of_its_backward_pass():
    whole, chunked = (step_flops(*llama(3, 256, layers=1, attention=how)) for how in ("xla", "chunked"))
    again, with_out = product(256, 128, 256), 2 * 256 * 128  # all queries with all keys, and dy with y
    assert chunked - whole == again + with_out


def test_only_shapes_matter():
    params, x = {"up": jnp.ones((IN, WIDE)), "down": jnp.ones((WIDE, OUT))}, jnp.ones((TOKENS, IN))
    lora = rslora.wrap(mlp, params, x, config=rslora.LoraConfig(rank=3, alpha=7))
    assert step_flops(lora, squares, params, lora.init(jax.random.key(0)), x) == mlp_flops(3)


def flops_of(fn, *args):
    return count(jax.make_jaxpr(fn)(*args))


def test_what_is_not_used_or_computed_twice_is_not_counted():
    x = shape(4, 8)
    w = shape(8, 8)
    once = product(4, 8, 8)
    assert flops_of(lambda x, w: (x @ w) + jax.jit(jnp.matmul)(x, w), x, w) == once
    assert flops_of(lambda x, w: (x @ w, jax.jit(lambda x, w: (x @ w.T, x))(x, w)[1])[0], x, w) == once
    assert flops_of(lambda x, w: (x @ w) + x @ w.T, x, w) == 2 * once


def test_loops_and_branches():
    x, w = shape(4, 8), shape(8, 8)
    once = product(4, 8, 8)
    assert flops_of(lambda x, w: lax.fori_loop(0, 5, lambda _, x: x @ w, x), x, w) == 5 * once  # a scan
    assert flops_of(lambda x, w: lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w, x), x, w) == once
    branches = [lambda x, w: x, lambda x, w: x @ w @ w, lambda x, w: x @ w]
    assert flops_of(lambda n, x, w: lax.switch(n, branches, x, w), shape(dtype="int32"), x, w) == 2 * once


def test_a_call_that_jax_makes_of_a_program_counts_whatever_jax_names_it():
    """Of a checkpointed scan under a gradient, the value is a call of its own, of another name on newer JAX."""
    x, w, layers = shape(4, 8), shape(8, 8), 3
    run = jax.checkpoint(lambda x, w: lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=layers)[0])
    backward = flops_of(jax.value_and_grad(lambda x, w: jnp.sum(run(x, w) ** 2), (0, 1)), x, w)
    assert backward == 4 * layers * product(4, 8, 8)  # the value, once more for the gradient, dx and dw


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_whose_first_turn_needs_no_gradient_is_what_its_loop_is(reverse):
    layers, params, x = 3, {"w": shape(3, 16, 16)}, shape(8, 16)

    def scanned(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), x), x, p["w"], reverse=reverse)

    def unrolled(p, x):
        xs = []
        for n in reversed(range(layers)) if reverse else range(layers):
            xs.append(x)
            x = jnp.tanh(x @ p["w"][n])
        return x, jnp.stack(xs[::-1] if reverse else xs)

    def loss(run, x):
        return (sum(jnp.sum(y**2) for y in run(x)), jnp.float32(1))

    found = []
    for model in (scanned, unrolled):
        lora = rslora.wrap(model, params, x, config=rslora.LoraConfig(rank=2, alpha=7))
        found.append(step_flops(lora, loss, params, jax.eval_shape(lora.init, jax.random.key(0)), x))
    assert found[0] == found[1] > (2 * layers - 1) * product(8, 16, 16)


def test_a_loop_over_nothing_but_its_number():
    params, x = {"w": shape(16, 16)}, shape(4, 16)

    def model(p, x):
        return lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ p["w"]), x)

    lora = rslora.wrap(model, params, x, config=rslora.LoraConfig(rank=2, alpha=7))
    base, part = product(4, 16, 16), product(4, 16, 2)
    want = (3 * base + 6 * part) + (2 * base + 3 * 3 * part + 2 * part)  # no dx in the first turn
    assert step_flops(lora, squares, params, jax.eval_shape(lora.init, jax.random.key(0)), x) == want


def test_a_shard_map_counts_for_all_devices():
    mesh = jax.sharding.AbstractMesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    cut = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=spec, out_specs=spec)
    assert flops_of(cut, shape(8, 16)) == 4 * product(2, 16, 2)


@pytest.mark.parametrize(
    ("strides", "padding", "options"),
    [
        ((1, 1), "VALID", {}),
        ((2, 1), "SAME", {}),
        ((1, 1), ((2, 0), (1, 3)), {"rhs_dilation": (2, 1)}),
        ((1, 2), "SAME", {"feature_group_count": 2}),
        ((1, 1), ((1, 1), (0, 0)), {"lhs_dilation": (2, 1)}),
    ],
)
def test_a_convolution_and_its_gradients_each_count_the_taps_that_meet_data(strides, padding, options):
    """Convolve ones in numpy: what comes out is the number of taps."""
    x, kernel = np.ones((2, 7, 6, 4)), np.ones((3, 2, 4 // options.get("feature_group_count", 1), 6))
    numbers = ("NHWC", "HWIO", "NHWC")

    def run(x, k):
        return lax.conv_general_dilated(x, k, strides, padding, dimension_numbers=numbers, **options)

    want = 2 * int(jnp.sum(run(x, kernel)))
    assert flops_of(run, x, kernel) == want

    def backward(x, k):
        return jax.grad(lambda x, k: jnp.sum(run(x, k) ** 2), (0, 1))(x, k)

    assert flops_of(backward, x, kernel) == 3 * want


def test_experts_count_their_own_rows():
    rows, experts, sizes = shape(12, 8), shape(3, 8, 5), jnp.array([2, 4, 6])
    once = product(12, 8, 5)

    def run(x, w):
        return jnp.sum(lax.ragged_dot(x, w, sizes) ** 2)

    assert flops_of(run, rows, experts) == once
    assert flops_of(jax.grad(run, (0, 1)), rows, experts) == 3 * once


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("TPU v2", 22.5),
        ("TPU v3", 61.5),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla T4", 65),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA A1000", None),
        ("TPU v9", None),
        ("cpu", None),
    ],
)
def test_the_peak_of_a_device_by_its_name(kind, tflops):
    found = peak_flops(types.SimpleNamespace(device_kind=kind))
    assert found == (None if tflops is None else tflops * 1e12)
