"""The measurement of adapters' outputs and gradients, and theorem 3.2 with it (arXiv 2312.03732)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import rslora_jax as rslora
from rslora_jax.stability import MOMENTS, measure
from tests.programs import normal


def adapted(fn, params, *args, rank=3, **config):
    """Wrap a function and give it adapters with random A and B; alpha is 7."""
    lora = rslora.wrap(fn, params, *args, config=rslora.LoraConfig(rank=rank, alpha=7, **config))
    adapters = jax.tree.map(lambda a: a + 0.3 * normal(a.size, *a.shape), lora.init(jax.random.key(2)))
    return lora, adapters


def squares(run, x, target):
    return jnp.sum((run(x) - target) ** 2) / 2


class ByHand:
    """The chain rule through layers x (W + gamma A B), in float64."""

    def __init__(self, site, w, adapter):
        self.w, self.a, self.b = (np.asarray(f, np.float64) for f in (w, adapter["a"], adapter["b"]))
        self.gamma = site.alpha / np.sqrt(site.rank)

    def forward(self, x):
        self.x, self.update = x, self.gamma * x @ self.a @ self.b
        return x @ self.w + self.update

    def backward(self, dy):
        self.input_grad = self.gamma * dy @ self.b.T @ self.a.T
        self.a_grad, self.b_grad = self.gamma * self.x.T @ dy @ self.b.T, self.gamma * self.a.T @ self.x.T @ dy
        return dy @ self.w.T + self.input_grad

    def check(self, found, n=()):
        for m in MOMENTS:
            for name, array in (("output", self.update), ("input_grad", self.input_grad)):
                got = np.asarray(getattr(found, name)[m][n])
                np.testing.assert_allclose(got, np.mean(np.abs(array) ** m), rtol=2e-5, err_msg=f"{name} {m}")
        for name in ("a_grad", "b_grad"):
            got = np.asarray(getattr(found, name)[n])
            np.testing.assert_allclose(got, np.linalg.norm(getattr(self, name)), rtol=2e-5, err_msg=name)


def test_a_linear_layer_by_hand_and_inside_jit():
    params, x, target = {"w": normal(0, 11, 6)}, normal(1, 5, 11), normal(2, 5, 6)
    lora, adapters = adapted(lambda p, x: x @ p["w"], params, x)
    layer = ByHand(lora.sites["w"], params["w"], adapters["w"])
    x64 = np.asarray(x, np.float64)
    layer.backward(layer.forward(x64) - np.asarray(target, np.float64))
    found = measure(lora, squares, params, adapters, x, target)
    layer.check(found["w"])
    jitted = jax.jit(lambda *a: measure(lora, squares, *a))(params, adapters, x, target)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, jitted)


def mlp(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"].T  # stored transposed


def test_an_mlp_by_hand():
    params, x, target = {"up": normal(0, 7, 12), "down": normal(1, 5, 12)}, normal(2, 6, 7), normal(3, 6, 5)
    lora, adapters = adapted(mlp, params, x)
    up, down = (ByHand(lora.sites[n], w, adapters[n]) for n, w in (("up", params["up"]), ("down", params["down"].T)))
    hidden = np.tanh(up.forward(np.asarray(x, np.float64)))
    dhidden = down.backward(down.forward(hidden) - np.asarray(target, np.float64))
    up.backward((1 - hidden**2) * dhidden)
    found = measure(lora, squares, params, adapters, x, target)
    up.check(found["up"])
    down.check(found["down"])


@pytest.mark.parametrize("around", ["jit", "remat", "scaled"])
def test_a_stack_by_hand_has_values_for_each_layer(around):
    scale = np.linspace(0.5, 2, 8)[:, None] if around == "scaled" else 1.0  # on the axis of A

    def fn(p, x):
        def layer(x, w):
            return jnp.tanh(x @ (w * jnp.asarray(scale, jnp.float32))), None

        layer = {"jit": jax.jit, "remat": jax.checkpoint, "scaled": lambda f: f}[around](layer)
        return lax.scan(layer, x, p["w"])[0]

    params, x, target = {"w": normal(0, 3, 8, 8)}, normal(1, 4, 8), normal(2, 4, 8)
    lora, adapters = adapted(fn, params, x)
    site, ab = lora.sites["w"], adapters["w"]
    layers = [ByHand(site, w, {"a": a, "b": b}) for w, a, b in zip(params["w"], ab["a"], ab["b"], strict=True)]
    for layer in layers:
        layer.w, layer.a = scale * layer.w, scale * layer.a
    y, hiddens = np.asarray(x, np.float64), []
    for layer in layers:
        y = np.tanh(layer.forward(y))
        hiddens.append(y)
    dy = y - np.asarray(target, np.float64)
    for layer, hidden in zip(layers[::-1], hiddens[::-1], strict=True):
        dy = layer.backward((1 - hidden**2) * dy)
        layer.a_grad = scale * layer.a_grad
    found = measure(lora, squares, params, adapters, x, target)
    assert found["w"].a_grad.shape == (3,)
    for n, layer in enumerate(layers):
        layer.check(found["w"], n)
