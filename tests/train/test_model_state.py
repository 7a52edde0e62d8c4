"""Models with state in training: it moves as with the model alone, and is resumed bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rslora_jax as rslora
from rslora_jax import train
from rslora_jax.store import checkpoint
from rslora_jax.train.gradient import mean_gradient
from rslora_jax.train.state import bound
from tests.devices import run_on
from tests.train.stateful import (
    KEY,
    Batches,
    X,
    of_equinox,
    of_linen,
    of_nnx,
    of_nnx_state,
    of_one_use,
)

pytestmark = [pytest.mark.xdist_group("fit"), pytest.mark.usefixtures("compile_fast")]

CONFIG = rslora.LoraConfig(rank=3, alpha=5.0)
OPTIMIZER = optax.adam(3e-2)
STEPS = 6


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(of_nnx, id="nnx"),
        pytest.param(of_linen, id="linen", marks=pytest.mark.by_day_on("oldest")),
        pytest.param(of_one_use, id="one use", marks=pytest.mark.by_day_on("newest")),
        pytest.param(of_nnx_state, id="nnx.State", marks=pytest.mark.nightly),
        pytest.param(of_equinox, id="equinox", marks=pytest.mark.nightly),
    ],
)
def case(request):
    return request.param()


@pytest.fixture(scope="module")
def lora(case):
    return rslora.wrap(case.fn, case.params, case.state, X, **case.held, config=CONFIG)


@pytest.fixture(scope="module")
def adapters(lora):
    return jax.tree.map(lambda leaf: leaf + 0.05, lora.init(jax.random.key(1)))


def numbers(tree):
    def is_key(leaf):
        return jnp.issubdtype(getattr(leaf, "dtype", int), jax.dtypes.prng_key)

    return [np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf) for leaf in jax.tree.leaves(tree)]


def assert_same(found, want, tolerance=0.0):
    assert jax.tree.structure(found) == jax.tree.structure(want)
    for got, wanted in zip(numbers(found), numbers(want), strict=True):
        assert got.dtype == wanted.dtype or tolerance
        np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance)


def merged(case, lora, adapters):
    """W + alpha / sqrt(r) A B by hand, for dense kernels (in, out) and (out, in)."""
    leaves, tree = jax.tree.flatten(case.params)
    names = [path.removesuffix("/value") for path in map(path_of, jax.tree_util.tree_leaves_with_path(case.params))]
    assert set(adapters) == set(lora.sites) <= set(names)

    def product(name):
        return CONFIG.alpha / np.sqrt(CONFIG.rank) * adapters[name]["a"] @ adapters[name]["b"]

    def change(name):
        return product(name).T if name.endswith("weight") else product(name)

    new = [w + change(name) if name in adapters else w for name, w in zip(names, leaves, strict=True)]
    return jax.tree.unflatten(tree, new)


def path_of(found):
    return jax.tree_util.keystr(found[0], simple=True, separator="/")


def by_hand(case, lora, adapters, steps, batches, parts=1, skipped=(), optimizer=OPTIMIZER):
    """Train the merged model by its own library and optax."""
    state, opt_state = case.state, optimizer.init(adapters)

    def copy(tree):
        return jax.tree.map(lambda leaf: leaf, tree)

    @jax.jit
    def gradient(adapters, state, part, key):
        def total(adapters):
            out, new = case.alone(merged(case, lora, adapters), copy(state), part["x"], **case.training(key))
            return jnp.sum((out - part["y"]) ** 2), new

        return jax.grad(total, has_aux=True)(adapters)

    for n in range(steps):
        if n in skipped:
            continue
        grads, rows = [], len(batches[n]["x"])
        for number in range(parts):
            part = jax.tree.map(lambda x: x[number::parts], batches[n])  # noqa: B023
            key = None if case.key is None else jax.random.fold_in(jax.random.fold_in(case.key, n), number)
            found, state = gradient(adapters, state, part, key)
            grads.append(found)
        mean = jax.tree.map(lambda *g: sum(g) / rows, *grads)  # noqa: B023
        updates, opt_state = optimizer.update(mean, opt_state, adapters)
        adapters = optax.apply_updates(adapters, updates)
    return adapters, state


def fitted(case, lora, adapters, folder, steps=STEPS, batches=None, **options):
    options = {"key": case.key, "heldout": [Batches()[50], Batches()[51]], "save_every": 2} | options
    return train.fit(
        lora,
        case.params,
        adapters,
        batches=batches or Batches(),
        loss=case.train_loss,
        heldout_loss=case.heldout_loss,
        model_state=case.state,
        optimizer=OPTIMIZER,
        steps=steps,
        folder=folder,
        show=False,
        **options,
    )


def test_a_run_moves_the_state_as_the_model_alone_and_goes_on_bit_for_bit(case, lora, adapters, tmp_path):
    before = numbers(case.state)
    whole = fitted(case, lora, adapters, tmp_path / "whole")
    for was, now in zip(before, numbers(case.state), strict=True):
        np.testing.assert_array_equal(was, now)  # what was given is left as it was
    want, state = by_hand(case, lora, adapters, STEPS, Batches())
    assert_same(whole.adapters, want, 2e-4)
    assert_same(whole.model_state, state, 1e-4)

    # By hand, the last held-out loss: that of the state at the end, which it does not move.
    evaluated = jax.jit(lambda state, x: case.alone(merged(case, lora, whole.adapters), state, x, **case.held)[0])
    held = [Batches()[50], Batches()[51]]
    total = sum(float(jnp.sum((evaluated(whole.model_state, one["x"]) - one["y"]) ** 2)) for one in held) / 16
    assert np.log(whole.heldout[STEPS]) == pytest.approx(total, rel=1e-5)

    first = fitted(case, lora, adapters, tmp_path / "parts", 3)
    assert any((a != b).any() for a, b in zip(before, numbers(first.model_state), strict=True))
    rest = fitted(case, lora, adapters, tmp_path / "parts", resume=True)
    assert_same(rest.adapters, whole.adapters)
    assert_same(rest.model_state, whole.model_state)
    loaded = checkpoint.load_model_state(tmp_path / "parts", case.state)
    assert_same(loaded, whole.model_state)
    assert_same(checkpoint.load_model_state(tmp_path / "whole", case.state, step=STEPS), loaded)


def test_the_state_goes_from_part_to_part_of_a_batch(case, lora, adapters):
    parts = 2
    optimizer = optax.sgd(1e-2)
    want, state = by_hand(case, lora, adapters, 2, Batches(), parts, optimizer=optimizer)
    now = train.TrainState.create(adapters, optimizer, case.key, case.state)
    step = train.make_step(lora, case.train_loss, optimizer, accumulate=parts)
    for n in range(2):
        now, _ = step(now, case.params, Batches()[n])
    assert_same(now.adapters, want, 1e-4)
    assert_same(now.model_state, state, 1e-4)
    assert step._cache_size() == 1


@pytest.mark.parametrize("skip", [True, False])
def test_a_batch_that_is_not_finite_leaves_the_state_as_it_was(case, lora, adapters, skip):
    now = train.TrainState.create(adapters, OPTIMIZER, case.key, case.state)
    step = train.make_step(lora, case.train_loss, OPTIMIZER, skip=skip)
    batches = Batches(poison=(1,))
    for n in range(4):
        now, _ = step(now, case.params, batches[n])
    good = by_hand(case, lora, adapters, *((4, batches, 1, (1,)) if skip else (1, batches)))
    assert_same(now.adapters, good[0], 1e-4)
    assert_same(now.model_state, good[1], 1e-4)


def test_devices_average_the_numbers_of_the_state(case, lora, adapters):
    stacked = jax.tree.map(lambda *rows: np.stack(rows), *[Batches()[n] for n in range(3)])

    def one(batch, axis):
        return mean_gradient(
            case.train_loss, bound(lora, case.params), adapters, batch, key=case.key, axis=axis, model_state=state
        ).model_state

    state = train.TrainState.create(adapters, OPTIMIZER, None, case.state).model_state
    found = jax.jit(jax.vmap(lambda batch: one(batch, "devices"), axis_name="devices", out_axes=0))(stacked)
    alone = jax.jit(lambda batch: one(batch, None))  # what is drawn has no part in the statistics
    each = [alone(Batches()[n]) for n in range(3)]
    for got, *ones in zip(numbers(found), *map(numbers, each), strict=True):
        want = np.mean(ones, 0) if np.issubdtype(got.dtype, np.floating) else ones[0]
        for device in range(3):
            np.testing.assert_allclose(got[device], want, atol=1e-5)


def test_pmap_carries_the_state(case, lora, adapters, request):
    if "equinox" in request.node.name:
        pytest.skip("Equinox's BatchNorm refuses pmap: to it, what differs over devices is of another type")
    now = train.TrainState.create(adapters, OPTIMIZER, case.key, case.state)
    step = train.make_pmap_step(lora, case.train_loss, OPTIMIZER)
    everywhere = train.replicate((now, case.params))
    spread = jax.tree.map(lambda x: x[None].repeat(jax.local_device_count(), 0), Batches()[0])
    got, _ = step(*everywhere, spread)
    want, _ = train.make_step(lora, case.train_loss, OPTIMIZER)(now, case.params, Batches()[0])
    assert_same(jax.tree.map(lambda leaf: leaf[0], got.model_state), want.model_state, 1e-6)


def test_trials_of_a_sweep_have_states_of_their_own(case, lora):
    trials = [train.Trial(3e-2, seed=1), train.Trial(1e-3, seed=2)]
    outcomes = train.sweep(
        lora,
        case.params,
        trials,
        batches=lambda seed: Batches(),
        loss=case.train_loss,
        heldout=[Batches()[50]],
        heldout_loss=case.heldout_loss,
        model_state=case.state,
        key=case.key,
        optimizer=optax.adam,
        steps=3,
    )
    for trial, outcome in zip(trials, outcomes, strict=True):
        optimizer = optax.adam(trial.learning_rate)
        key = None if case.key is None else jax.random.fold_in(case.key, trial.seed)
        now = train.TrainState.create(lora.init(jax.random.key(trial.seed)), optimizer, key, case.state)
        step = train.make_step(lora, case.train_loss, optimizer)
        for n in range(3):
            now, _ = step(now, case.params, Batches()[n])
        assert_same(outcome.model_state, now.model_state, 1e-4)
        evaluate = train.make_evaluate(lora, case.heldout_loss, keyed=case.key is not None)
        total, count = evaluate(case.params, now.adapters, Batches()[50], now.model_state)
        assert outcome.heldout[3].loss == pytest.approx(float(total / count), rel=1e-4)
    differ = [(a != b).any() for a, b in zip(*(numbers(o.model_state) for o in outcomes), strict=True)]
    assert any(differ)


def test_a_line_search_starts_each_try_from_the_same_state(case, lora, adapters):
    optimizer = optax.lbfgs(memory_size=2)
    now = train.TrainState.create(adapters, optimizer, case.key, case.state)
    step = train.make_step(lora, case.train_loss, optimizer)
    now, _ = step(now, case.params, Batches()[0])
    assert_same(now.model_state, by_hand(case, lora, adapters, 1, Batches())[1], 1e-4)


def test_a_loss_that_knows_of_no_state_can_be_given_one():
    case = of_nnx()
    lora = rslora.wrap(case.fn, case.params, case.state, X, train=True, config=CONFIG)

    def plain(run, batch):
        return (jnp.sum((run(batch["x"], train=True) - batch["y"]) ** 2), jnp.float32(8))

    states = []
    for loss in (train.with_state(plain), case.train_loss):
        now = train.TrainState.create(lora.init(KEY), OPTIMIZER, None, case.state)
        states.append(train.make_step(lora, loss, OPTIMIZER)(now, case.params, Batches()[0])[0])
    assert_same(*(s.adapters for s in states))
    assert_same(*(s.model_state for s in states))


def test_what_is_no_state_to_go_on_with_is_refused(tmp_path):
    case = of_nnx()
    lora = rslora.wrap(case.fn, case.params, case.state, X, train=True, config=CONFIG)

    def stepped(loss):
        now = train.TrainState.create(lora.init(KEY), OPTIMIZER, None, case.state)
        return train.make_step(lora, loss, OPTIMIZER)(now, case.params, Batches()[0])

    def changed(change):
        def loss(run, batch, state):
            total, count, state = case.train_loss(run, batch, state)
            return total, count, change(state)

        return loss

    with pytest.raises(ValueError, match=r"to return \(sum, count, state\)"):
        stepped(lambda *given: case.train_loss(*given)[:2])

    def half(state):
        return jax.tree.map(lambda x: x.astype("bfloat16") if x.dtype == jnp.float32 else x, state)

    with pytest.raises(ValueError, match=r"norm/mean is bfloat16\[7\], .* float32\[7\]"):
        stepped(changed(half))
    with pytest.raises(ValueError, match="more is float32"):
        stepped(changed(lambda state: {**state, "more": jnp.ones(())}))
    with pytest.raises(ValueError, match="of structure"):
        stepped(changed(lambda state: {**state, "empty": {}}))
    fitted(case, lora, lora.init(KEY), tmp_path, 1)
    with pytest.raises(ValueError, match="training/model_state"):
        train.fit(
            lora,
            case.params,
            lora.init(KEY),
            batches=Batches(),
            loss=lambda run, batch: (jnp.sum(run(case.state, batch["x"], train=True)[0]), jnp.float32(1)),
            heldout=[Batches()[50], Batches()[51]],
            optimizer=OPTIMIZER,
            steps=2,
            folder=tmp_path,
            resume=True,
            show=False,
        )
    with pytest.raises(ValueError, match="of another structure: norm/"):
        checkpoint.load_model_state(tmp_path, {**case.state, "norm": {}})


@pytest.mark.nightly
def test_on_a_mesh_the_state_is_that_of_the_whole_batch(tmp_path):
    said = run_on(8, "tests.train.mesh_state", str(tmp_path))
    of_each = [[float(word) for word in line.split()] for line in said.splitlines()]
    assert len(of_each) == 2
    for from_one_device, from_a_resumed_run in of_each:
        assert from_one_device < 1e-5 and from_a_resumed_run == 0
