"""What a config accepts, keeps and refuses, and how it selects weights."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rslora_jax as rslora
from tests.program_models import normal
from tests.programs import CASES
from tests.reference import trained

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rank": 0}, "rank=0 is not a positive whole number"),
        ({"rank": -3}, "rank=-3"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"rank": True}, "rank=True"),
        ({"rank_pattern": {"*": 0}}, "rank=0"),
        ({"alpha": 0}, "alpha=0 is not a positive number"),
        ({"alpha": math.inf}, "alpha=inf"),
        ({"alpha": math.nan}, "alpha=nan"),
        ({"alpha_pattern": {"*": -1}}, "alpha=-1"),
        ({"scaling": "rslroa"}, "scaling='rslroa' is not known: use one of rslora, lora, constant"),
        ({"init": "kaiming"}, "init='kaiming' is not known"),
        ({"on_fallback": "ignore"}, "on_fallback='ignore' is not known"),
        ({"dtype": "int8"}, "dtype='int8' is not a floating dtype"),
        ({"dtype": "float33"}, "dtype='float33' is not a floating dtype"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(fields, said):
    with pytest.raises(ValueError) as error:
        rslora.LoraConfig(**fields)
    assert said in str(error.value)


def test_a_config_survives_json_and_functions_do_not():
    config = rslora.LoraConfig(
        rank=24,
        alpha=5,
        scaling="lora",
        targets=["*/a", "*/b"],
        exclude="*/c",
        rank_pattern={"*/a": 3, "*": 5},
        alpha_pattern=[("*/b", 2.5)],
        init="gaussian",
        dtype="bfloat16",
        on_fallback="error",
        allow_large_rank=True,
    )
    assert rslora.LoraConfig.from_json(config.to_json()) == config
    assert hash(config) == hash(rslora.LoraConfig.from_json(config.to_json()))
    with pytest.raises(ValueError, match="scaling is a function, which JSON cannot hold"):
        rslora.LoraConfig(scaling=lambda r: 1 / r).to_json()
    with pytest.raises(ValueError, match="no field later"):
        rslora.LoraConfig.from_json('{"rank": 3, "later": 1}')


PARAMS = {
    "layers": [{"q_proj": normal(n, 8, 8), "v_proj": normal(n, 8, 4), "bias": jnp.ones(8)} for n in range(2)],
    "unused": normal(5, 8, 8),
}


def fn(params, x):
    for layer in params["layers"]:
        x = x @ layer["q_proj"] + layer["bias"] + (x @ layer["v_proj"]).sum(-1, keepdims=True)
    return x


X = jnp.ones((2, 8))
EVERY = ["layers/0/q_proj", "layers/0/v_proj", "layers/1/q_proj", "layers/1/v_proj"]


def sites(**fields):
    return rslora.wrap(fn, PARAMS, X, config=rslora.LoraConfig(**{"rank": 3, "alpha": 7, **fields})).sites


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({}, EVERY),
        ({"targets": "*/q_proj"}, EVERY[::2]),
        ({"targets": ["*/{q,v}_proj"], "exclude": ["layers/1/*"]}, EVERY[:2]),
        ({"targets": ["layers/0/q_proj", "layers/1/v_proj"]}, [EVERY[0], EVERY[3]]),
        ({"exclude": "*/v_*"}, EVERY[::2]),
        ({"targets": ["all-linear"], "exclude": "layers/[0]/*"}, EVERY[2:]),
    ],
)
def test_globs_choose_the_weights(fields, want):
    assert sorted(sites(**fields)) == want


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"targets": "*/q_porj"}, ["'*/q_porj' matches no weight", "layers/0/q_proj"]),
        ({"targets": ["*/q_proj", "*/k_proj"]}, ["'*/k_proj' matches no weight"]),
        ({"targets": "*/bias"}, ["layers/0/bias of shape (8,)", "cannot be adapted as it is used (norm or bias"]),
        ({"targets": "unused"}, ["unused of shape (8, 8)", "no output depends on it"]),
        ({"exclude": "*/o_proj"}, ["exclude '*/o_proj' matches no weight"]),
        ({"exclude": "*"}, ["no weight is left to adapt"]),
        ({"rank_pattern": {"*/k_proj": 2}}, ["rank_pattern '*/k_proj' matches no adapted weight"]),
        ({"targets": "*/q_proj", "alpha_pattern": {"*/v_proj": 2}}, ["alpha_pattern '*/v_proj' matches no adapted"]),
        (
            {"rank_pattern": {"*/q_proj": 9}},
            ["rank 9 is above 8, the full rank of layers/0/q_proj", "allow_large_rank"],
        ),
    ],
)
def test_a_config_that_does_not_fit_says_what_would(fields, said):
    with pytest.raises(ValueError) as error:
        sites(**fields)
    assert all(part in str(error.value) for part in said), str(error.value)


def test_the_first_pattern_that_matches_gives_a_weight_its_rank_and_alpha():
    found = sites(rank_pattern={"layers/0/q_proj": 5, "*/q_proj": 2}, alpha_pattern=[("layers/1/*", 11)])
    assert {path: (s.rank, s.alpha) for path, s in found.items()} == {
        "layers/0/q_proj": (5, 7),
        "layers/0/v_proj": (3, 7),
        "layers/1/q_proj": (2, 11),
        "layers/1/v_proj": (3, 11),
    }
    assert found["layers/1/q_proj"].gamma == pytest.approx(11 / math.sqrt(2))
    assert found["layers/0/q_proj"].factor_shapes == {"a": (8, 5), "b": (5, 8)}


def test_a_rank_above_the_full_one_is_exact_where_it_is_asked_for_and_said():
    config = rslora.LoraConfig(rank=6, alpha=7, allow_large_rank=True)
    with pytest.warns(rslora.RsloraWarning, match="rank 6 is above 4, the full rank of layers/0/v_proj"):
        lora = rslora.wrap(fn, PARAMS, X, config=config)
    adapters = trained(lora)
    np.testing.assert_allclose(
        lora.apply(PARAMS, adapters, X), fn(lora.merge(PARAMS, adapters), X), rtol=2e-5, atol=1e-4
    )


def test_adapters_or_parameters_of_another_make_are_named_by_path_and_shape():
    lora = rslora.wrap(fn, PARAMS, X, config=rslora.LoraConfig(rank=3, alpha=7))
    adapters = lora.init(jax.random.key(0))

    def refuse(params, adapters, *said):
        for act in (lambda: lora.apply(params, adapters, X), lambda: lora.merge(params, adapters)):
            with pytest.raises(ValueError) as error:
                act()
            assert all(part in str(error.value) for part in said), str(error.value)

    other = rslora.wrap(fn, PARAMS, X, config=rslora.LoraConfig(rank=2, alpha=7)).init(jax.random.key(0))
    refuse(PARAMS, other, "layers/0/q_proj/a has shape (8, 2)", "(8, 3)", "another config or another base")
    refuse(PARAMS, {k: v for k, v in adapters.items() if k != EVERY[2]}, f"have none for {EVERY[2]}")
    refuse(PARAMS, adapters | {"mlp/up": adapters[EVERY[0]]}, "have mlp/up, which this config does not adapt")
    refuse(PARAMS, adapters | {EVERY[1]: {"a": adapters[EVERY[1]]["a"]}}, f"{EVERY[1]} has no b")
    bigger = PARAMS | {"unused": normal(5, 8, 9)}
    refuse(bigger, adapters, "unused has shape (8, 9)", "(8, 8)")
    refuse({"layers": PARAMS["layers"]}, adapters, "no unused")


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        (lambda ab: None, "is of type NoneType: it is to be a dict of a, b"),
        (lambda ab: [ab["a"], ab["b"]], "is of type list: it is to be a dict of a, b"),
        (lambda ab: jnp.ones(3), "is of type ArrayImpl"),
        (lambda ab: {"lora": ab}, "has no a: it needs one of shape (8, 3)"),
        (lambda ab: ab | {"magnitude": jnp.ones(8)}, "has a magnitude, which this config's method does not use"),
        (lambda ab: ab | {"a": None}, "/a is of type NoneType: it is to be a floating array of (8, 3)"),
        (lambda ab: ab | {"b": [[1.0] * 8] * 3}, "/b is of type list"),
        (lambda ab: ab | {"b": jnp.ones((3, 8), int)}, "/b is of type int32"),
        (lambda ab: ab | {"a": jnp.ones((8, 3), complex)}, "/a is of type complex64"),
        (lambda ab: ab | {"a": jnp.ones((3, 8))}, "/a has shape (3, 8), and this config asks for (8, 3)"),
    ],
)
def test_factors_of_another_make_are_named(factors, said):
    lora = rslora.wrap(fn, PARAMS, X, config=rslora.LoraConfig(rank=3, alpha=7))
    adapters = lora.init(jax.random.key(0))
    for act in (lora.apply, lambda p, a, x: lora.merge(p, a)):
        with pytest.raises(ValueError) as error:
            act(PARAMS, adapters | {EVERY[2]: factors(adapters[EVERY[2]])}, X)
        assert str(error.value).startswith(f"adapter {EVERY[2]}") and said in str(error.value)
        for other in (None, [], jnp.ones(3)):
            with pytest.raises(ValueError, match=f"the adapters are of type {type(other).__name__}: `init` gives"):
                act(PARAMS, other, X)


class Keyed:
    """A pytree whose two children are an attribute and a key of one name."""

    def __init__(self, *children):
        self.children = children

    def tree_flatten_with_keys(self):
        kinds = (jax.tree_util.GetAttrKey, jax.tree_util.DictKey)
        return [(kind("w"), child) for kind, child in zip(kinds, self.children, strict=True)], None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


jax.tree_util.register_pytree_with_keys_class(Keyed)
W = [normal(6, 8, 8), normal(7, 8, 8)]


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"a/b": W[0], "a": {"b": W[1]}}, "the path a/b: ['a']['b'] and ['a/b']"),
        ({"a": {"b/0": W[0], "b": [W[1]]}, "c": W[0]}, "the path a/b/0: ['a']['b'][0] and ['a']['b/0']"),
        ({"": {"w": W[0]}, "/w": W[1]}, "the path /w: ['']['w'] and ['/w']"),
        ({"m": Keyed(*W), "n": W[0]}, "the path m/w: ['m'].w and ['m']['w']"),
    ],
)
def test_leaves_of_one_path_are_refused_and_not_mixed_up(params, said):
    def last(p, x):
        return x @ jax.tree.leaves(p)[0] @ jax.tree.leaves(p)[1]

    with pytest.raises(ValueError, match="a leaf is known by its path, so rename one") as error:
        rslora.wrap(last, params, X, config=rslora.LoraConfig(rank=3, alpha=7))
    assert said in str(error.value)
    # Numbers and the strings of numbers are one path only beside each other, which JAX itself refuses in a dict.
    fine = {"m": [W[0]], "n": {"0": W[1]}, "o": {0: W[0]}}
    lora = rslora.wrap(last, fine, X, config=rslora.LoraConfig(rank=3, alpha=7))
    assert list(lora.sites) == ["m/0", "n/0"]


def test_an_adapted_parameter_that_is_no_longer_floating_is_named():
    lora = rslora.wrap(fn, PARAMS, X, config=rslora.LoraConfig(rank=3, alpha=7))
    whole = jax.tree.map(lambda w: w.astype(int), PARAMS)
    with pytest.raises(ValueError, match="layers/0/q_proj is int32, and an adapted weight is to be floating"):
        lora.apply(whole, lora.init(jax.random.key(0)), X)


def test_what_a_trace_cannot_depend_on_is_refused():
    with pytest.raises(TypeError, match="argument of type set is neither an array nor hashable"):
        rslora.wrap(lambda p, x, s: x @ p, PARAMS["unused"], X, {1})


@pytest.mark.parametrize(
    ("name", "init"), [("mlp", "gaussian"), ("stacked experts", "uniform"), ("lookup tied", "gaussian")]
)
def test_a_starts_with_a_variance_that_does_not_depend_on_the_rank_and_b_at_zero(name, init):
    case = CASES[name]()
    spread = {}
    for rank in (2, 7):
        config = rslora.LoraConfig(rank=rank, alpha=5, init=init, targets=case.targets)
        lora = rslora.wrap(case.fn, case.params, *case.args, config=config)
        draws = jax.jit(jax.vmap(lora.init))(jax.random.split(jax.random.key(0), 100))
        for path, site in lora.sites.items():
            a = np.asarray(draws[path]["a"])
            assert not draws[path]["b"].any()
            fan_in = 1 if site.kind == "embedding" else site.in_size
            want = 1 / fan_in if init == "gaussian" else 1 / (3 * fan_in)
            assert a.var() == pytest.approx(want, rel=0.15), path
            assert abs(a.mean()) < 5 * np.sqrt(want / a.size)
            if init == "uniform":
                assert np.abs(a).max() <= 1 / np.sqrt(fan_in)
            spread.setdefault(path, []).append(a.var())


def test_every_weight_has_a_stream_of_its_own():
    few = rslora.wrap(fn, PARAMS, X, config=rslora.LoraConfig(rank=3, alpha=7, targets="layers/1/*"))
    many = rslora.wrap(fn, PARAMS, X, config=rslora.LoraConfig(rank=3, alpha=7))
    a, b = few.init(jax.random.key(4)), many.init(jax.random.key(4))
    for path in a:
        np.testing.assert_array_equal(a[path]["a"], b[path]["a"])
    flat = [np.asarray(b[path]["a"]).tobytes() for path in EVERY]
    assert len(set(flat)) == len(flat)
    assert (many.init(jax.random.key(5))[EVERY[0]]["a"] != b[EVERY[0]]["a"]).any()


def test_a_function_can_draw_a_and_adapters_are_held_in_the_dtype_asked_for():
    def draw(key, shape, dtype, fan_in):
        return jnp.full(shape, fan_in, dtype)

    lora = rslora.wrap(fn, PARAMS, X, config=rslora.LoraConfig(rank=3, alpha=7, init=draw, dtype="bfloat16"))
    adapters = lora.init(jax.random.key(0))
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(adapters))
    assert (adapters[EVERY[0]]["a"] == 8).all()


def test_the_table_says_what_is_adapted_and_how_many_numbers_train():
    text = str(rslora.wrap(fn, PARAMS, X, config=rslora.LoraConfig(rank=3, alpha=7)))
    lines = text.splitlines()
    assert lines[0].split() == ["weight", "in", "x", "out", "stack", "rank", "gamma", "parameters"]
    assert lines[1].split() == ["layers/{0..1}/q_proj", "8", "x", "8", "-", "3", "4.041", "96"]
    assert lines[2].split() == ["layers/{0..1}/v_proj", "8", "x", "4", "-", "3", "4.041", "72"]
    base = sum(x.size for x in jax.tree.leaves(PARAMS))
    assert lines[3].startswith("168 parameters to train on 4 matrices") and f"{base} (" in lines[3]
