"""DoRA against its definition in float64, over all programs of the laws."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rslora_jax as rslora
from rslora_jax.sites import from_paths, named_leaves
from tests.program_models import normal
from tests.programs import CASES
from tests.reference import assert_near
from tests.stored.eight_bits import eight_bits

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]

CONFIG = dict(rank=6, alpha=10.0, method="dora")


def flat(site, array, *sides):
    """Give an array as (*stack, one axis a side)."""
    order = [axis for side in sides for axis in side]
    moved = np.transpose(np.asarray(array, np.float64), (*site.stack_axes, *order))
    sizes = [int(np.prod([site.shape[n] for n in side])) for side in sides]
    return moved.reshape(*site.sizes(site.stack_axes), *sizes)


def parts(site, w, factors):
    """Give W + gamma A B and the norms of its columns, in float64."""
    stack = site.sizes(site.stack_axes)
    a = np.asarray(factors["a"], np.float64).reshape(*stack, site.in_size, site.rank)
    b = np.asarray(factors["b"], np.float64).reshape(*stack, site.rank, site.out_size)
    total = flat(site, w, site.in_axes, site.out_axes) + site.alpha / np.sqrt(site.rank) * a @ b
    return a, b, total, np.linalg.norm(total, axis=-2, keepdims=True)


def by_hand(site, w, factors):
    stack, order = site.sizes(site.stack_axes), (*site.stack_axes, *site.in_axes, *site.out_axes)
    _, _, total, norm = parts(site, w, factors)
    acting = total / norm * np.asarray(factors["m"], np.float64).reshape(*stack, 1, site.out_size)
    return acting.reshape(site.sizes(order)).transpose(np.argsort(order))


def gradients_by_hand(site, w, factors, dw):
    """Apply the chain rule with the norm as a constant."""
    gamma, stack = site.alpha / np.sqrt(site.rank), site.sizes(site.stack_axes)
    a, b, total, norm = parts(site, w, factors)
    d = flat(site, dw, site.in_axes, site.out_axes)
    scaled = d * np.asarray(factors["m"], np.float64).reshape(*stack, 1, site.out_size) / norm
    found = {
        "a": gamma * scaled @ np.swapaxes(b, -1, -2),
        "b": gamma * np.swapaxes(a, -1, -2) @ scaled,
        "m": np.sum(total / norm * d, -2),
    }
    return {name: array.reshape(site.factor_shapes[name]) for name, array in found.items()}


def after_training(lora, params):
    """Give adapters of which no array is at its start: m about the norms, B not zero."""
    rng = np.random.default_rng(4)

    def one(name, array):
        moved = 0.2 * rng.standard_normal(array.shape)
        return jnp.asarray(array * (1 + moved) if name == "m" else array + moved, array.dtype)

    start = lora.init(jax.random.key(0), params)
    return {path: {name: one(name, array) for name, array in of.items()} for path, of in start.items()}


DAY = ("linen scanned, remat", "linen tied, every matrix", "convolution grouped", "picked ragged")


@pytest.mark.parametrize("name", [n if n in DAY else pytest.param(n, marks=pytest.mark.nightly) for n in CASES])
def test_values_gradients_and_merged_weights_are_those_of_the_definition(name):
    case = CASES[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rslora.RsloraWarning)
        lora = rslora.wrap(case.fn, case.params, *case.args, config=rslora.LoraConfig(**CONFIG, targets=case.targets))
        adapters, leaves = after_training(lora, case.params), named_leaves(case.params)
        acting = {path: by_hand(site, leaves[path], adapters[path]) for path, site in lora.sites.items()}
        merged = from_paths(case.params, leaves | {p: jnp.asarray(w, leaves[p].dtype) for p, w in acting.items()})

        def loss(fn, of):
            return jnp.sum(jnp.sin(jax.tree.leaves(fn(of))[0].real.astype(jnp.float32)))

        apply, plain = (lambda a: lora.apply(case.params, a, *case.args)), (lambda p: case.fn(p, *case.args))
        tolerance = max(2 * case.tolerance, 2e-5)
        assert_near(jax.jit(apply)(adapters), jax.jit(plain)(merged), tolerance)
        assert_near(lora.merge(case.params, adapters), merged, max(1e-5, tolerance))
        if name.startswith("control while"):  # of which JAX has no reverse mode
            return
        grads = jax.jit(jax.grad(functools.partial(loss, apply)))(adapters)
        dw = named_leaves(jax.jit(jax.grad(functools.partial(loss, plain), allow_int=True))(merged))
    for path, site in lora.sites.items():
        by_chain = gradients_by_hand(site, leaves[path], adapters[path], dw[path])
        assert_near(grads[path], by_chain, 50 * tolerance, floor=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fresh_one_changes_nothing(dtype):
    params = {"w": normal(0, 9, 7).astype(dtype), "t": normal(1, 11, 9).astype(dtype)}
    ids = jnp.arange(5)

    def fn(p, ids):
        x = p["t"][ids]
        return x @ p["w"] @ p["w"].T @ p["t"].T

    lora = rslora.wrap(fn, params, ids, config=rslora.LoraConfig(rank=3, alpha=7, method="dora", targets="*"))
    got, want = lora.apply(params, lora.init(jax.random.key(0), params), ids), fn(params, ids)
    assert_near(got, want, 1e-5 if dtype == "float32" else 0.03)


def scanned(p, x):
    return jax.lax.scan(jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None)), x, p["w"])[0]


def looped(p, x):
    return jnp.tanh(jnp.tanh(x @ p["w"][0]) @ p["w"][1])


@pytest.mark.parametrize(("sizes", "rank"), [((3, 64, 40), 24), ((3, 99, 40), 30), ((80, 40), 33), ((65, 7), 3)])
def test_norms_of_a_large_rank_are_those_of_the_sum(sizes, rank):
    """From the sum, some rows at a time, where its expansion would take more."""
    params, x = {"w": normal(0, *sizes)}, normal(1, 2, sizes[-2])
    fn = (lambda p, x: x @ p["w"]) if len(sizes) == 2 else (lambda p, x: jax.lax.map(lambda w: x @ w, p["w"]))
    lora = rslora.wrap(fn, params, x, config=rslora.LoraConfig(method="dora", rank=rank, alpha=10.0))
    adapters = after_training(lora, params)
    site = lora.sites["w"]
    acting = by_hand(site, params["w"], adapters["w"])
    assert_near(lora.merge(params, adapters)["w"], acting, 1e-6)
    _, pull = jax.vjp(lambda a: lora.apply(params, a, x), adapters)
    dy = normal(2, *jax.eval_shape(fn, params, x).shape)
    dw = jax.vjp(fn, params, x)[1](dy)[0]["w"]
    assert_near(pull(dy)[0]["w"], gradients_by_hand(site, params["w"], adapters["w"], dw), 1e-5)


@pytest.mark.parametrize("rank", [6, pytest.param(200, marks=pytest.mark.nightly)])
@pytest.mark.parametrize(("fn", "form"), [(looped, "array"), (scanned, "array"), (scanned, "stored")])
def test_no_array_of_the_weights_size_is_made(fn, form, rank):
    size, layers, taken = 512, 2 if fn is looped else 6, {}
    params, x = {"w": normal(0, layers, size, size)}, normal(2, 8, size)
    params = jax.tree.map(eight_bits, params) if form == "stored" else params
    for method in ("lora", "dora"):
        lora = rslora.wrap(fn, params, x, config=rslora.LoraConfig(rank=rank, alpha=10, method=method))
        adapters = jax.eval_shape(lambda p, lora=lora: lora.init(jax.random.key(0), p), params)
        step = jax.jit(jax.grad(lambda a, p, x, lora=lora: jnp.sum(lora.apply(p, a, x) ** 2)))
        taken[method] = step.lower(adapters, params, x).compile().memory_analysis().temp_size_in_bytes / (4 * size**2)
    # A stored layer is made dense for its norms as it is for its use, one at a time.
    assert taken["dora"] < taken["lora"] + 0.5, taken
