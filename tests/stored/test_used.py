"""What goes beyond a step, over packed bases: tokens generated with adapters unmerged, and runs that share one base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rslora_jax as rslora
from rslora_jax.models.decoder import Decoder, DecoderConfig
from rslora_jax.models.generation import generate
from rslora_jax.sites import from_paths, named_leaves
from rslora_jax.stored import dense, is_stored
from rslora_jax.train.sweep import Trial, sweep
from tests.methods.gained import trained as moved
from tests.stored.packed import packed
from tests.train import test_sweep as runs
from tests.zoo.model import filled

pytestmark = pytest.mark.usefixtures("compile_fast")
NIGHT = pytest.mark.nightly
FORMS = ("nf4", "int8", "float8", "Q4_1")


def in_form(form, params):
    """A base in a format, and that of the arrays which it stands for."""
    small = {path: packed(form, path, w) for path, w in named_leaves(params).items()}
    assert any(map(is_stored, small.values()))
    return from_paths(params, small), from_paths(params, {path: dense(w) for path, w in small.items()})


@pytest.mark.by_day_on("newest")
@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=NIGHT)])
@pytest.mark.parametrize("form", [form if form == "nf4" else pytest.param(form, marks=NIGHT) for form in FORMS])
def test_tokens_are_generated_with_adapters_unmerged(form, scan):
    config = DecoderConfig(
        **dict(vocab_size=97, width=64, mlp_width=64, num_layers=2, num_heads=4, num_kv_heads=2, max_len=64),
        **dict(tie_head=True, scan_layers=scan),
    )
    model, prompts = Decoder(config), [[5, 6, 7, 8, 9], [3], [90, 2]]
    params = filled(jax.eval_shape(model.init, jax.random.key(3), jnp.zeros((1, 1), jnp.int32)))
    small, plain = in_form(form, params)
    tokens = jax.ShapeDtypeStruct((1, 8), "int32")
    lora = rslora.wrap(model.apply, small, tokens, config=rslora.LoraConfig(rank=3, alpha=7))
    adapters = moved(lora.init(jax.random.key(0)))

    def apply(both, *args, **kwargs):
        return lora.apply(*both, *args, **kwargs)

    got = generate(apply, (small, adapters), prompts, config, max_new=3, bucket=8)
    assert got == generate(model.apply, lora.merge(plain, adapters), prompts, config, max_new=3, bucket=8)


@pytest.mark.by_day_on("oldest")
@pytest.mark.parametrize("form", [form if form == "int8" else pytest.param(form, marks=NIGHT) for form in FORMS])
def test_runs_together_over_one_packed_base_are_those_over_its_arrays(form):
    rng = np.random.default_rng(0)
    params = {
        "up": {"kernel": 0.1 * rng.standard_normal((3, 64, 64)).astype("f4")},
        "down": {"kernel": 0.1 * rng.standard_normal((3, 64, 64)).astype("f4")},
    }

    def layers(p, x):
        return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w["up"]["kernel"]) @ w["down"]["kernel"], None), x, p)[0]

    def batches(seed):
        draw = np.random.default_rng(seed).normal
        return [(draw(size=(5, 64)).astype("f4"), draw(size=(5, 64)).astype("f4")) for _ in range(3)]

    found = []
    for base in in_form(form, params):
        config = rslora.LoraConfig(rank=3, alpha=7)
        lora = rslora.wrap(layers, base, jnp.ones((2, 64)), config=config)
        trials = [Trial(3e-3), Trial(1e-2, seed=1, scaling="lora")]
        options = dict(batches=batches, loss=runs.squares, optimizer=runs.adamw, steps=3)
        found.append(sweep(lora, base, trials, heldout=batches(7)[:1], evaluate_at=(0, 3), **options))
    for got, want in zip(*found, strict=True):
        np.testing.assert_allclose(got.losses, want.losses, rtol=1e-5)
        assert got.heldout[3].loss == pytest.approx(want.heldout[3].loss, rel=1e-5)
        assert got.losses[0] != got.losses[2] and got.diverged is None
