"""Schedules against formulas in numpy, and optimisers by name against optax by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rslora_jax as rslora
from rslora_jax import train
from rslora_jax.train.optimizers import make_optimizer, make_schedule, optimizers, parse_options

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]


def rates(schedule, steps):
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(steps)))


@pytest.mark.parametrize(("steps", "warmup", "rise"), [(50, 0.1, 5), (37, 0.3, 11), (12, 0.0, 0), (1, 0.5, 0)])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_every_step_has_the_rate_of_the_formula(name, steps, warmup, rise):
    n = np.arange(steps, dtype=np.float64)
    done = (n - rise) / (steps - rise)
    after = {"constant": 1 + 0 * n, "linear": 1 - done, "cosine": (1 + np.cos(np.pi * done)) / 2}[name]
    want = 3e-3 * np.where(n < rise, (n + 1) / (rise + 1), after)
    got = rates(make_schedule(name, peak=3e-3, steps=steps, warmup=warmup), steps)
    np.testing.assert_allclose(got, want, rtol=2e-5)
    assert got.min() > 0 and got[rise] == got.max() == np.float32(3e-3)


def test_the_last_step_of_a_long_run_learns_and_what_would_follow_does_not():
    for name in ("linear", "cosine"):
        schedule = make_schedule(name, peak=1.0, steps=100_000)
        assert 0 < float(schedule(99_999)) < 2e-5
        assert float(schedule(100_000)) == float(schedule(200_000)) == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"name": "cosin"}, "'cosin' is none of constant, linear, cosine"),
        ({"peak": 0.0}, "rate 0.0 is not a number above 0"),
        ({"peak": float("nan")}, "rate nan is not"),
        ({"steps": 0}, "schedule of 0 steps"),
        ({"warmup": 10}, "warmup=10 is not a part of the steps"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(options, text):
    with pytest.raises(ValueError, match=text):
        make_schedule(**{"name": "linear", "peak": 1e-3, "steps": 9} | options)


class Regression:
    """Fit y = x (W + a rank-3 update) with adapters of rank 3 on two stacked layers."""

    def __init__(self):
        keys = jax.random.split(jax.random.key(0), 5)

        def normal(key, *shape):
            return jax.random.normal(key, shape)

        self.params = {"w": normal(keys[0], 2, 24, 24) / 5}
        self.x = normal(keys[1], 96, 24)
        update = normal(keys[2], 2, 24, 3) @ normal(keys[3], 2, 3, 24) / 12

        def model(p, x):
            return jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]

        self.y = model({"w": self.params["w"] + update}, self.x)
        self.lora = rslora.wrap(model, self.params, self.x, config=rslora.LoraConfig(rank=3, alpha=7))

    def loss(self, adapters):
        return jnp.mean((self.lora.apply(self.params, adapters, self.x) - self.y) ** 2)

    def train(self, optimizer, steps):
        """Return the adapters and the loss at the start, after each step."""

        def step(carry, _):
            adapters, state = carry
            value, grads = jax.value_and_grad(self.loss)(adapters)
            updates, state = optimizer.update(grads, state, adapters)
            return (optax.apply_updates(adapters, updates), state), value

        @jax.jit
        def run(adapters):
            (adapters, _), values = jax.lax.scan(step, (adapters, optimizer.init(adapters)), None, steps)
            return adapters, jnp.append(values, self.loss(adapters))

        return run(self.lora.init(jax.random.key(1)))


@pytest.fixture(scope="module")
def regression():
    return Regression()


@pytest.mark.parametrize(
    ("name", "rate", "options"),
    [
        ("adam", 1e-2, {}),
        ("adamw", 1e-2, {"b1": 0.8, "nesterov": True}),
        ("lion", 1e-2, {}),
        ("lamb", 1e-2, {}),
        ("rmsprop", 1e-2, {}),
        ("sgd", 1e-2, {"momentum": 0.9}),
        ("adafactor", 1e-2, {"momentum": 0.9}),
    ],
)
def test_an_optimiser_by_name_lowers_the_loss(regression, name, rate, options):
    optimizer = make_optimizer(name, schedule=make_schedule("linear", peak=rate, steps=5), options=options)
    _, losses = regression.train(optimizer, 5)
    assert losses[-1] < 0.999 * losses[0]


def test_adamw_is_optax_by_hand_with_what_adapters_need(regression):
    def schedule(step):
        return 1e-2 / (step + 1)

    by_hand = optax.chain(optax.clip_by_global_norm(0.2), optax.adamw(schedule, b2=0.99, weight_decay=0.0))
    want, _ = regression.train(by_hand, 4)
    got, _ = regression.train(make_optimizer(schedule=schedule, clip=0.2), 4)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    decayed, _ = regression.train(make_optimizer(schedule=schedule, clip=0.2, options={"weight_decay": 0.5}), 4)
    assert np.abs(decayed["w"]["a"] - want["w"]["a"]).max() > 1e-4


def test_adafactor_learns_adapters_which_it_would_not_by_optax_defaults(regression):
    """B is zero, and optax's rate is in proportion to the parameter, or to 0.001 where that is more."""
    schedule = make_schedule(peak=2e-2, steps=80)
    _, ours = regression.train(make_optimizer("adafactor", schedule=schedule), 80)
    _, theirs = regression.train(optax.adafactor(schedule), 80)
    assert ours[-1] < 0.02 * ours[0]
    assert theirs[-1] > 0.9 * theirs[0]


def test_no_decay_is_added_to_what_optax_would_decay():
    for name in ("adamw", "lion", "nadamw", "adamaxw"):
        optimizer, ones = make_optimizer(name, schedule=1.0), jnp.ones((2, 3))
        updates, _ = optimizer.update(jnp.zeros((2, 3)), optimizer.init(ones), ones)
        np.testing.assert_array_equal(updates, 0)


def test_the_norm_of_all_gradients_is_clipped_or_not():
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}  # of norm 5

    def updated(clip):
        optimizer = make_optimizer("sgd", schedule=1.0, clip=clip)
        state = optimizer.init(grads)
        return optimizer.update(grads, state, grads)[0], jax.tree.structure(state)

    for clip, scale in [(2.0, 0.4), (9.0, 1.0), (None, 1.0), (0, 1.0)]:
        updates, structure = updated(clip)
        np.testing.assert_allclose(np.concatenate([updates["a"], updates["b"]]), scale * np.array([-3.0, 0, -4]))
        assert structure == updated(1.0)[1]


@pytest.mark.filterwarnings("ignore:Specifying a key", "ignore:muon takes arrays of two axes")
def test_every_optimiser_of_optax_has_a_state_of_arrays_or_is_refused():
    refused = set()
    adapters = {"w": {"a": jnp.ones((2, 4, 3)), "b": jnp.zeros((2, 3, 5))}}
    assert {"adamw", "sgd", "adafactor", "nadam", "optimistic_gradient_descent", "noisy_sgd"} < optimizers().keys()
    assert {"prodigy", "schedule_free_adamw", "muon", "momo", "cocob", "dowg"} < optimizers().keys()
    for name in optimizers():
        try:
            optimizer = make_optimizer(name, schedule=make_schedule(peak=1e-3, steps=9))
        except ValueError:
            refused.add(name)
            continue
        state = train.TrainState.create(adapters, optimizer).opt_state
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state)), name
    # What the adaptive rates multiply, and the size of a step, are numbers and no schedules.
    assert refused == {"optimistic_adam", "rprop", "sm3"} & optimizers().keys(), refused


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        (
            "AdamW",
            {},
            r"no optimiser 'AdamW' \(did you mean adamw\?\): it has acprop, adabelief, .* can be made in Python",
        ),
        ("scale_by_adam", {}, "no optimiser 'scale_by_adam'"),
        ("adamw", {"beta2": 0.9}, "adamw has no option 'beta2'.*: it has b1, b2, .*nesterov"),
        ("sign_sgd", {"b1": 0.9}, "sign_sgd has no option 'b1': it has none"),
        ("adamw", {"learning_rate": 1.0}, "the schedule gives it"),
        ("adamw", {"b2": "x"}, "adamw with b2=x cannot be used"),
        ("rprop", {}, "rprop with no options cannot be used with a schedule: "),
    ],
)
@pytest.mark.filterwarnings("ignore:Specifying a key")
def test_what_optax_has_not_is_named_with_what_it_has(name, options, text):
    with pytest.raises(ValueError, match=text):
        make_optimizer(name, schedule=make_schedule(peak=1e-3, steps=9), options=options)


def test_a_clip_below_zero_is_refused():
    with pytest.raises(ValueError, match="clip=-1 is not a norm"):
        make_optimizer(schedule=1e-3, clip=-1)


def test_options_are_read_from_text():
    texts = ["b2=0.99", "nesterov=true", "factored=False", "momentum=none", "ns=5", "eps=1e-6", " mu_dtype = bfloat16 "]
    options = parse_options(texts)
    want = [0.99, True, False, None, 5, 1e-6, "bfloat16"]
    assert list(options.values()) == want and [*map(type, options.values())] == [*map(type, want)]
    assert list(options) == ["b2", "nesterov", "factored", "momentum", "ns", "eps", "mu_dtype"]
    for text in ("b2", "=3", "b2="):
        with pytest.raises(ValueError, match="not of the form name=value"):
            parse_options([text])
    optimizer = make_optimizer("adamw", schedule=1e-3, options=parse_options(["mu_dtype=bfloat16", "eps=1e-6"]))
    assert jnp.bfloat16 in [leaf.dtype for leaf in jax.tree.leaves(optimizer.init(jnp.ones(3)))]


def test_muon_by_name_orthogonalises_each_matrix_of_a_stack(regression):
    """With a matrix of its own each: the singular values of its first update are near one, the rate apart."""
    optimizer = make_optimizer("muon", schedule=0.1, clip=None, lora=regression.lora)
    fresh = regression.lora.init(jax.random.key(1))
    adapters = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(5), x.shape), fresh)
    grads = jax.grad(regression.loss)(adapters)
    updates, _ = optimizer.update(grads, optimizer.init(adapters), adapters)
    for factor in ("a", "b"):
        for update, grad in zip(updates["w"][factor], grads["w"][factor], strict=True):
            u, _, v = np.linalg.svd(np.asarray(grad, np.float64), full_matrices=False)
            rows, columns = grad.shape
            turned = -u.T @ np.asarray(update) @ v.T / (0.1 * np.sqrt(max(1, columns / rows)))
            assert np.diag(turned).min() > 0.6 and np.diag(turned).max() < 1.3
            assert np.abs(turned - np.diag(np.diag(turned))).max() < 0.02
