"""Every dtype that a weight is stored in or data come in, also where JAX promotes nothing by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rslora_jax as rslora
from rslora_jax.transform import product
from rslora_jax.transform.cost import Plan
from tests.program_models import normal
from tests.programs import CASES
from tests.reference import assert_near, gradients_by_hand, merged_by_hand, trained

pytestmark = pytest.mark.usefixtures("compile_fast")

CONFIG = rslora.LoraConfig(rank=3, alpha=7)
FLOAT8 = [name for name in dir(jnp) if name.startswith(("float8_e4", "float8_e5", "float8_e3", "float4_e2"))]

COMPLEX = {
    "fft": lambda p, x: jnp.fft.fft(x) @ p["w"],
    "cast": lambda p, x: jax.lax.dot(jnp.fft.fft(x), p["w"].astype(jnp.complex64)),
    "scaled": lambda p, x: x @ (p["w"] * (1 + 2j)),
    "real part": lambda p, x: x @ (p["w"] * (1 + 2j)).real,
}
PLANS = {
    "factored": Plan(),
    "kept": Plan(keep=True),
    "through the weight": Plan(True, True, True, True, True),
    "mixed": Plan(False, False, True, False, True),
}


@pytest.mark.filterwarnings("ignore::rslora_jax.RsloraWarning")
@pytest.mark.parametrize("order", list(PLANS))
@pytest.mark.parametrize("name", list(COMPLEX))
def test_complex_data_and_gradients_are_those_of_the_merged_weight(name, order, monkeypatch):
    monkeypatch.setattr(product, "plan", lambda *args: PLANS[order])
    jax.clear_caches()
    fn, params, x = COMPLEX[name], {"w": normal(0, 12, 20)}, normal(1, 5, 12)
    lora = rslora.wrap(fn, params, x, config=CONFIG)
    adapters = trained(lora)
    by_hand = merged_by_hand(lora, params, adapters)

    def loss(y):
        return jnp.sum(jnp.sin(y.real) + jnp.cos(y.imag))

    y, (da, dx) = jax.jit(
        lambda a, x: (lora.apply(params, a, x), jax.grad(lambda a, x: loss(lora.apply(params, a, x)), (0, 1))(a, x))
    )(adapters, x)
    want, (dw, want_dx) = fn(by_hand, x), jax.grad(lambda p, x: loss(fn(p, x)), (0, 1))(by_hand, x)
    jax.clear_caches()
    for part in (np.real, np.imag):
        assert_near(part(y), part(want), 1e-5, floor=1e-3)
    assert_near(dx, want_dx, 1e-4)
    assert_near(da, gradients_by_hand(lora, adapters, dw), 1e-4)


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_weights_are_merged_in_float32_and_rounded_once(dtype):
    params, x = {"w": normal(0, 12, 20).astype(dtype)}, normal(1, 5, 12)

    def fn(p, x):
        return x @ p["w"].astype(jnp.float32) + x @ jnp.tanh(p["w"].astype(jnp.float32))

    with pytest.warns(rslora.RsloraWarning, match="tanh"):
        lora = rslora.wrap(fn, params, x, config=CONFIG)
    adapters = trained(lora)
    wide = merged_by_hand(lora, {"w": params["w"].astype(jnp.float32)}, adapters)
    merged = lora.merge(params, adapters)["w"]
    assert merged.dtype == params["w"].dtype
    want = np.asarray(wide["w"].astype(dtype), np.float32)
    # Where float32 has rounded to just the middle between two places, either of them is right.
    assert np.mean(np.asarray(merged, np.float32) != want) < 0.02
    assert_near(lora.apply(params, adapters, x), fn(wide, x), 1e-5)

    def loss(y):
        return jnp.sum(jnp.sin(y))

    got = jax.grad(lambda a: loss(lora.apply(params, a, x)))(adapters)
    assert_near(got, gradients_by_hand(lora, adapters, jax.grad(lambda p: loss(fn(p, x)))(wide)), 1e-4)


def test_a_product_in_float8_gets_its_update_in_more_bits():
    params, x = {"w": jnp.zeros((12, 20), jnp.float8_e4m3fn)}, normal(1, 5, 12).astype(jnp.float8_e4m3fn)

    def fn(p, x):
        return jax.lax.dot(x, p["w"], preferred_element_type=jnp.float32)

    lora = rslora.wrap(fn, params, x, config=CONFIG)
    adapters = trained(lora)
    by_hand = merged_by_hand(lora, {"w": params["w"].astype(jnp.float32)}, adapters)
    assert_near(lora.apply(params, adapters, x), fn(by_hand, x.astype(jnp.float32)), 0.01)


STRICT_BY_DAY = ("mlp", "control while_each", "layout cast_twice", "convolution depthwise", "picked ragged")


@pytest.mark.parametrize(
    "name", [n if n in STRICT_BY_DAY else pytest.param(n, marks=pytest.mark.nightly) for n in CASES]
)
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.filterwarnings("ignore::rslora_jax.RsloraWarning")
def test_nothing_here_relies_on_promotion(name, stored):
    """Traced alone, which is where JAX refuses; the program casts its weights, as mixed precision has it."""
    case = CASES[name]()
    keep = jax.tree.map(lambda w: w.dtype, case.params)
    params = jax.tree.map(lambda w: w.astype(stored) if w.dtype == jnp.float32 else w, case.params)

    def fn(p, *args):
        return case.fn(jax.tree.map(lambda w, dtype: w.astype(dtype), p, keep), *args)

    with jax.numpy_dtype_promotion("strict"):
        try:
            jaxpr = jax.make_jaxpr(fn)(params, *case.args)
        except Exception:
            pytest.skip("the program itself relies on promotion")
        config = rslora.LoraConfig(rank=6, alpha=10, targets=case.targets)
        lora = rslora.wrap(fn, params, *case.args, config=config)
        adapters = jax.eval_shape(lora.init, jax.random.key(0))
        jax.eval_shape(lora.merge, params, adapters)

        def loss(a):
            return jnp.sum(jax.tree.leaves(lora.apply(params, a, *case.args))[0])

        jax.eval_shape(loss, adapters)
        if "while" not in str(jaxpr):
            jax.eval_shape(jax.grad(loss), adapters)
