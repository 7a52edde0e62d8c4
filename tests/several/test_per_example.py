"""Each example of a batch has the adapter that it names, and costs what a layer written for it would."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import rslora_jax as rslora
from tests.program_models import normal
from tests.programs import CASES
from tests.reference import assert_near, merged_by_hand, trained

pytestmark = [pytest.mark.usefixtures("compile_fast"), pytest.mark.by_day_on("newest")]

BY_DAY = ("linen scanned, remat", "lookup tied", "convolution grouped", "picked by_row", "control while_each")
AT_NIGHT = [pytest.param(name, marks=[] if name in BY_DAY else [pytest.mark.nightly]) for name in CASES]


@pytest.mark.parametrize("name", AT_NIGHT)
@pytest.mark.filterwarnings("ignore::rslora_jax.RsloraWarning")
def test_each_example_has_its_own_adapter_and_none_where_it_says_so(name):
    case = CASES[name]()
    batch = [jax.tree.map(lambda x, n=n: jnp.roll(x, n, 0), case.args) for n in range(4)]

    def one(params, *args):  # the model sees a batch of one
        args = jax.tree.map(lambda x: jnp.squeeze(x, 0), args)
        return jax.tree.map(lambda y: y[None], case.fn(params, *args))

    def wrapped(**config):
        first = jax.tree.map(lambda x: x[None], batch[0])
        return rslora.wrap(one, case.params, *first, config=rslora.LoraConfig(**{"targets": case.targets} | config))

    pairs = [(own, trained(own, n)) for n, own in enumerate([wrapped(rank=3, alpha=7), wrapped(rank=2, alpha=5)])]
    lora, stacked = rslora.stack(pairs)
    which = [1, -1, 0, 1]
    many = jax.tree.map(lambda *xs: jnp.stack(xs), *batch)
    try:
        jax.eval_shape(jax.vmap(functools.partial(case.fn, case.params)), *many)
    except NotImplementedError as error:
        pytest.skip(f"JAX itself does not map it: {error}")
    got = jax.jit(rslora.per_example(lora))(case.params, stacked, jnp.array(which), *many)
    fn = jax.jit(case.fn)
    for n, number in enumerate(which):
        own, adapters = pairs[number]
        params = case.params if number < 0 else merged_by_hand(own, case.params, adapters)
        assert_near(jax.tree.map(lambda y, n=n: y[n], got), fn(params, *batch[n]), max(2 * case.tolerance, 1e-4))


WIDTH, RANK, COUNT = 64, 5, 3


def deep(p, x):
    for w in p:
        x = jnp.tanh(x @ w)
    return x


@functools.cache
def of_deep(batch=4, tokens=8):
    params, x = [normal(n, WIDTH, WIDTH) for n in range(3)], normal(9, batch, tokens, WIDTH)
    own = rslora.wrap(deep, params, x, config=rslora.LoraConfig(rank=RANK, alpha=3))
    lora, stacked = rslora.stack([(own, trained(own, n)) for n in range(COUNT)])
    return params, x, lora, stacked


def by_hand(params, stacked, which, x):
    for n, w in enumerate(params):
        a, b = (stacked[str(n)][name][which] for name in "ab")
        x = jnp.tanh(x @ w + jnp.einsum("btr,bro->bto", jnp.einsum("bti,bir->btr", x, a), b))
    return x


@pytest.mark.parametrize("tokens", [1, 8, 256])  # with many, a sum for each example would cost fewer FLOPs
@pytest.mark.parametrize("differentiated", [False, True])
def test_flops_and_memory_are_those_of_layers_written_by_hand(tokens, differentiated):
    jax.config.update("jax_disable_most_optimizations", False)  # which `compile_fast` switched on
    params, x, lora, stacked = of_deep(tokens=tokens)
    which = jnp.array([2, 0, 0, 1])

    def compiled(fn):
        def loss(stacked, params, which, x):
            return fn(params, stacked, which, x).sum()

        return jax.jit(jax.grad(loss) if differentiated else loss).lower(stacked, params, which, x).compile()

    ours, theirs = compiled(rslora.per_example(lora)), compiled(by_hand)
    picked = x.shape[0] * sum(array[0].size for array in jax.tree.leaves(stacked))  # a select each: none, or its own
    assert ours.cost_analysis()["flops"] <= 1.01 * theirs.cost_analysis()["flops"] + picked
    temporary = [one.memory_analysis().temp_size_in_bytes for one in (ours, theirs)]
    assert temporary[0] <= 1.1 * temporary[1] + 2 * x.nbytes, temporary


def test_gradients_are_those_by_hand_and_reach_no_adapter_that_is_not_named():
    params, x, lora, stacked = of_deep()
    which = jnp.array([2, 0, -1, 2])

    def loss(fn, stacked):
        return jnp.sum(jnp.sin(fn(params, stacked, which, x)))

    got = jax.jit(jax.grad(functools.partial(loss, rslora.per_example(lora))))(stacked)
    none = jax.tree.map(lambda array: jnp.concatenate([array, jnp.zeros_like(array[:1])]), stacked)
    want = jax.grad(functools.partial(loss, by_hand))(none)  # the last, -1, is of zeros
    assert_near(got, jax.tree.map(lambda array: array[:-1], want), 1e-4)
    assert not any(array[1].any() for array in jax.tree.leaves(got))


def test_another_choice_and_other_adapters_compile_nothing_and_trace_once():
    params, x, lora, stacked = of_deep()
    traces = chex.assert_max_traces(n=1)(deep)
    apply = jax.jit(rslora.per_example(lora.having(fn=traces)))
    for n in range(3):
        apply(params, jax.tree.map(lambda array, n=n: n * array, stacked), jnp.full(4, n), x)
    assert apply._cache_size() == 1


def test_of_dora_none_is_the_base():
    params, x, *_ = of_deep()
    own = rslora.wrap(deep, params, x, config=rslora.LoraConfig(rank=RANK, alpha=3, method="dora"))
    adapters = jax.tree.map(lambda array: 1.1 * array + 0.01, own.init(jax.random.key(0), params))
    lora, stacked = rslora.stack([(own, adapters), (own, adapters)])
    got = rslora.per_example(lora)(params, stacked, jnp.array([0, -1, 1, -1]), x)
    assert_near(got[1::2], deep(params, x)[1::2], 1e-5)
    assert_near(got[::2], deep(own.merge(params, adapters), x)[::2], 1e-5)


def test_of_values_and_rows_that_are_trained_none_is_the_base():
    params, x = {"table": normal(0, 9, 6), "w": normal(1, 6, 9), "bias": normal(2, 9)}, jnp.arange(12).reshape(4, 3) % 9

    def fn(p, x):
        return p["table"][x] @ p["w"] + p["bias"]

    own = rslora.wrap(
        fn,
        params,
        x,
        config=rslora.LoraConfig(rank=2, alpha=3, targets="w", trained="bias", trained_rows={"table": [1]}),
    )
    pairs = [
        (own, jax.tree.map(lambda array, n=n: array + 0.3 * n, own.init(jax.random.key(n), params))) for n in (1, 2)
    ]
    lora, stacked = rslora.stack(pairs, params)
    got = rslora.per_example(lora)(params, stacked, [1, -1, 0, -1], x)
    assert_near(got[1::2], fn(params, x)[1::2], 1e-5)
    for n, (_, adapters) in zip((2, 0), pairs, strict=True):
        assert_near(got[n], fn(own.merge(params, adapters), x)[n], 1e-5)


def with_everything(params, x, *, cache, scale=1.0, name="none"):
    assert x.shape[1] == 1 and cache["k"].shape[1] == 1 and name == "given"
    y = jnp.tanh(x @ params[0]) * scale
    return y, {"k": cache["k"] + y, "index": cache["index"] + 1}


def test_the_batch_lies_where_it_is_said_to_and_static_arguments_have_none():
    params, x = [normal(1, 6, 6)], normal(2, 5, 3, 6)  # the batch is 3, on the second axis
    cache = {"k": normal(3, 1, 3, 6), "index": jnp.int32(2)}
    example = {"cache": jax.tree.map(lambda leaf: leaf[:, :1] if leaf.ndim else leaf, cache), "name": "given"}
    own = rslora.wrap(with_everything, params, x[:, :1], **example, config=rslora.LoraConfig(rank=2, alpha=3))
    lora, stacked = rslora.stack([(own, trained(own, n)) for n in range(2)])
    axes = {"k": 1, "index": None}
    apply = rslora.per_example(lora, 1, (1, axes), kwarg_axes={"cache": axes})
    y, new = apply(params, stacked, np.array([1, 0, 1]), x, cache=cache, scale=jnp.float32(2.0), name="given")
    assert y.shape == x.shape and new["index"] == 3
    for n, number in enumerate([1, 0, 1]):
        adapters = jax.tree.map(lambda array, k=number: array[k], stacked)
        want = 2 * jnp.tanh(x[:, n] @ (params[0] + adapters["0"]["a"] @ adapters["0"]["b"]))
        assert_near((y[:, n], new["k"][:, n]), (want, cache["k"][:, n] + want), 1e-5)


def test_an_nnx_module_is_no_other_function():
    fn, params = rslora.from_nnx(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
    x = normal(1, 3, 6)
    own = rslora.wrap(fn, params, x, config=rslora.LoraConfig(rank=2, alpha=3))
    lora, stacked = rslora.stack([(own, trained(own, n)) for n in range(2)])
    got = rslora.per_example(lora)(params, stacked, [1, -1, 0], x)
    each = [own.apply(params, trained(own, n), x) for n in (0, 1)]
    assert_near(got, jnp.stack([each[1][0], fn(params, x)[1], each[0][2]]), 1e-5)


def test_each_example_draws_its_own_dropout():
    params, x, lora, stacked = of_deep()
    lora = lora.having(config=rslora.LoraConfig(rank=RANK, dropout=0.5))
    same = jnp.broadcast_to(x[:1], x.shape)
    apply, which = rslora.per_example(lora), jnp.zeros(4, int)
    y = apply(params, stacked, which, same, dropout_key=jax.random.key(0))
    assert len(np.unique(np.asarray(y[:, 0, 0]))) == 4
    assert len(np.unique(np.asarray(apply(params, stacked, which, same)[:, 0, 0]))) == 1


WRONG = {
    "which has 3, and there are 3 adapters: give 0 to 2, or -1 for none": lambda a, s: a(s, np.array([0, 3, 0, 0])),
    "which is float32 of shape": lambda a, s: a(s, jnp.ones(4)),
    "which is int32 of shape ()": lambda a, s: a(s, jnp.int32(1)),
    "which is <U1 of shape ()": lambda a, s: a(s, "a"),
    "the arrays have no axis of adapters in front": lambda a, s: a({"0": {"a": jnp.ones(2), "b": jnp.ones(3)}}, [0]),
    "adapter 0/a has shape (64,)": lambda a, s: a(jax.tree.map(lambda array: array[..., 0], s), [0] * 4),
}


@pytest.mark.parametrize("said", list(WRONG))
def test_what_does_not_fit_is_said(said):
    params, x, lora, stacked = of_deep()
    apply = rslora.per_example(lora)
    with pytest.raises(ValueError) as error:
        WRONG[said](lambda stacked, which: apply(params, stacked, which, x), stacked)
    assert said in str(error.value)


def test_axes_that_do_not_fit_are_said():
    params, x, lora, stacked = of_deep()
    with pytest.raises(ValueError, match=r"in_axes=\(0, 0\) does not fit"):
        rslora.per_example(lora, (0, 0))(params, stacked, [0] * 4, x)
    with pytest.raises(ValueError, match="no batch on axis 2: say with out_axes"):
        rslora.per_example(lora, 0, 2)(params, stacked, [0] * 4, x)
