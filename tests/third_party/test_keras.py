"""Keras's convolutions on its JAX backend: it inserts an axis of size 1 into a depthwise kernel before it is used."""

import os

import jax
import jax.numpy as jnp
import pytest

from tests.third_party.checks import assert_exact, wrapped
from tests.zoo.model import filled

os.environ["KERAS_BACKEND"] = "jax"
keras = pytest.importorskip("keras", reason="needs keras: see tests/third_party/README.md", exc_type=ImportError)

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def network():
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((8, 8, 3)),
            layers.Conv2D(6, 3, padding="same", name="stem"),
            layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2, activation="gelu", name="depthwise"),
            layers.BatchNormalization(name="norm"),
            layers.Conv2D(8, 1, name="pointwise"),
            layers.SeparableConv2D(8, 3, activation="gelu", name="separable"),
            layers.Reshape((36, 8)),
            layers.DepthwiseConv1D(3, name="temporal"),
            layers.GlobalAveragePooling1D(),
            layers.Dense(4, name="classes"),
        ]
    )

    def by_path(variables):
        return {v.path: v.value for v in variables}

    params = filled(by_path(model.trainable_variables))
    statistics = by_path(model.non_trainable_variables)

    def fn(params, x):
        return model.stateless_call(list(params.values()), list(statistics.values()), x)[0]

    def fn_in_order(params, x):
        return fn({v.path: params[v.path] for v in model.trainable_variables}, x)

    return fn_in_order, params, jax.random.normal(jax.random.key(0), (2, 8, 8, 3))


def test_depthwise_kernels_that_are_named_are_adapted_without_fallback(network):
    fn, params, x = network
    lora, said = wrapped(fn, params, x, targets=["*kernel"])
    assert set(lora.sites) == {path for path in params if path.endswith("kernel")}
    assert not any(site.fallbacks for site in lora.sites.values())
    assert all("full rank" in text for text in said)
    kernels = {"sequential/depthwise": 6 * 2, "sequential/separable/depthwise": 8, "sequential/temporal": 8}
    for path, features in kernels.items():  # stored (*window, channels, multiplier)
        site = next(site for name, site in lora.sites.items() if name.startswith(path))
        assert (site.kind, site.in_size, site.out_size) == ("convolution", 3 ** (len(site.shape) - 2), features)
    assert_exact(lora, params, x, tolerance=5e-5)


def test_by_default_kernels_of_convolutions_are_left_out_with_their_reason(network):
    fn, params, x = network
    lora, said = wrapped(fn, params, x)
    assert set(lora.sites) == {"sequential/classes/kernel"} and not said
    kernels = {path for path in params if path.endswith("kernel")} - set(lora.sites)
    assert {lora.left_out[path] for path in kernels} == {"convolution: by name only"}
    assert set(lora.left_out) | set(lora.sites) == set(params) and not lora.unused
    assert_exact(lora, params, x)
    assert jnp.isfinite(fn(params, x)).all()
