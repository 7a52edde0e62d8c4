"""A method is one file: one of a test's own, with a gain along the out-axes, goes through everything."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rslora_jax as rslora
from rslora_jax.analysis import spectrum
from rslora_jax.interop import Weight, save_peft
from rslora_jax.methods import Method, method_of
from rslora_jax.parallel import sharding
from rslora_jax.sites import from_paths, named_leaves
from rslora_jax.train.optimizers import muon_axes
from tests.methods.gained import Gained, by_hand, gradients_by_hand, trained
from tests.program_models import normal
from tests.programs import CASES, each_at_night
from tests.reference import assert_near

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]

CONFIG = dict(rank=6, alpha=10.0, method=Gained())


def merged_by_hand(lora, params, adapters):
    leaves = named_leaves(params)
    acting = {path: by_hand(site, leaves[path], adapters[path]) for path, site in lora.sites.items()}
    cast = {path: jnp.asarray(w, leaves[path].dtype) for path, w in acting.items()}
    return from_paths(params, leaves | cast)


@pytest.mark.parametrize("name", each_at_night())
def test_values_gradients_and_merged_weights_are_those_of_the_definition(name):
    case = CASES[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rslora.RsloraWarning)
        lora = rslora.wrap(case.fn, case.params, *case.args, config=rslora.LoraConfig(**CONFIG, targets=case.targets))
        adapters = trained(lora.init(jax.random.key(0)))
        acting = merged_by_hand(lora, case.params, adapters)

        def loss(fn, of):
            out = jax.tree.leaves(fn(of))[0]
            return jnp.sum(jnp.sin(out.real.astype(jnp.float32))), out

        apply, plain = (lambda a: lora.apply(case.params, a, *case.args)), (lambda p: case.fn(p, *case.args))
        tolerance = max(2 * case.tolerance, 2e-5)
        assert_near(jax.jit(apply)(adapters), jax.jit(plain)(acting), tolerance)
        assert_near(lora.merge(case.params, adapters), acting, max(1e-6, tolerance))
        if name.startswith("control while"):  # of which JAX has no reverse mode
            return
        grads, _ = jax.jit(jax.grad(functools.partial(loss, apply), has_aux=True))(adapters)
        dw, _ = jax.jit(jax.grad(functools.partial(loss, plain), has_aux=True, allow_int=True))(acting)
    weights, of_weights = named_leaves(case.params), named_leaves(dw)
    for path, site in lora.sites.items():
        by_chain = gradients_by_hand(site, weights[path], adapters[path], of_weights[path])
        assert_near(grads[path], by_chain, 50 * tolerance, floor=1e-3)


def test_a_fresh_one_changes_no_bit():
    fn, params, x = (
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"],
        {"w": normal(0, 9, 7), "v": normal(1, 7, 5)},
        normal(2, 4, 9),
    )
    lora = rslora.wrap(fn, params, x, config=rslora.LoraConfig(**CONFIG | {"rank": 3}))
    with jax.disable_jit():
        np.testing.assert_array_equal(lora.apply(params, lora.init(jax.random.key(0)), x), fn(params, x))


def test_no_array_of_the_weights_size_is_made():
    size, rows, plain = 512, 8, {}
    params, x = {"w": normal(0, size, size), "v": normal(1, size, size)}, normal(2, rows, size)

    def fn(p, x):
        return jnp.tanh(x @ p["w"]) @ p["v"]

    for name, method in (("lora", "lora"), ("gained", Gained())):
        lora = rslora.wrap(fn, params, x, config=rslora.LoraConfig(rank=6, alpha=10, method=method))
        step = jax.jit(jax.grad(lambda a, p, x, lora=lora: jnp.sum(lora.apply(p, a, x) ** 2)))
        plain[name] = step.lower(lora.init(jax.random.key(0)), params, x).compile().memory_analysis().temp_size_in_bytes
    assert plain["gained"] < plain["lora"] + size * size * 4 / 2


def test_all_that_goes_over_an_adapter_goes_over_its_arrays(tmp_path):
    fn, params, x = lambda p, x: x @ p["w"], {"w": normal(0, 9, 7)}, normal(2, 4, 9)
    config = rslora.LoraConfig(**CONFIG | {"rank": 3})
    lora = rslora.wrap(fn, params, x, config=config)
    adapters = trained(lora.init(jax.random.key(0)))
    assert lora.sites["w"].factor_shapes == {"a": (9, 3), "b": (3, 7), "m": (7,)}
    assert lora.num_parameters == 27 + 21 + 7 and f"{lora.num_parameters:,} parameters" in str(lora)
    (found,) = spectrum.measure(config, adapters, sites=lora.sites)
    assert found.rank == 3
    mesh = sharding.make_mesh("fsdp=-1")
    placed = jax.device_put(params, sharding.param_shardings(params, mesh, [("w", (None, "fsdp"))]))
    where = sharding.adapter_shardings(lora.sites, placed)["w"]
    assert {name: tuple(of.spec) for name, of in where.items()} == {
        "a": (None, None),
        "b": (None, "fsdp"),
        "m": ("fsdp",),
    }
    assert muon_axes(lora)["w"]["m"] is None and muon_axes(lora)["w"]["a"] is not None
    for broken, said in (
        ({"a": adapters["w"]["a"], "b": adapters["w"]["b"]}, "has no m: it needs one of shape"),
        (adapters["w"] | {"n": adapters["w"]["m"]}, "has a n, which this config's method does not use"),
    ):
        with pytest.raises(ValueError, match=said):
            lora.apply(params, {"w": broken}, x)
    with pytest.raises(ValueError, match="method is an object, which JSON cannot hold"):
        config.to_json()


@dataclasses.dataclass(frozen=True)
class FromBase(Gained):
    """A gain that starts as the norm of each column."""

    needs_base = True

    def init(self, site, key, w, config):
        return {**super().init(site, key, None, config), "m": jnp.linalg.norm(w, axis=site.in_axes)}


def test_a_method_that_needs_the_bases_values_says_so():
    params = {"w": normal(0, 9, 7)}
    lora = rslora.wrap(
        lambda p, x: x @ p["w"], params, normal(2, 4, 9), config=rslora.LoraConfig(rank=3, method=FromBase())
    )
    with pytest.raises(
        ValueError, match=r"FromBase starts from the values of w: give the base, `lora.init\(key, params\)`"
    ):
        lora.init(jax.random.key(0))
    np.testing.assert_allclose(
        lora.init(jax.random.key(0), params)["w"]["m"], np.linalg.norm(params["w"], axis=0), rtol=1e-6
    )


def test_an_array_that_has_no_name_in_peft_is_said_and_not_left_out(tmp_path):
    params = {"w": normal(0, 9, 7)}
    config = rslora.LoraConfig(rank=3, alpha=7, method=Gained())
    lora = rslora.wrap(lambda p, x: x @ p["w"], params, normal(2, 4, 9), config=config)
    with pytest.raises(ValueError, match="the m of w has no name in PEFT: Gained gives none"):
        save_peft(
            tmp_path / "out", lora, lora.init(jax.random.key(0)), {"w": Weight("up.weight", True)}, base_model="b"
        )
    assert not (tmp_path / "out").exists()


def test_a_method_is_known_by_its_files_name():
    assert rslora.LoraConfig(method="lora") == rslora.LoraConfig()
    assert isinstance(method_of("lora").needs_base, bool) and Method is not None
    for name in ("lorra", "random", "method"):
        with pytest.raises(ValueError, match=f"method='{name}' is not known: use 'dora', 'lora', or a Method"):
            rslora.LoraConfig(method=name)
