"""Parameters that are trained whole, against the same numbers put into the base, over all programs of the laws."""

import functools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rslora_jax as rslora
from rslora_jax import train
from rslora_jax.analysis import spectrum
from rslora_jax.parallel import sharding
from rslora_jax.sites import from_paths, named_leaves
from rslora_jax.train.sweep import scaling_factors
from tests.program_models import normal
from tests.programs import CASES
from tests.reference import assert_near, gradients_by_hand, merged_by_hand
from tests.stored.eight_bits import eight_bits

pytestmark = pytest.mark.usefixtures("compile_fast")


def trainable(case):
    """Give the paths of the floating parameters that the program uses."""
    lora = rslora.wrap(case.fn, case.params, *case.args, config=rslora.LoraConfig(rank=3, targets=case.targets))
    leaves = named_leaves(case.params)
    floating = [p for p, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return [path for path in floating if path not in lora.unused and not lora.left_out.get(path, "").startswith("no p")]


def literal(path):
    return path.replace("[", "[[]")


def both_kinds(case):
    """Wrap with every other parameter trained whole, and adapters on what is left of the targets."""
    whole = trainable(case)[::2]
    config = rslora.LoraConfig(rank=6, alpha=10.0, targets=case.targets, trained=list(map(literal, whole)))
    return rslora.wrap(case.fn, case.params, *case.args, config=config), whole


def moved(adapters, seed=4):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(x + 0.15 * rng.standard_normal(x.shape), x.dtype), adapters)


def in_place(lora, params, adapters):
    """Put values into the base and add adapters to it, in numpy."""
    scaled = {path: own for path, own in adapters.items() if "a" in own}
    leaves = named_leaves(merged_by_hand(lora, params, scaled))
    values = {
        p: jnp.asarray(np.asarray(own["value"]), leaves[p].dtype) for p, own in adapters.items() if "value" in own
    }
    return from_paths(params, leaves | values)


DAY = ("linen tied, every matrix", "convolution grouped")


def each(day=DAY):
    return [name if name in day else pytest.param(name, marks=pytest.mark.nightly) for name in CASES]


@pytest.mark.by_day_on("newest")
@pytest.mark.parametrize("name", each())
def test_laws_1_and_2_on_every_program(name):
    case = CASES[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rslora.RsloraWarning)
        lora, whole = both_kinds(case)
        assert {path for path, site in lora.sites.items() if site.kind == "trained"} == {*whole}
        assert not any(lora.sites[path].fallbacks for path in whole)
        fresh = lora.init(jax.random.key(0), case.params)
        adapters = moved(fresh)
        merged = in_place(lora, case.params, adapters)
        chex.assert_trees_all_equal(in_place(lora, case.params, fresh), case.params)
        got, want = jax.jit(lora.apply)(case.params, fresh, *case.args), jax.jit(case.fn)(case.params, *case.args)
        assert_near(got, want, 1e-6 if case.tolerance < 1e-3 else case.tolerance)
        assert_near(lora.merge(case.params, adapters), merged, case.tolerance)
        apply, plain = (lambda a: lora.apply(case.params, a, *case.args)), (lambda p: case.fn(p, *case.args))
        assert_near(jax.jit(apply)(adapters), jax.jit(plain)(merged), max(case.tolerance, 2e-5))
        if name.startswith("control while"):  # of which JAX has no reverse mode
            return

        def loss(fn, of):
            return jnp.sum(jnp.sin(jax.tree.leaves(fn(of))[0].real.astype(jnp.float32)))

        grads = jax.jit(jax.grad(functools.partial(loss, apply)))(adapters)
        dw = named_leaves(jax.jit(jax.grad(functools.partial(loss, plain), allow_int=True))(merged))
    tolerance = max(50 * case.tolerance, 1e-3) if case.tolerance < 1e-3 else 0.15
    # A key's bias, and what else makes no difference behind a softmax, has rounding for a gradient.
    floor = (0.01 if case.tolerance < 1e-3 else 1) * max(float(jnp.abs(dw[path]).max(initial=0)) for path in whole)
    for path in whole:
        assert grads[path]["value"].dtype == jnp.float32
        assert_near(grads[path]["value"], dw[path], tolerance, floor=max(floor, 1e-3))


@pytest.mark.parametrize("name", each(()))
def test_law_1_no_bit_is_changed(name):
    case = CASES[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rslora.RsloraWarning)
        lora, _ = both_kinds(case)
    adapters = lora.init(jax.random.key(0), case.params)
    with jax.disable_jit():
        chex.assert_trees_all_equal(lora.apply(case.params, adapters, *case.args), case.fn(case.params, *case.args))


def tied(p, ids):
    def layer(x, w):
        return jnp.tanh(x @ w["kernel"] + w["bias"]) * p["scale"], None

    x, _ = jax.lax.scan(jax.checkpoint(layer), p["embed"]["embedding"][ids], p["layers"])
    return x @ p["embed"]["embedding"].T


def parts():
    layers = {"kernel": normal(0, 3, 8, 8), "bias": normal(1, 3, 8)}
    base = {
        "embed": {"embedding": normal(2, 11, 8)},
        "layers": layers,
        "scale": jnp.float32(1.25),
        "spare": jnp.ones(3),
    }
    return base, jnp.arange(5)


def wrapped(**config):
    params, ids = parts()
    return rslora.wrap(tied, params, ids, config=rslora.LoraConfig(**{"rank": 3, "alpha": 7.0} | config)), params, ids


WHOLE = ("*/bias", "scale", "*/embedding")


def test_scanned_remat_and_tied_at_once():
    lora, params, ids = wrapped(trained=WHOLE)
    adapters = moved(lora.init(jax.random.key(0), params))
    merged = in_place(lora, params, adapters)
    assert_near(lora.merge(params, adapters), merged, 1e-6)
    grad = jax.jit(jax.grad(lambda a: jnp.sin(lora.apply(params, a, ids)).sum()))(adapters)
    dw = named_leaves(jax.jit(jax.grad(lambda p: jnp.sin(tied(p, ids)).sum()))(merged))
    assert_near(lora.apply(params, adapters, ids), tied(merged, ids), 1e-5)
    for path in ("layers/bias", "scale", "embed/embedding"):
        assert_near(grad[path]["value"], dw[path], 1e-5)
    by_chain = gradients_by_hand(lora, {"layers/kernel": adapters["layers/kernel"]}, dw)
    assert_near(grad["layers/kernel"], by_chain["layers/kernel"], 1e-4)


def test_all_that_goes_over_sites_copes_with_them():
    lora, params, _ = wrapped(trained=WHOLE)
    assert [site.kind for site in lora.sites.values()] == ["linear", "trained", "trained", "trained"]
    assert lora.sites["layers/bias"].stack_axes == (0,) and lora.sites["scale"].shape == ()
    assert lora.num_parameters == 3 * 2 * 24 + 24 + 1 + 88
    text = str(lora)
    assert "on 3 matrices and 3 trained whole" in text and "embedding: by name only" not in text
    assert lora.labels()["layers/bias"] == {"value": "trained"}
    adapters = lora.init(jax.random.key(0), params)
    assert adapters["scale"]["value"] is not params["scale"]
    with pytest.raises(ValueError, match=r"Trained starts from the values of embed/embedding: give the base"):
        lora.init(jax.random.key(0))

    ones = jax.tree.map(jnp.ones_like, adapters)
    for optimizer in (train.scale_by_rank(lora, reference_rank=8), train.lora_plus(lora, 16.0)):
        after, _ = optimizer.update(ones, optimizer.init(adapters))
        assert float(after["scale"]["value"]) == 1 and float(after["layers/kernel"]["b"].max()) > 1
    assert [m.path for m in spectrum.measure(lora.config, adapters)] == ["layers/kernel"] * 3
    assert [m.path for m in spectrum.measure(lora.config, adapters, sites=lora.sites)] == ["layers/kernel"] * 3
    assert rslora.LoraConfig.from_json(lora.config.to_json()) == lora.config


def test_a_sweep_over_scalings_leaves_values_be():
    lora, *_ = wrapped(trained=WHOLE)
    trials = [train.Trial(learning_rate=0.1, scaling=s) for s in ("rslora", "lora")]
    factors = scaling_factors(lora, trials)
    assert set(factors) == {"layers/kernel"}


@pytest.mark.by_day_on("newest")
def test_values_lie_on_a_mesh_as_their_weights_do():
    lora, params, _ = wrapped(trained=WHOLE)
    mesh = sharding.make_mesh("fsdp=-1")
    placed = jax.device_put(params, sharding.param_shardings(params, mesh, [("*/embedding", (None, "fsdp"))]))
    where = sharding.adapter_shardings(lora.sites, placed)
    assert tuple(where["embed/embedding"]["value"].spec) == (None, "fsdp")
    adapters = lora.init(jax.random.key(0), placed)
    assert adapters["embed/embedding"]["value"].sharding.is_equivalent_to(placed["embed"]["embedding"].sharding, 2)


@pytest.mark.by_day_on("newest")
def test_a_value_is_held_in_float32_beside_a_narrow_base_and_cast_at_use():
    params, ids = parts()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    lora = rslora.wrap(tied, params, ids, config=rslora.LoraConfig(rank=3, alpha=7, trained=WHOLE))
    adapters = moved(lora.init(jax.random.key(0), params))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(adapters))
    dw = jax.grad(lambda p: tied(p, ids).astype(jnp.float32).sum())(lora.merge(params, adapters))
    grads = jax.grad(lambda a: lora.apply(params, a, ids).astype(jnp.float32).sum())(adapters)
    assert grads["scale"]["value"].dtype == jnp.float32 and dw["scale"].dtype == jnp.bfloat16


@pytest.mark.by_day_on("oldest")
def test_a_stored_weight_becomes_the_array():
    params, x = {"w": eight_bits(normal(0, 8, 16)), "v": eight_bits(normal(1, 16, 4))}, normal(2, 5, 8)

    def fn(p, x):
        return jnp.tanh(x @ p["w"]) @ jnp.sort(p["v"], 0)  # of which there is no low-rank form

    lora = rslora.wrap(fn, params, x, config=rslora.LoraConfig(rank=3, alpha=7, targets="w", trained="v"))
    adapters = lora.init(jax.random.key(0), params)
    assert_near(
        lora.apply(params, adapters, x),
        fn(jax.tree.map(lambda w: w.dense(), params, is_leaf=lambda n: hasattr(n, "dense")), x),
        1e-6,
    )
    adapters["v"]["value"] = normal(3, 16, 4)
    merged = lora.merge(params, adapters)
    np.testing.assert_array_equal(merged["v"], adapters["v"]["value"])


def test_what_is_trained_goes_before_targets():
    lora, *_ = wrapped(targets=["*/embedding@product", "*/kernel"], trained="*/embedding")
    assert list(lora.sites) == ["layers/kernel", "embed/embedding"]
    assert lora.sites["embed/embedding"].kind == "trained"
    lora, *_ = wrapped(targets=(), trained="scale")
    assert list(lora.sites) == ["scale"] and "1 parameters to train on 1 trained whole" in str(lora)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("*/baise", r"trained '\*/baise' matches no parameter: did you mean .*layers/bias"),
        ("spare", "trained 'spare' matches spare, which is not used: no output depends on it"),
        ("s*", "matches spare, which is not used"),
        ("count", "holds int32, and only floating numbers are trained"),
        ("*/embedding@lookup", "names one use of a weight, and a parameter is trained whole: leave out @lookup"),
    ],
)
def test_what_cannot_be_trained_is_said(pattern, said):
    params, ids = parts()

    def fn(p, ids):
        return tied(p, ids) + p["count"]

    with pytest.raises(ValueError, match=said):
        rslora.wrap(fn, params | {"count": jnp.int32(1)}, ids, config=rslora.LoraConfig(rank=3, trained=pattern))
    with pytest.raises(ValueError, match="are no patterns"):
        rslora.LoraConfig(trained=[3])


@pytest.mark.by_day_on("oldest")
def test_several_of_which_one_trains_a_parameter_lie_in_one_shape():
    one, params, ids = wrapped(trained=WHOLE)
    other, third = wrapped()[0], wrapped(trained_rows={"*/embedding": [3, 1]})[0]
    pairs = [(lora, moved(lora.init(jax.random.key(n), params), n)) for n, lora in enumerate((one, other))]
    lora, stacked = rslora.stack(pairs, params)
    assert rslora.wrap(tied, params, ids, config=lora.config).sites == lora.sites
    got = jax.vmap(lora.apply, (None, 0, None))(params, stacked, ids)
    want = jnp.stack([own.apply(params, its, ids) for own, its in pairs])
    assert_near(got, want, 1e-5)
    with pytest.raises(ValueError, match=r"embed/embedding cannot be joined: the .* of one adapter is"):
        rslora.stack([pairs[0], (third, third.init(jax.random.key(0), params))], params)
    with pytest.raises(
        ValueError, match=r"trains embed/embedding itself, .*: give the base, combine\(\.\.\., params=params\)"
    ):
        rslora.combine(pairs, [1.0, 0.5], "cat")


@pytest.mark.nightly
def test_a_run_saves_resumes_and_gives_them_back(tmp_path):
    lora, params, ids = wrapped(trained=WHOLE)

    def loss(run, batch):
        return jnp.sum(jnp.square(run(batch))), jnp.float32(1)

    def fit(steps, folder, resume=False):
        start = lora.init(jax.random.key(0), params)
        how = {"loss": loss, "optimizer": optax.adam(0.01), "folder": folder, "resume": resume, "save_every": 2}
        return train.fit(lora, params, start, batches=[ids] * 4, steps=steps, **how)

    before = jax.tree.map(np.asarray, params)
    whole = fit(4, tmp_path / "whole").adapters
    fit(2, tmp_path / "parts")
    chex.assert_trees_all_equal(fit(4, tmp_path / "parts", resume=True).adapters, whole)
    chex.assert_trees_all_equal(params, before)
    assert np.abs(whole["scale"]["value"] - params["scale"]) > 0.01
    config, read = rslora.store.checkpoint.load_adapters(tmp_path / "parts", params=params)
    assert config == lora.config
    chex.assert_trees_all_equal(read, whole)
