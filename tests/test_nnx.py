"""The door for Flax NNX: values, and what a call leaves behind, are those of the module itself, bit for bit."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors, nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import rslora_jax as rslora

X = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3, 8)), jnp.float32)
pytestmark = pytest.mark.usefixtures("compile_fast")

CONFIG = rslora.LoraConfig(rank=3, alpha=5.0)


class Counter(nnx.Module):
    """A variable of a class of its own, a plain array, and a parameter that is a tree."""

    def __init__(self, rngs):
        self.seen = nnx.Variable(jnp.zeros((), jnp.int32))
        self.mixing = nnx.Variable(nnx.initializers.orthogonal()(rngs(), (8, 8)))
        self.last = jnp.zeros((8,))
        self.shift = nnx.Param({"by": jnp.ones((8,)), "none": None})

    def __call__(self, x):
        self.seen[...] += 1
        self.last = x.mean((0, 1))
        return x @ self.mixing[...] + self.shift.get_value()["by"] * self.seen[...] + self.last


class Block(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(8, 8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return x + self.drop(nnx.tanh(self.dense(x)))


class Scanned(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.vmap(Block)(rngs.split(3))

    def __call__(self, x):
        axes = {"in_axes": (nnx.Carry, 0), "out_axes": nnx.Carry}
        return nnx.scan(lambda x, block: nnx.remat(Block.__call__)(block, x), **axes)(x, self.blocks)


class Ensemble(nnx.Module):
    def __init__(self, rngs):
        self.norms = nnx.vmap(lambda key: nnx.BatchNorm(8, rngs=nnx.Rngs(key)))(jax.random.split(rngs(), 2))

    def __call__(self, x):
        return nnx.vmap(lambda norm, x: norm(x), in_axes=(0, None))(self.norms, x).sum(0)


class Tied(nnx.Module):
    """One layer by two names, one stream of keys by two names, and a dict."""

    def __init__(self, rngs):
        dense = nnx.Linear(8, 8, rngs=rngs)
        keys = rngs.fork()
        self.dense, self.again = dense, dense
        self.drops = nnx.Dict(one=nnx.Dropout(0.3), two=nnx.Dropout(0.3))
        self.keys, self.same_keys = keys, keys

    def __call__(self, x):
        x = self.drops["one"](self.dense(x), rngs=self.keys)
        return self.drops["two"](self.again(x), rngs=self.same_keys)


class Decoder(nnx.Module):
    """Attention to a cache of what was seen before."""

    def __init__(self, rngs):
        self.attn = nnx.MultiHeadAttention(2, 8, 8, 8, decode=True, rngs=rngs)
        self.attn.init_cache((4, 16, 8))

    def __call__(self, x):
        return jnp.concatenate([self.attn(x[:, n : n + 1]) for n in range(x.shape[1])], 1)


PIECES = {
    "linear": lambda rngs: nnx.Linear(8, 8, rngs=rngs),
    "dropout": lambda rngs: nnx.Dropout(0.5, rngs=rngs),
    "batch norm": lambda rngs: nnx.BatchNorm(8, rngs=rngs),
    "spectral norm": lambda rngs: nnx.SpectralNorm(nnx.Linear(8, 8, rngs=rngs), rngs=rngs),
    "counter": Counter,
    "scanned": Scanned,
    "ensemble": Ensemble,
    "tied": Tied,
    "decoder": Decoder,
}


class Net(nnx.Module):
    def __init__(self, names, rngs):
        self.layers = nnx.List([PIECES[name](rngs) for name in names])
        self.last = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x, rngs=None):
        for layer in self.layers:
            x = layer(x)
        x = self.last(x)
        return x if rngs is None else x * rngs.noise.normal(x.shape)

    def encode(self, x):
        return self(x)[..., :4]


def make(names, seed=0) -> Net:
    return Net(names, nnx.Rngs(seed, dropout=seed + 1))


def contents(tree):
    """The arrays of a pytree by path, in numpy, keys as their data."""

    def is_key(leaf):
        return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)

    def plain(leaf):
        return np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)

    return {jax.tree_util.keystr(path): plain(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same(found, want, tolerance=0.0):
    found, want = contents(found), contents(want)
    assert found.keys() == want.keys()
    for path in want:
        assert found[path].dtype == want[path].dtype, path
        np.testing.assert_allclose(found[path], want[path], rtol=0, atol=tolerance, err_msg=path)


def held(model):
    """What a module holds beside parameters, by what flax itself says."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))


@pytest.mark.parametrize("name", PIECES)
def test_each_kind_of_layer_is_as_the_module_alone(name):
    as_the_module_alone([name])


@pytest.mark.nightly
@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(list(PIECES)), min_size=2, max_size=5), st.integers(0, 100))
def test_any_layers_together_are_as_the_module_alone(names, seed):
    as_the_module_alone(names, seed)


def as_the_module_alone(names, seed=0):
    model, alone, given_rngs, alone_rngs = make(names, seed), make(names, seed), nnx.Rngs(noise=3), nnx.Rngs(noise=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", rslora.RsloraWarning)
        fn, params, state = rslora.from_nnx(model, state=True)
        assert_same(params, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        assert_same(state, held(model))
        lora = rslora.wrap(fn, params, state, X, rngs=given_rngs, config=CONFIG)
        assert set(lora.sites) <= set(map(path, jax.tree_util.tree_leaves_with_path(params)))
        assert "layers/0/mixing" not in lora.sites and "last/kernel" in lora.sites
        adapters = lora.init(jax.random.key(0))
        applied, applied_rngs = state, nnx.Rngs(noise=3)
        for _ in range(3):
            nnx.update(alone, nnx.state(model, nnx.Param))  # spectral norm writes its kernel; parameters stay here
            want = alone(X, rngs=alone_rngs)
            out, state = fn(params, state, X, rngs=given_rngs)
            assert_same(out, want)
            assert_same(state, held(alone))
            assert_same(given_rngs, alone_rngs)
            # Fresh adapters change nothing but the rounding of what is compiled otherwise.
            out, applied = lora.apply(params, adapters, applied, X, rngs=applied_rngs)
            assert_same(out, want, 1e-4)
            assert_same(applied, held(alone), 1e-4)
            assert_same(applied_rngs, alone_rngs)
    assert_same(held(model), held(make(names, seed)))  # the module that was given is left as it was


def path(found):
    return "/".join(str(getattr(key, "key", key)) for key in found[0])


def test_what_stands_still_is_said():
    model = make(["dropout", "batch norm", "decoder", "counter"])
    with pytest.warns(rslora.RsloraWarning) as said:
        fn, params = rslora.from_nnx(model)
    (warning,) = said
    text = str(warning.message)
    assert warning.filename == __file__
    for part in (
        "random keys and counts (layers/0/rngs/count, layers/0/rngs/key",
        "batch statistics (layers/1/mean, layers/1/var)",
        "caches (layers/2/attn/cache_index, ",
        "variables of Variable (layers/3/mixing, layers/3/seen)",
        "state=True",
    ):
        assert part in text
    assert_same(params, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    with pytest.warns(rslora.RsloraWarning, match="changes layers/3/last, which"):  # an array, no variable
        first = fn(params, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error", rslora.RsloraWarning)
        again, same = rslora.from_nnx(model, state=False)  # it is meant
        assert_same(again(same, X), first)
        assert_same(again(same, X), first)
        rslora.from_nnx(nnx.Linear(3, 3, rngs=nnx.Rngs(0)))


def test_what_a_call_drops_is_said():
    class Sows(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones((8, 8)))

        def __call__(self, x):
            self.sow(nnx.Intermediate, "seen", x)
            self.w[...] = 2 * self.w[...]  # as weight norm does: a call begins with the parameters that it is given
            return x @ self.w[...]

    fn, params, state = rslora.from_nnx(Sows(), state=True)
    with pytest.warns(rslora.RsloraWarning, match="changes seen, which"):
        out, after = fn(params, state, X)
    assert_same(out, 2 * X @ jnp.ones((8, 8)))
    assert after == state == {}

    class Pops(nnx.Module):
        def __init__(self):
            self.seen = nnx.Intermediate(jnp.zeros(()))

        def __call__(self, x, state):
            return x + nnx.pop(self, nnx.Intermediate)["seen"].get_value() + state

    fn, params, state = rslora.from_nnx(Pops(), state=True)
    out, after = fn(params, state, X, state=1)  # a name that the call itself may use
    assert_same(out, X + 1)
    assert_same(after, state)


def test_a_method_of_a_module_has_state_too():
    alone, model = make(["dropout"]), make(["dropout"])
    fn, params, state = rslora.from_nnx(model, Net.encode, state=True)
    for _ in range(2):
        out, state = fn(params, state, X)
        assert_same(out, alone.encode(X))
    assert_same(state, held(alone))


def test_a_module_without_values_is_wrapped_too():
    model = nnx.eval_shape(lambda: make(["dropout", "scanned"]))
    with pytest.raises(ValueError, match=r"no values for layers/0/rngs/count, .* state=True"):
        rslora.from_nnx(model)
    fn, params, state = rslora.from_nnx(model, state=True)
    lora = rslora.wrap(fn, params, state, X, config=CONFIG)
    assert set(lora.sites) == {"layers/1/blocks/dense/kernel", "last/kernel"}


def test_values_that_went_through_json_like_names_are_found():
    fn, params, state = rslora.from_nnx(make(["linear", "batch norm"]), state=True)

    def words(tree):
        return {str(k): words(v) for k, v in tree.items()} if isinstance(tree, dict) else tree

    assert_same(fn(words(params), words(state), X), fn(params, state, X))
    with pytest.raises(ValueError, match="there is no last/kernel"):
        fn({**params, "last": {"bias": 0}}, state, X)


def test_rngs_given_to_a_call_advance_only_where_flax_lets_them():
    model, x = nnx.Dropout(0.5), jnp.ones((4, 32))
    fn, params = rslora.from_nnx(Dropped(model))
    lora = rslora.wrap(fn, params, x, rngs=nnx.Rngs(0), config=CONFIG)
    adapters, rngs, alone = lora.init(jax.random.key(0)), nnx.Rngs(0), nnx.Rngs(0)
    outs = [lora.apply(params, adapters, x, rngs=rngs) for _ in range(2)]
    for out in outs:
        assert_same(out, fn(params, x, rngs=alone))
    assert_same(rngs, alone)
    # Through nnx.jit they come out again; a jax.jit over them would leave them as they were, so Flax refuses.
    jitted = nnx.jit(lambda rngs, x: lora.apply(params, adapters, x, rngs=rngs))
    assert_same(jitted(rngs, x), fn(params, x, rngs=alone), 1e-6)
    assert_same(rngs, alone)
    with pytest.raises(errors.TraceContextError):
        jax.jit(lambda x: lora.apply(params, adapters, x, rngs=rngs))(x)
    with pytest.raises(ValueError, match="given twice"):

        def both(params, x, one, other):
            return fn(params, x, rngs=one) + fn(params, x, rngs=other)

        rslora.wrap(both, params, x, rngs, rngs, config=CONFIG).apply(params, adapters, x, rngs, rngs)
    # What does not change may be given anywhere.
    model.deterministic = True
    fn, params = rslora.from_nnx(Dropped(model))
    lora = rslora.wrap(fn, params, x, rngs=rngs, config=CONFIG)
    jax.jit(lambda x: lora.apply(params, adapters, x, rngs=rngs))(x)


class Dropped(nnx.Module):
    def __init__(self, drop):
        self.dense, self.drop = nnx.Linear(32, 32, rngs=nnx.Rngs(0)), drop

    def __call__(self, x, rngs):
        return self.drop(self.dense(x), rngs=rngs)
