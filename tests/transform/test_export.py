"""`jax.export` with sizes that are symbols: one exported program serves all, and is what it is at each."""

import jax
import jax.numpy as jnp
import pytest
from jax import export

import rslora_jax as rslora
from tests.program_models import normal
from tests.reference import assert_near, merged_by_hand, trained

pytestmark = [pytest.mark.by_day_on("oldest"), pytest.mark.usefixtures("compile_fast")]

PARAMS = {
    "w": normal(0, 16, 24),
    "v": normal(1, 24, 24),
    "s": normal(2, 3, 24, 24),
    "e": normal(3, 50, 24),
    "c": normal(4, 3, 24, 10),
    "k": normal(5, 3, 3, 4, 10),
}
CONFIG = rslora.LoraConfig(rank=5, alpha=7, targets="*")


def convolve(x, kernel, layout, padding):
    return jax.lax.conv_general_dilated(x, kernel, (1,) * (x.ndim - 2), padding, dimension_numbers=layout)


ROWS = {
    "mlp": lambda p, x: jax.nn.softmax(x @ p["w"]) @ p["v"],
    "tied": lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T,
    "scan": lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x @ p["w"], p["s"])[0],
    "scaled": lambda p, x: x @ (p["w"] * 2.0) + (x @ p["w"]).sum(),
    "look-up": lambda p, x: jnp.take(p["e"], jnp.int32(x[:, 0] * 9) % 50, axis=0) @ p["e"].T,
    "convolution": lambda p, x: convolve((x @ p["w"])[None], p["c"], ("NWC", "WIO", "NWC"), "SAME"),
    "experts": lambda p, x: jax.lax.ragged_dot(x @ p["w"], p["s"], jnp.array([1, 0, 2])),
    "batched": lambda p, x: jnp.einsum("bi,sij->sbj", x @ p["w"], p["s"]),
}


def shapes(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def compare(fn, symbolic, x, *others):
    """Export value and gradients by adapters, and wrapping itself, for all sizes; compare with merged weights."""
    lora = rslora.wrap(fn, PARAMS, x, config=CONFIG)
    adapters = trained(lora)

    def loss(a, p, x):
        return jnp.sum(jnp.sin(lora.apply(p, a, x)))

    value = export.export(jax.jit(lora.apply))(shapes(PARAMS), shapes(adapters), symbolic)
    gradient = export.export(jax.jit(jax.grad(loss)))(shapes(adapters), shapes(PARAMS), symbolic)

    def whole(p, x):
        return rslora.wrap(fn, p, x, config=CONFIG).apply(p, adapters, x)

    wrapped_inside = export.export(jax.jit(whole))(shapes(PARAMS), symbolic)
    for data in (x, *others):
        want = fn(merged_by_hand(lora, PARAMS, adapters), data)
        assert_near(value.call(PARAMS, adapters, data), want, 1e-5)
        assert_near(wrapped_inside.call(PARAMS, data), want, 1e-5)
        through = jax.grad(lambda a, x=data: jnp.sum(jnp.sin(fn(lora.merge(PARAMS, a), x))))(adapters)
        assert_near(gradient.call(adapters, PARAMS, data), through, 1e-4)


@pytest.mark.filterwarnings("ignore::rslora_jax.wrap.RsloraWarning")
@pytest.mark.parametrize("name", list(ROWS))
def test_a_symbol_for_the_rows(name):
    (rows,) = export.symbolic_shape("b")
    symbolic = jax.ShapeDtypeStruct((rows, 16), "float32")
    compare(ROWS[name], symbolic, normal(6, 6, 16), normal(7, 1, 16), normal(8, 300, 16))


def test_symbols_for_the_places_of_an_image():
    h, w = export.symbolic_shape("h, w", constraints=["h >= 8", "w >= 8"])

    def fn(p, x):
        return convolve(x, p["k"], ("NHWC", "HWIO", "NHWC"), "VALID")

    compare(fn, jax.ShapeDtypeStruct((2, h, w, 4), "float32"), normal(6, 2, 9, 9, 4), normal(7, 2, 8, 12, 4))


def test_a_model_that_is_itself_an_export_does_not_crash():
    exported = export.export(jax.jit(ROWS["mlp"]))(shapes(PARAMS), jax.ShapeDtypeStruct((6, 16), "float32"))
    with pytest.raises(ValueError, match="no weight is left to adapt"):
        rslora.wrap(exported.call, PARAMS, normal(6, 6, 16))
