"""The measurement of adapters' outputs and gradients, and theorem 3.2 with it (arXiv 2312.03732)."""

import csv
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import rslora_jax as rslora
from rslora_jax.analysis.stability import MOMENTS, measure
from tests.program_models import normal

pytestmark = [pytest.mark.by_day_on("oldest"), pytest.mark.usefixtures("compile_fast")]
SCRIPTS = Path(__file__).parents[2] / "scripts"


def adapted(fn, params, *args, rank=3, **config):
    """Wrap a function and give it adapters with random A and B; alpha is 7."""
    lora = rslora.wrap(fn, params, *args, config=rslora.LoraConfig(rank=rank, alpha=7, **config))
    adapters = jax.tree.map(lambda a: a + 0.3 * normal(a.size, *a.shape), lora.init(jax.random.key(2)))
    return lora, adapters


def measured(lora, loss, *args):
    return jax.jit(lambda *args: measure(lora, loss, *args))(*args)


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
        self.dw = self.x.T @ dy
        return dy @ self.w.T + self.input_grad

    def check(self, found, n=()):
        for m in MOMENTS:
            for name, array in (("output", self.update), ("input_grad", self.input_grad)):
                got = np.asarray(getattr(found, name)[m][n])
                np.testing.assert_allclose(got, np.mean(np.abs(array) ** m), rtol=2e-5, err_msg=f"{name} {m}")
        for got, want in (("a", self.dw @ self.b.T), ("b", self.a.T @ self.dw)):
            np.testing.assert_allclose(
                np.asarray(found.factor_grads[got][n]), np.linalg.norm(self.gamma * want), rtol=2e-5
            )


def test_a_linear_layer_by_hand_with_and_without_jit():
    params, x, target = {"w": normal(0, 11, 6)}, normal(1, 5, 11), normal(2, 5, 6)
    lora, adapters = adapted(lambda p, x: x @ p["w"], params, x)
    layer = ByHand(lora.sites["w"], params["w"], adapters["w"])
    x64 = np.asarray(x, np.float64)
    layer.backward(layer.forward(x64) - np.asarray(target, np.float64))
    layer.check(measure(lora, squares, params, adapters, x, target)["w"])
    layer.check(measured(lora, squares, params, adapters, x, target)["w"])


def mlp(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"].T  # stored transposed


def test_an_mlp_by_hand():
    params, x, target = {"up": normal(0, 7, 12), "down": normal(1, 5, 12)}, normal(2, 6, 7), normal(3, 6, 5)
    lora, adapters = adapted(mlp, params, x)
    up, down = (ByHand(lora.sites[n], w, adapters[n]) for n, w in (("up", params["up"]), ("down", params["down"].T)))
    hidden = np.tanh(up.forward(np.asarray(x, np.float64)))
    dhidden = down.backward(down.forward(hidden) - np.asarray(target, np.float64))
    up.backward((1 - hidden**2) * dhidden)
    found = measured(lora, squares, params, adapters, x, target)
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
        layer.a, layer.dw = layer.a / scale, scale * layer.dw  # of the stored weight
    found = measured(lora, squares, params, adapters, x, target)
    assert found["w"].factor_grads["a"].shape == (3,)
    for n, layer in enumerate(layers):
        layer.check(found["w"], n)


def test_all_uses_of_a_weight_count_alike_however_it_is_scaled():
    scale = np.linspace(0.5, 2, 9)[:, None]

    def fn(p, x):
        return jnp.tanh(x @ (p["w"] * jnp.float32(scale))) @ p["w"].T

    params, x, target = {"w": normal(0, 9, 5)}, normal(1, 4, 9), normal(2, 4, 9)
    lora, adapters = adapted(fn, params, x)
    site, a, b = lora.sites["w"], *(np.asarray(adapters["w"][n], np.float64) for n in "ab")
    there = ByHand(site, scale * np.asarray(params["w"], np.float64), {"a": scale * a, "b": b})
    back = ByHand(site, params["w"].T, {"a": b.T, "b": a.T})
    hidden = np.tanh(there.forward(np.asarray(x, np.float64)))
    dhidden = back.backward(back.forward(hidden) - np.asarray(target, np.float64))
    there.backward((1 - hidden**2) * dhidden)
    there.update = np.concatenate([there.update, back.update], axis=None)
    there.input_grad = np.concatenate([there.input_grad, back.input_grad], axis=None)
    there.a, there.dw = a, scale * there.dw + back.dw.T  # of the stored weight
    there.check(measured(lora, squares, params, adapters, x, target)["w"])


def test_experts_of_one_product_share_their_output_and_have_gradients_of_their_own():
    def fn(p, x):
        return jnp.einsum("etd,edf->etf", x, p["w"])

    params, x, target = {"w": normal(0, 3, 6, 5)}, normal(1, 3, 4, 6), normal(2, 3, 4, 5)
    lora, adapters = adapted(fn, params, x)
    found = measured(lora, squares, params, adapters, x, target)["w"]
    a, b, x, target = (np.asarray(f, np.float64) for f in (adapters["w"]["a"], adapters["w"]["b"], x, target))
    experts = [ByHand(lora.sites["w"], w, {"a": a[n], "b": b[n]}) for n, w in enumerate(params["w"])]
    for n, expert in enumerate(experts):
        expert.backward(expert.forward(x[n]) - target[n])
    shared = [np.stack([getattr(e, name) for e in experts]) for name in ("update", "input_grad")]
    for n, expert in enumerate(experts):
        expert.update, expert.input_grad = shared
        expert.check(found, n)


def test_a_convolution_is_measured_as_that_of_its_update():
    def conv(x, w):
        return lax.conv_general_dilated(x, w, (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    params, x, target = {"w": normal(0, 3, 6, 5)}, normal(1, 2, 8, 6), normal(2, 2, 4, 5)
    lora, adapters = adapted(lambda p, x: conv(x, p["w"]), params, x, targets="w")
    found = measured(lora, squares, params, adapters, x, target)["w"]
    update = lora.merge(jax.tree.map(jnp.zeros_like, params), adapters)["w"]
    output, pull = jax.vjp(lambda x: conv(x, update), x)
    (input_grad,) = pull(lora.apply(params, adapters, x) - target)
    for m in MOMENTS:
        np.testing.assert_allclose(found.output[m], jnp.mean(jnp.abs(output) ** m), rtol=1e-4)
        np.testing.assert_allclose(found.input_grad[m], jnp.mean(jnp.abs(input_grad) ** m), rtol=1e-4)


def test_a_look_up_has_an_output_and_no_input():
    def fn(p, i):
        return jnp.tanh(p["w"][i]) @ p["w"].T

    params, ids, target = {"w": normal(0, 9, 5)}, jnp.array([[3, 3], [0, 8]]), normal(2, 2, 2, 9)
    lora, adapters = adapted(lambda p, i: p["w"][i], {"w": params["w"]}, ids, targets="*")
    found = measured(lora, lambda run, ids: jnp.sum(run(ids) ** 2), params, adapters, ids)["w"]
    a, b = (np.asarray(adapters["w"][n], np.float64) for n in "ab")
    rows = 7 / np.sqrt(3) * a[np.asarray(ids)] @ b
    np.testing.assert_allclose(
        [found.output[m] for m in MOMENTS], [np.mean(np.abs(rows) ** m) for m in MOMENTS], rtol=2e-5
    )
    assert all(np.isnan(found.input_grad[m]) for m in MOMENTS)
    both, adapters = adapted(fn, params, ids, targets="*")  # tied: the head's data count for the input
    found = measured(both, lambda run, *of: squares(run, *of), params, adapters, ids, target)["w"]
    assert np.isfinite(found.input_grad[1]) and np.isfinite(found.output[1])


def test_low_precision_rounds_no_count():
    params, x = {"w": normal(0, 64, 64, dtype=jnp.bfloat16)}, normal(1, 33, 64, dtype=jnp.bfloat16)
    lora, adapters = adapted(lambda p, x: x @ p["w"], params, x, rank=3, dtype="bfloat16")
    found = measured(lora, lambda run, x: run(x).astype(jnp.float32).sum(), params, adapters, x)["w"]
    a, b, x = (np.asarray(f, np.float64) for f in (adapters["w"]["a"], adapters["w"]["b"], x))
    want = np.mean(np.square(7 / np.sqrt(3) * x @ a @ b))
    assert found.output[2].dtype == jnp.float32
    np.testing.assert_allclose(found.output[2], want, rtol=0.01)


@jax.custom_vjp
def opaque(x, w):
    return x @ w


opaque.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))


@pytest.mark.parametrize(
    ("fn", "x", "cause"),
    [
        (lambda p, x: x @ jnp.concatenate([p["w"], p["v"]], 1), normal(1, 2, 6), "concatenate"),
        (lambda p, x: opaque(x @ p["v"], p["w"].T), normal(1, 2, 6), "custom_vjp_call"),
    ],
)
@pytest.mark.filterwarnings("ignore::rslora_jax.RsloraWarning")
def test_a_use_without_an_output_of_its_own_is_refused(fn, x, cause):
    params = {"w": normal(0, 6, 6), "v": normal(1, 6, 6)}
    lora, adapters = adapted(fn, params, x, targets=["w", "v"])
    with pytest.raises(ValueError, match=rf"^[wv] cannot be measured: it is used by {cause}, .*; exclude it"):
        measure(lora, lambda run, x: run(x).sum(), params, adapters, x)


# Theorem 3.2, by the script that measures it.


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import stability

    with jax.enable_x64(True):
        yield stability


def exponents(script, name, gamma, ranks, seeds, steps=3):
    problem = script.PROBLEMS[name]()
    runs = [script.experiment(problem, script.GAMMAS[gamma][1], rank, steps) for rank in ranks]
    found = [[run(seed, problem.small)[0] for seed in range(seeds)] for run in runs]
    for quantity in script.QUANTITIES:
        values = np.array([[by_seed[quantity] for by_seed in by_rank] for by_rank in found])
        yield script.fit(name, gamma, quantity, ranks, values)


# The exponents of gamma^2 r and, for its parameters' gradients, gamma^2 r^1/2 and gamma r^1/2.
THEORY = {
    "1/sqrt(r)": (0, -0.5, 0),
    "1/r": (-1, -1.5, -0.5),
    "r^-1/4": (0.5, 0, 0.25),
    "r^-2": (-3, -3.5, -1.5),
    "constant": (1, 0.5, 0.5),
}


def check_theorem(fits, gamma):
    one, a, b = THEORY[gamma]
    expected = {"input gradient": one, "gradient of A": a, "gradient of B": b}
    expected |= {f"output, m = {m}": m * one for m in MOMENTS}
    assert {f.quantity for f in fits} == set(expected)
    for f in fits:
        assert f.theory == expected[f.quantity]
        assert abs(f.measured - f.theory) <= 0.1, f


@pytest.mark.parametrize("gamma", THEORY)
def test_theorem_3_2_holds_on_a_linear_layer(script, gamma):
    check_theorem(list(exponents(script, "linear layer", gamma, [200, 3000], seeds=10)), gamma)


@pytest.mark.nightly  # ten decoders to compile
@pytest.mark.parametrize("gamma", THEORY)
def test_theorem_3_2_holds_on_a_transformer(script, gamma):
    check_theorem(list(exponents(script, "transformer", gamma, [200, 3000], seeds=3)), gamma)


def test_the_interval_is_students(script):
    samples = np.random.default_rng(0).normal(size=5)
    half = 2.776445 * samples.std(ddof=1) / np.sqrt(5)  # Student's two-sided 95 % point of four degrees of freedom
    np.testing.assert_allclose(script.interval(samples), (samples.mean() - half, samples.mean() + half), rtol=1e-6)


@pytest.mark.nightly
def test_the_script_writes_a_csv_and_a_picture(tmp_path):
    command = [sys.executable, str(SCRIPTS / "stability.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr + done.stdout
    with (tmp_path / "stability_fits.csv").open() as file:
        assert all(row["agrees"] == "True" for row in csv.DictReader(file))
    with (tmp_path / "stability.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * 3 * 10
    assert (tmp_path / "stability.png").stat().st_size > 10_000
