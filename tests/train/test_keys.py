"""Random keys, typed and raw and of every implementation, wherever a key is taken or lies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rslora_jax as rslora
from rslora_jax import train
from rslora_jax.parallel import sharding
from rslora_jax.store import checkpoint
from rslora_jax.store.checksum import checksums
from rslora_jax.store.keys import as_data, as_keys, typed
from tests.train.test_every_optimizer import equal

pytestmark = [pytest.mark.by_day_on("oldest"), pytest.mark.usefixtures("compile_fast")]
IMPLS = ["threefry2x32", "rbg", "unsafe_rbg"]
KEYS = {impl: jax.random.key(7, impl=impl) for impl in IMPLS} | {"raw": jax.random.PRNGKey(7)}


def model(params, x):
    """A model whose parameters hold a key, as those of NNX modules with dropout do."""
    noise = jax.random.normal(params["rng"], x.shape) if "rng" in params else 0
    return (x + noise) @ params["w"]


@functools.cache
def problem(impl=None):
    params = {"w": jax.random.normal(jax.random.key(3), (5, 7))}
    if impl:
        params["rng"] = KEYS[impl]
    config = rslora.LoraConfig(rank=3, alpha=7)
    return rslora.wrap(model, params, jnp.ones((2, 5)), config=config), params


def drawn(run, batch, key):
    scale = 1.0 if key is None else 1 + jax.random.uniform(key)
    return scale * jnp.sum((run(batch) - 1) ** 2), jnp.float32(batch.size)


class Batches:
    def __getitem__(self, n):
        return np.random.default_rng(n).normal(size=(4, 5)).astype("float32")


def fit(folder, steps, impl=None, **options):
    lora, params = problem(impl)
    options = {"loss": drawn, "optimizer": optax.noisy_sgd(1e-2, key=KEYS["rbg"]), "show": False} | options
    return train.fit(
        lora, params, lora.init(jax.random.key(1)), batches=Batches(), steps=steps, folder=folder, **options
    )


@pytest.mark.parametrize("kind", KEYS)
def test_adapters_start_from_any_key(kind):
    lora, _ = problem()
    a = lora.init(KEYS[kind])["w"]["a"]
    assert 0.1 < float(jnp.std(a)) * np.sqrt(3 * 5) < 3 and a.shape == (5, 3)
    if kind == "raw":
        equal(lora.init(KEYS[kind]), lora.init(jax.random.key(7)))


@pytest.mark.parametrize("kind", KEYS)
def test_a_resumed_run_draws_on_bit_for_bit_with_its_own_implementation(tmp_path, kind):
    whole = fit(tmp_path / "whole", 4, key=KEYS[kind])
    fit(tmp_path / "parts", 2, key=KEYS[kind])
    # Another key, of another implementation, and another noise: what was saved is gone on with.
    other = {"key": KEYS["rbg" if kind != "rbg" else "raw"], "optimizer": optax.noisy_sgd(1e-2, key=jax.random.key(0))}
    parts = fit(tmp_path / "parts", 4, resume=True, **other)
    equal(parts.adapters, whole.adapters)
    losses = [r["loss"] for r in whole.records if "loss" in r]
    assert losses == [r["loss"] for r in parts.records if "loss" in r] and len(losses) == 4
    assert checkpoint.load_about(tmp_path / "whole")["keys"] == {
        "training/key": "threefry2x32" if kind == "raw" else kind,
        "training/opt_state/0/rng_key": "rbg",
    }
    if kind != "raw":  # by hand: step n draws from fold_in(fold_in(key, n), 0)
        key = jax.random.fold_in(jax.random.fold_in(KEYS[kind], 0), 0)
        first = np.mean((Batches()[0] @ problem()[1]["w"] - 1) ** 2) * 7 / 5
        assert losses[0] == pytest.approx(first * (1 + float(jax.random.uniform(key))), rel=1e-5)


def test_a_run_saved_before_implementations_were_is_gone_on_with(tmp_path, monkeypatch):
    whole = fit(tmp_path / "whole", 4, key=KEYS["rbg"])
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "as_data", lambda tree: (as_data(tree)[0], {}))
        fit(tmp_path / "parts", 2, key=KEYS["rbg"])
    equal(fit(tmp_path / "parts", 4, key=KEYS["rbg"], resume=True).adapters, whole.adapters)


@pytest.mark.parametrize("kind", KEYS)
def test_a_key_among_the_base_is_left_alone_and_told_by_its_bits(tmp_path, kind):
    lora, params = problem(kind)
    assert list(lora.sites) == ["w"] and "w" in str(lora)
    merged = lora.merge(params, lora.init(jax.random.key(0)))
    assert merged["rng"] is params["rng"]
    said = checksums(params)["rng"]
    assert said.split()[0] == {"raw": "uint32[2]", "threefry2x32": "key<fry>[]"}.get(kind, said.split()[0])
    other = params | {"rng": jax.tree.map(lambda k: jax.random.split(k)[0], params["rng"])}
    assert checksums(other)["rng"] != said
    mesh = sharding.make_mesh("fsdp=-1")
    where = sharding.param_shardings(params, mesh, [("w", ("fsdp", None))])
    assert checksums(jax.device_put(params, where)) == checksums(params)
    result = fit(tmp_path, 2, impl=kind, key=KEYS[kind])
    equal(checkpoint.load_adapters(tmp_path, params=params)[1], jax.device_get(result.adapters))
    with pytest.raises(ValueError, match=r"another base \(rng has other values\)"):
        checkpoint.load_adapters(tmp_path, params=other)


@pytest.mark.parametrize("kind", KEYS)
def test_a_run_on_a_mesh_with_keys_compiles_once_and_is_resumed(tmp_path, kind):
    lora, params = problem(kind)
    mesh = sharding.make_mesh("fsdp=-1")
    params = jax.device_put(params, sharding.param_shardings(params, mesh, [("w", (None, "fsdp"))]))
    adapters = lora.init(jax.random.key(1))
    adapters = jax.device_put(adapters, sharding.adapter_shardings(lora.sites, params))
    optimizer = optax.noisy_sgd(1e-2, key=jax.random.key(2, impl="rbg"))

    def go(folder, steps, **options):
        return train.fit(
            *(lora, params, adapters),
            **{
                "batches": Batches(),
                "loss": drawn,
                "optimizer": optimizer,
                "steps": steps,
                "folder": tmp_path / folder,
            },
            **{"key": KEYS[kind], "show": False, "batch_sharding": sharding.batch_sharding(mesh)} | options,
        )

    whole = go("whole", 4)
    state = train.TrainState.create(adapters, optimizer, KEYS[kind])
    step = train.make_step(lora, drawn, optimizer, shardings=jax.tree.map(lambda x: x.sharding, state))
    before = step._cache_size()
    go("parts", 2)
    equal(go("parts", 4, resume=True).adapters, whole.adapters)
    assert step._cache_size() == before == 1


def test_trials_of_a_sweep_draw_as_runs_alone_do():
    lora, params = problem()
    trials = [train.Trial(1e-2), train.Trial(2e-2, seed=1)]
    key = jax.random.key(4)
    found = train.sweep(
        *(lora, params, trials),
        **{"batches": lambda seed: Batches(), "loss": drawn, "optimizer": optax.sgd, "steps": 3, "key": key},
        heldout=[Batches()[9]],
    )
    for outcome in found:
        optimizer = optax.sgd(outcome.trial.learning_rate)
        step = train.make_step(lora, drawn, optimizer)
        state = train.TrainState.create(
            lora.init(jax.random.key(outcome.trial.seed)), optimizer, jax.random.fold_in(key, outcome.trial.seed)
        )
        for n in range(3):
            state, metrics = step(state, params, Batches()[n])
            assert float(metrics["loss"]) == pytest.approx(outcome.losses[n], rel=1e-5)
        held = np.mean((model(lora.merge(params, state.adapters), Batches()[9]) - 1) ** 2) * 7 / 5
        assert outcome.heldout[3].loss == pytest.approx(float(held), rel=1e-4)


def test_what_is_no_key_is_refused():
    lora, _ = problem()

    def create(key):
        return train.TrainState.create(lora.init(jax.random.key(0)), optax.sgd(1.0), key)

    raw = jax.random.PRNGKey(0, impl="rbg")
    with pytest.raises(ValueError, match=r"^uint32\[4\] is no raw key of the default implementation \(threefry2x32\)"):
        create(raw)
    with pytest.raises(ValueError, match=r"keys of shape \(2,\) were given, where one key is needed"):
        create(jax.random.split(jax.random.key(0)))
    with pytest.raises(ValueError, match="float32"):
        create(jnp.ones(2))
    assert typed(KEYS["rbg"]) is KEYS["rbg"]


def test_keys_become_arrays_and_keys_again():
    tree = {"one": KEYS["rbg"], "some": [jax.random.split(KEYS["unsafe_rbg"], 3), jnp.arange(3)]}
    arrays, impls = as_data(tree)
    assert impls == {"one": "rbg", "some/0": "unsafe_rbg"} and arrays["some"][0].shape == (3, 4)
    equal(as_keys(arrays, impls), tree)
