"""The decoder against itself: two layouts, cached and whole, padded and alone, packed and apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rslora_jax as rslora
from rslora_jax.models import rope
from rslora_jax.models.decoder import REMAT_POLICIES, Decoder, DecoderConfig, init_cache
from rslora_jax.models.layout import stack_layers, unstack_adapters, unstack_layers
from tests.zoo.model import filled

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]

CONFIG = DecoderConfig(
    vocab_size=61, width=24, mlp_width=40, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=8, max_len=32
)
SCANNED = dataclasses.replace(CONFIG, scan_layers=True)
TOKENS = jax.random.randint(jax.random.key(1), (2, 9), 0, CONFIG.vocab_size)


def made(model):
    return filled(jax.eval_shape(model.init, jax.random.key(0), TOKENS))


@pytest.fixture(scope="module")
def variables():
    return made(Decoder(CONFIG))


def _close(a, b, atol=2e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=atol)


def test_parameter_paths_and_shapes_are_the_contract(variables):
    def shapes(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}

    looped, tokens = shapes(variables), jnp.zeros((1, 1), jnp.int32)
    scanned = shapes(jax.eval_shape(Decoder(SCANNED).init, jax.random.key(0), tokens))
    assert looped["params/embed/embedding"] == (61, 24)
    assert looped["params/layers_2/attn/q_proj/kernel"] == (24, 48)
    assert looped["params/layers_2/attn/k_proj/kernel"] == (24, 16)
    assert looped["params/layers_2/mlp/down_proj/kernel"] == (40, 24)
    assert scanned["params/layers/attn/q_proj/kernel"] == (3, 24, 48)
    assert scanned["params/layers/attn_norm/scale"] == (3, 24)
    assert scanned == shapes(stack_layers(variables))


@pytest.mark.parametrize("remat", [None, "full", "products"])
def test_scanned_layers_give_the_same_logits_and_gradients(variables, remat):
    def loss(config):
        return lambda v: jnp.sum(jnp.sin(Decoder(config).apply(v, TOKENS)))

    stacked, config = stack_layers(variables), dataclasses.replace(SCANNED, remat=remat)
    _close(Decoder(config).apply(stacked, TOKENS), Decoder(CONFIG).apply(variables, TOKENS))
    looped_remat = dataclasses.replace(CONFIG, remat=remat)
    want = stack_layers(jax.jit(jax.grad(loss(looped_remat)))(variables))
    got = jax.jit(jax.grad(loss(config)))(stacked)
    jax.tree.map(lambda a, b: _close(a, b, atol=1e-4 * float(jnp.abs(b).max())), got, want)


def test_every_remat_policy_name_is_usable(variables):
    for name in REMAT_POLICIES:
        Decoder(dataclasses.replace(SCANNED, remat=name)).apply(stack_layers(variables), TOKENS[:, :2])


def test_layouts_convert_back_and_forth(variables):
    back = unstack_layers(stack_layers(variables))
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, back, variables)
    with pytest.raises(ValueError, match="no run layers_0"):
        stack_layers({"params": {"layers_1": {"w": jnp.zeros(1)}}})
    with pytest.raises(ValueError, match="no stacked 'layers'"):
        unstack_layers(variables)


def test_adapters_of_a_scan_serve_the_looped_model_with_ranks_and_scales_of_their_own():
    """Every layer has other numbers, so that one taken for another would show."""
    patterns = {"rank_pattern": {"*/layers/attn/v_proj/*": 5}, "alpha_pattern": {"*/layers/mlp/down_proj/*": 2.0}}
    config = rslora.LoraConfig(rank=3, alpha=7, exclude="*/gate_proj/*", **patterns)
    tokens = jnp.array([[1, 2, 3, 4]])
    scanned, looped = (Decoder(dataclasses.replace(CONFIG, scan_layers=scan)) for scan in (True, False))
    variables = made(scanned)
    lora = rslora.wrap(scanned.apply, variables, tokens, config=config)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype("f4"), lora.init(jax.random.key(1)))
    its, apart = unstack_adapters(lora, adapters)
    other = rslora.wrap(looped.apply, unstack_layers(variables), tokens, config=its)
    assert len(other.sites) == len(lora.sites) * CONFIG.num_layers
    assert {(site.rank, site.alpha) for site in other.sites.values()} == {(3, 7), (5, 7), (3, 2)}
    want = lora.apply(variables, adapters, tokens)
    got = other.apply(unstack_layers(variables), apart, tokens)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * float(jnp.abs(want).max()))
    assert float(jnp.abs(want - scanned.apply(variables, tokens)).max()) > 0.1 * float(jnp.abs(want).max())


# What other families add to Llama 2, all of it at once.
ADDED = dict(
    rope_scaling=rope.llama3(8, 10000.0, 4.0, low_freq_factor=1.0, high_freq_factor=3.0, original_max_len=16),
    qkv_bias=True,
    qk_norm=True,
    window=3,
    window_layers=(True, False, True),
)


@pytest.fixture(scope="module")
def added_variables():
    return made(Decoder(dataclasses.replace(CONFIG, **ADDED)))


@pytest.mark.parametrize("scan_layers", [False, True], ids=["looped", "scanned"])
@pytest.mark.parametrize("windows", [(True, False, True), None], ids=["some windows", "all windows"])
def test_what_other_families_add_is_the_same_through_the_cache_and_padded(added_variables, scan_layers, windows):
    config = dataclasses.replace(CONFIG, **ADDED | {"window_layers": windows}, scan_layers=scan_layers)
    v = stack_layers(added_variables) if scan_layers else added_variables
    apply, plain = jax.jit(Decoder(config).apply), Decoder(dataclasses.replace(config, scan_layers=False))
    whole = plain.apply(added_variables, TOKENS)
    _close(apply(v, TOKENS), whole, atol=1e-4)
    cache, outs = init_cache(config, 2, 12), []
    for start, stop in ((0, 4), (4, 8), (8, 9)):
        logits, cache = apply(v, TOKENS[:, start:stop], cache=cache)
        outs.append(logits)
    _close(jnp.concatenate(outs, axis=1), whole, atol=1e-4)
    padded = jnp.pad(TOKENS, ((0, 0), (3, 0)))
    positions = jnp.broadcast_to(jnp.arange(-3, 9), (2, 12)).clip(-1)
    _close(apply(v, padded, positions)[:, 3:], whole, atol=1e-4)


def test_a_window_shuts_out_what_lies_before_it(added_variables):
    def moved(windows, token):
        """Say which logits of the last row change with a token."""
        config = dataclasses.replace(CONFIG, **ADDED | {"window_layers": windows})
        other = TOKENS.at[0, token].set((TOKENS[0, token] + 1) % CONFIG.vocab_size)

        def run(tokens):
            return Decoder(config).apply(added_variables, tokens)[0]

        return (jnp.abs(run(other) - run(TOKENS)).max(axis=-1) > 1e-5).tolist()

    # A window of 3 hands a token on by 2 positions in each of the 3 layers, hence by 6, and without a window on and on.
    assert moved((True, True, True), 1) == [False] + [True] * 7 + [False]
    assert moved((True, False, True), 1) == [False] + [True] * 8


def test_windows_that_cannot_be_are_refused_and_those_alike_are_one():
    alike = dataclasses.replace(CONFIG, window=4, window_layers=(True,) * 3)
    assert alike == dataclasses.replace(CONFIG, window=4)
    assert dataclasses.replace(CONFIG, window=4, window_layers=(False,) * 3) == CONFIG
    for changes in ({"window": 0}, {"window_layers": (True, False, True)}, {"window": 4, "window_layers": (True,)}):
        with pytest.raises(ValueError, match="window"):
            dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize("config", [CONFIG, SCANNED], ids=["looped", "scanned"])
@pytest.mark.parametrize("chunks", [[1] * 9, [4, 1, 3, 1], [9]])
def test_decoding_through_the_cache_equals_the_whole_forward(variables, config, chunks):
    model, v = Decoder(config), stack_layers(variables) if config.scan_layers else variables
    apply = jax.jit(model.apply)
    cache, start, outs = init_cache(config, 2, 12), 0, []
    for size in chunks:
        logits, cache = apply(v, TOKENS[:, start : start + size], cache=cache)
        start += size
        outs.append(logits)
    _close(jnp.concatenate(outs, axis=1), model.apply(v, TOKENS))
    assert int(cache["index"]) == 9
    assert cache["positions"][0].tolist() == [*range(9), -1, -1, -1]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_padded_batch_gives_what_each_row_gives_alone(variables, side, cached):
    model, lengths, width = Decoder(CONFIG), [3, 9, 1], 9
    tokens, positions = np.full((3, width), 7), np.full((3, width), -1)
    rows = [np.asarray(jax.random.randint(jax.random.key(i), (n,), 0, 61)) for i, n in enumerate(lengths)]
    spots = [slice(0, n) if side == "right" else slice(width - n, width) for n in lengths]
    for i, (row, spot) in enumerate(zip(rows, spots, strict=True)):
        tokens[i, spot], positions[i, spot] = row, np.arange(len(row))
    args = (variables, jnp.asarray(tokens), jnp.asarray(positions))
    apply = jax.jit(model.apply)
    if cached:
        logits, cache = apply(*args, cache=init_cache(CONFIG, 3, width + 2))
        # Positions of the next tokens follow each row's own length without being told.
        more, _ = apply(variables, jnp.array([[5, 6]] * 3), cache=cache)
    else:
        logits = apply(*args)
    assert bool(jnp.isfinite(logits).all())
    for i, (row, spot) in enumerate(zip(rows, spots, strict=True)):
        alone = apply(variables, jnp.asarray([[*row, 5, 6]]))[0]
        _close(logits[i, spot], alone[: len(row)])
        if cached:
            _close(more[i], alone[len(row) :])


def test_padding_leaves_gradients_finite_and_out_of_the_loss(variables):
    positions = jnp.array([[0, 1, 2, -1, -1]])

    def loss(v, tokens):
        return jnp.sum(Decoder(CONFIG).apply(v, tokens, positions)[:, :3] ** 2)

    gradient = jax.jit(jax.grad(loss))
    a = gradient(variables, jnp.array([[1, 2, 3, 4, 5]]))
    b = gradient(variables, jnp.array([[1, 2, 3, 60, 60]]))
    jax.tree.map(lambda x, y: _close(x, y, atol=1e-5 * float(jnp.abs(y).max())), a, b)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(a))


def test_packed_segments_do_not_see_each_other(variables):
    model = Decoder(CONFIG)
    packed = model.apply(
        variables,
        TOKENS[:1],
        jnp.array([[0, 1, 2, 3, 0, 1, 2, 0, 1]]),
        jnp.array([[1, 1, 1, 1, 2, 2, 2, 3, 3]]),
    )
    for start, stop in ((0, 4), (4, 7), (7, 9)):
        _close(packed[:, start:stop], model.apply(variables, TOKENS[:1, start:stop]))


@pytest.mark.parametrize("tie_head", [True, False])
def test_the_head_works_on_chosen_positions(tie_head):
    model = Decoder(dataclasses.replace(CONFIG, tie_head=tie_head))
    v = made(model)
    assert ("lm_head" in v["params"]) is not tie_head
    x = model.apply(v, TOKENS, method="hidden")
    few = model.apply(v, x[:, [2, 8]], method="head")
    _close(few, model.apply(v, TOKENS)[:, [2, 8]])
    weight = v["params"]["embed"]["embedding"].T if tie_head else v["params"]["lm_head"]["kernel"]
    _close(few, x[:, [2, 8]] @ weight)


def test_bfloat16_compute_keeps_float32_weights_and_logits(variables):
    config = dataclasses.replace(CONFIG, dtype=jnp.bfloat16)
    exact, half = Decoder(CONFIG).apply(variables, TOKENS), Decoder(config).apply(variables, TOKENS)
    assert half.dtype == jnp.float32
    assert Decoder(config).apply(variables, TOKENS, method="hidden").dtype == jnp.bfloat16
    assert 1e-4 < float(jnp.abs(half - exact).max()) < 0.05 * float(jnp.abs(exact).max())
    logits, cache = Decoder(config).apply(variables, TOKENS, cache=init_cache(config, 2, 9))
    assert cache["k"].dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    _close(logits, half, atol=0.05)


def test_weights_meet_data_only_in_plain_products_and_look_ups(variables):
    jaxpr = jax.make_jaxpr(Decoder(CONFIG).apply)(variables, TOKENS).jaxpr
    shapes = [leaf.shape for leaf in jax.tree.leaves(variables)]
    for var, shape in zip(jaxpr.invars[: len(shapes)], shapes, strict=True):
        if len(shape) == 2:
            uses = [eqn for eqn in jaxpr.eqns if var in eqn.invars]
            names = sorted(e.params.get("name", e.primitive.name) for e in uses)
            assert names == (["_take", "dot_general"] if shape == (61, 24) else ["dot_general"]), shape


def test_mistakes_that_shapes_cannot_show_give_nan_not_numbers(variables):
    model = Decoder(CONFIG)
    assert bool(jnp.isnan(model.apply(variables, jnp.array([[1, 61]]))[0, 1]).all())
    _, full = model.apply(variables, TOKENS, cache=init_cache(CONFIG, 2, 9))
    assert bool(jnp.isnan(model.apply(variables, TOKENS[:, :1], cache=full)[0]).all())


def test_mistakes_in_shapes_are_named(variables):
    model = Decoder(CONFIG)
    with pytest.raises(ValueError, match="more than max_len=32"):
        model.apply(variables, jnp.zeros((1, 33), jnp.int32))
    with pytest.raises(ValueError, match="do not fit a cache of 4"):
        model.apply(variables, TOKENS, cache=init_cache(CONFIG, 2, 4))
    with pytest.raises(ValueError, match="segments cannot be used with a cache"):
        model.apply(variables, TOKENS, None, TOKENS, cache=init_cache(CONFIG, 2, 9))
    with pytest.raises(ValueError, match="longer than max_len=32"):
        init_cache(CONFIG, 1, 33)
    for change, message in (
        ({"num_kv_heads": 4}, "not a multiple"),
        ({"head_dim": 5}, "is odd"),
        ({"rope_scaling": rope.linear(6, 2.0)}, "3 divisors and head_dim=8 has 4 frequencies"),
        ({"remat": "dots"}, "is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CONFIG, **change)


def test_configurations_that_say_the_same_are_equal():
    named = dataclasses.replace(CONFIG, dtype="float32", param_dtype=np.float32)
    assert named == CONFIG and hash(Decoder(named)) == hash(Decoder(CONFIG))
