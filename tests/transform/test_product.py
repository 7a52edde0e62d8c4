"""The orders of a product: the factored one where another is cheaper, and the work that a plan has counted."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import rslora_jax as rslora
from rslora_jax.transform import cost, product
from rslora_jax.transform.cost import Plan
from tests.programs import CASES
from tests.reference import assert_near, merged_by_hand, trained

BY_DAY = ("convolution depthwise",)
OTHERS = [n for n in CASES if n.startswith(("convolution", "picked", "layout")) and n not in BY_DAY]


@pytest.mark.parametrize("name", [*BY_DAY, *(pytest.param(name, marks=pytest.mark.nightly) for name in OTHERS)])
def test_factored_products_are_those_of_the_merged_weight(name, monkeypatch):
    monkeypatch.setattr(product, "plan", lambda *args, **kwargs: Plan())
    jax.clear_caches()
    case = CASES[name]()
    lora = rslora.wrap(
        case.fn, case.params, *case.args, config=rslora.LoraConfig(rank=6, alpha=10, targets=case.targets)
    )
    adapters = trained(lora)
    got = jax.jit(lora.apply)(case.params, adapters, *case.args)
    jax.clear_caches()
    assert_near(got, jax.jit(case.fn)(merged_by_hand(lora, case.params, adapters), *case.args), case.tolerance)


@pytest.mark.parametrize(("tokens", "rank"), [(100, 8), (200, 90), (200, 130), (300, 200), (1000, 100), (1000, 250)])
def test_a_step_takes_the_flops_that_were_counted_and_no_more(tokens, rank):
    """XLA's count of a compiled step of two layers beside the plan's: what is said to be at hand is not made again."""
    width, layers = 256, 2
    x = jnp.ones((tokens, width))
    params = {str(n): jnp.ones((width, width)) for n in range(layers)}

    def fn(params, x):
        for n in range(layers):
            x = jnp.tanh(x @ params[str(n)])
        return x

    config = rslora.LoraConfig(rank=rank, alpha=7, targets=["*"])
    lora = rslora.wrap(fn, params, x, config=config)
    adapters = jax.eval_shape(lora.init, jax.random.key(0))
    step = jax.jit(jax.value_and_grad(lambda a, x, p: jnp.sum(lora.apply(p, a, x) ** 2), (0, 1)))
    found = step.lower(adapters, x, params).compile().cost_analysis()["flops"]
    t, i, o, r = tokens, width, width, rank
    sizes = cost.Sizes(2 * t * i * o, 2 * t * i * r, 2 * t * r * o, 2 * r * i * o, i * o, t * r)
    counted = layers * (2 * sizes.base + cost.flops(sizes, cost.plan(sizes, True), True))
    # An XLA that keeps a sum which the plan forms twice takes fewer.
    assert 0.85 < found / counted < 1.01, found / counted


SMALL = """
import jax, rslora_jax as rslora
shape = jax.ShapeDtypeStruct
for rows, rank, i, o in [(2, 3, 12, 20), (3, 2, 65, 7), (40, 3, 2, 3), (3, 8, 12, 20)]:
    params, x = {"w": shape((i, o), "float32")}, shape((rows, i), "float32")
    config = rslora.LoraConfig(rank=rank, alpha=7, allow_large_rank=True)
    lora = rslora.wrap(lambda p, x: x @ p["w"], params, x, config=config)
    many = lambda tree: jax.tree.map(lambda leaf: shape((4, *leaf.shape), leaf.dtype), tree)
    grad = jax.vmap(jax.grad(lambda a, p, x: lora.apply(p, a, x).sum()), (0, None, 0))
    jax.jit(grad).lower(many(jax.eval_shape(lora.init, jax.random.key(0))), params, many(x)).compile()
print("compiled")
"""


def test_small_gradients_compile_under_vmap():
    """The XLA of JAX 0.10 aborts the process where it forms a small product of a stack transposed."""
    done = subprocess.run([sys.executable, "-c", SMALL], capture_output=True, text=True)
    assert "compiled" in done.stdout, done.stderr[-2000:]
