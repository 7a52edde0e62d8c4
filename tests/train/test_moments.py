"""Moments in few bits: any optimiser takes nearly the steps that it takes in float32, and resumes to the last bit."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import rslora_jax as rslora
from rslora_jax import train
from rslora_jax.train.moments import low_moments
from rslora_jax.train.rounded import Bfloat16, EightBits
from tests.devices import run_on
from tests.train.optimizer_problem import Problem, equal, near, squares
from tests.train.test_every_optimizer import REFUSED, make, makers, put_together, saved_and_read

pytestmark = [pytest.mark.by_day_on("oldest"), pytest.mark.usefixtures("compile_fast")]
BY_DAY = ["adamw", "lbfgs", "lookahead", "schedule_free_adamw"]
NAMES = sorted({*makers(), *put_together()} - {*REFUSED})


def is_held(leaf):
    return isinstance(leaf, Bfloat16 | EightBits)


@pytest.fixture(scope="module")
def problem():
    return Problem()


@pytest.mark.filterwarnings("ignore:Specifying a key", "ignore:muon takes arrays of two axes")
@pytest.mark.parametrize("name", [n if n in BY_DAY else pytest.param(n, marks=pytest.mark.nightly) for n in NAMES])
def test_every_optimiser_takes_the_steps_of_float32_and_resumes_bit_for_bit(problem, tmp_path, name):
    whole = make(name) if name in makers() else put_together()[name][0]
    ended = []
    for optimizer in (whole, low_moments(whole, "bfloat16")):
        state = train.TrainState.create(problem.adapters, optimizer)
        step = train.make_step(problem.lora, squares, optimizer)
        for x in problem.batches[:2]:
            state, _ = step(state, problem.params, x)
        fresh = train.TrainState.create(problem.adapters, optimizer)
        again = saved_and_read(tmp_path / str(len(ended)), state, fresh)
        state, _ = step(state, problem.params, problem.batches[2])
        assert step._cache_size() == 1
        equal(step(again, problem.params, problem.batches[2])[0], state)
        ended.append(state)
    one, other = (jax.tree.map(lambda a, b: a - b, state.to_use, problem.adapters) for state in ended)
    near(other, one, 0.02)
    held = jax.tree.leaves(ended[1].opt_state, is_leaf=is_held)
    shapes = {leaf.shape for leaf in jax.tree.leaves(problem.adapters)}
    # What stays in float32 of the parameters' shapes is parameters, or what a search takes differences of.
    if not any(word in name for word in ("lbfgs", "search", "cocob", "dog", "dowg")):
        kept = [leaf for leaf in held if not is_held(leaf) and leaf.dtype == jnp.float32 and leaf.shape in shapes]
        whole_of_it = train.TrainState.create(problem.adapters, whole).opt_state
        values = [leaf for leaf in jax.tree.leaves(whole_of_it) if leaf.shape in shapes and jnp.any(leaf)]
        assert len(kept) <= len(values)


def wide(scanned=True):
    """Two stacked weights whose factors are large enough for 8 bits."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"up": jax.random.normal(keys[0], (3, 64, 96)) / 8, "down": jax.random.normal(keys[1], (3, 96, 64)) / 10}

    def model(p, x):
        return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w["up"]) @ w["down"], None), x, p)[0]

    x = jnp.ones((4, 64))
    lora = rslora.wrap(model, params, x, config=rslora.LoraConfig(rank=32, alpha=19))
    rng = np.random.default_rng(0)
    batches = [rng.normal(size=(16, 64)).astype("float32") for _ in range(40)]
    return lora, params, lora.init(keys[2]), batches


def loss(run, x):
    return jnp.sum((run(x) - jnp.roll(x, 1, -1)) ** 2), jnp.float32(x.size)


def adam_by_hand(lora, params, adapters, batches, rate, b1=0.9, b2=0.99, eps=1e-8):
    """Return the adapters of Adam in float64 (arXiv 1412.6980, algorithm 1), from gradients by JAX of a plain loss."""
    gradient = jax.jit(jax.grad(lambda a, x: loss(lambda x: lora.apply(params, a, x), x)[0] / x.size))
    leaves, tree = jax.tree.flatten(adapters)
    at = [np.asarray(leaf, np.float64) for leaf in leaves]
    m, v = ([np.zeros(leaf.shape) for leaf in leaves] for _ in range(2))
    for n, x in enumerate(batches, 1):
        found = jax.tree.leaves(gradient(jax.tree.unflatten(tree, [a.astype("float32") for a in at]), x))
        for k, g in enumerate(np.asarray(g, np.float64) for g in found):
            m[k], v[k] = b1 * m[k] + (1 - b1) * g, b2 * v[k] + (1 - b2) * g * g
            at[k] -= rate * (m[k] / (1 - b1**n)) / (np.sqrt(v[k] / (1 - b2**n)) + eps)
    return jax.tree.unflatten(tree, at)


@pytest.mark.parametrize(
    ("form", "apart", "part"), [("float32", 1e-4, 1), ("bfloat16", 0.02, 0.5), ("int8", 0.15, 0.33)]
)
def test_forty_steps_of_adam_are_nearly_those_in_float64(form, apart, part):
    lora, params, adapters, batches = wide()
    optimizer = low_moments(optax.adam(1e-3, b2=0.99), form)
    state = train.TrainState.create(adapters, optimizer)
    step = train.make_step(lora, loss, optimizer)
    for x in batches:
        state, _ = step(state, params, x)
    want = adam_by_hand(lora, params, adapters, batches, 1e-3)
    way = np.concatenate(
        [np.ravel(np.asarray(w) - a) for w, a in zip(*map(jax.tree.leaves, (want, adapters)), strict=True)]
    )
    off = np.concatenate(
        [np.ravel(np.asarray(w) - a) for w, a in zip(*map(jax.tree.leaves, (want, state.adapters)), strict=True)]
    )
    assert np.linalg.norm(off) < apart * np.linalg.norm(way)
    moments = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(adapters))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)) < part * moments + 100


@pytest.mark.parametrize("form", ["bfloat16", pytest.param("int8", marks=pytest.mark.nightly)])
def test_a_checkpoint_holds_the_small_arrays_and_goes_on_bit_for_bit(form, tmp_path):
    lora, params, adapters, batches = wide()
    optimizer = low_moments(optax.adamw(1e-3), form)

    def go(folder, steps, **how):
        given = dict(batches=batches, loss=loss, optimizer=optimizer, show=False, save_every=2)
        return train.fit(lora, params, adapters, steps=steps, folder=tmp_path / folder, **given, **how)

    whole, _ = go("whole", 6), go("parts", 4)
    equal(go("parts", 6, resume=True).adapters, whole.adapters)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(adapters))
    last = max(
        (tmp_path / "whole" / "checkpoints").iterdir(), key=lambda path: int(path.name) if path.name.isdigit() else -1
    )
    on_disk = sum(path.stat().st_size for path in last.rglob("*") if path.is_file())
    assert on_disk < size * {"bfloat16": 2.1, "int8": 1.9}[form]  # the adapters, and two moments (3.0 in float32)
    with pytest.raises(ValueError, match="trained otherwise"):
        given = dict(batches=batches, loss=loss, optimizer=optax.adamw(1e-3), show=False)
        train.fit(lora, params, adapters, steps=7, folder=tmp_path / "whole", resume=True, **given)


@pytest.mark.nightly
@pytest.mark.parametrize("form", ["bfloat16", "int8"])
def test_a_trial_of_a_sweep_is_the_run_alone(form):
    lora, params, _, batches = wide()

    def optimizer(rate):
        return low_moments(optax.adam(rate), form)

    trials = [train.Trial(1e-3), train.Trial(3e-3, seed=4)]
    found = train.sweep(lora, params, trials, batches=lambda seed: batches, loss=loss, optimizer=optimizer, steps=3)
    for trial, outcome in zip(trials, found, strict=True):
        one = optimizer(trial.learning_rate)
        begin = lora.init(jax.random.key(trial.seed))
        state, step = train.TrainState.create(begin, one), train.make_step(lora, loss, one)
        for x in batches[:3]:
            state, _ = step(state, params, x)
        moved, wanted = (jax.tree.map(lambda a, b: a - b, end, begin) for end in (outcome.adapters, state.adapters))
        # A gradient that differs in its last bit may be rounded to the other neighbour, here and there.
        off = np.concatenate([np.ravel(a - b) for a, b in zip(*map(jax.tree.leaves, (moved, wanted)), strict=True)])
        assert np.sqrt(np.mean(off**2)) < 0.02 * trial.learning_rate


@pytest.mark.nightly
def test_on_a_mesh_moments_lie_as_the_adapters_and_move_as_on_one_device():
    found = json.loads(run_on(4, "tests.train.moments_program").splitlines()[-1])
    for form, of in found.items():
        assert of["specs"] == of["adapter_specs"], form
        np.testing.assert_allclose(of["mesh"], of["one"], atol=2e-4, err_msg=form)
        assert of["compiled"] == 1


def test_forms_have_near_misses_and_float32_is_the_optimiser_itself():
    adam = optax.adam(1e-3)
    assert low_moments(adam, "float32") is adam
    with pytest.raises(
        ValueError, match=r"moments in 'bfloat' \(did you mean bfloat16\?\): they are held in float32, "
    ):
        low_moments(adam, "bfloat")


def test_parameters_that_an_optimiser_keeps_stay_as_they_are():
    _, _, adapters, _ = wide()
    for whole, kept in (
        (contrib.schedule_free_adamw(1e-3), lambda state: state.inner.z),
        (train.float32_masters(optax.adam(1e-3)), lambda state: state.inner.parameters),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = low_moments(whole, "int8").init(adapters)
        equal(kept(state), adapters)
        assert sum(map(is_held, jax.tree.leaves(state, is_leaf=is_held))) >= len(jax.tree.leaves(adapters))
