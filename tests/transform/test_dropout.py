"""Every site, use, layer, turn of a loop and device drops for itself; the value and its remat alike."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import rslora_jax as rslora
from tests.devices import run_on
from tests.program_models import normal
from tests.programs import CASES
from tests.reference import assert_near, trained

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]

RATE, S = 0.3, 48
X = 1 + jnp.abs(normal(0, 30, S))
KEY = jax.random.key(5)


def seen_by(fn, w, x=X, targets="all-linear", key=KEY):
    """What a function of zeros gives whose adapters are the identity: the data as they are seen, and the adapters."""
    config = rslora.LoraConfig(rank=S, alpha=1, scaling="constant", dropout=RATE, targets=targets)
    lora = rslora.wrap(fn, {"w": w}, x, config=config)
    eye = {n: jnp.broadcast_to(jnp.eye(S), s) for n, s in lora.sites["w"].factor_shapes.items()}
    return np.asarray(jax.jit(lora.apply)({"w": w}, {"w": eye}, x, dropout_key=key))


def unlike(masks):
    """Say that masks are of the right rate and each is drawn for itself."""
    kept = [np.asarray(m) != 0 for m in masks]
    for one in kept:
        assert abs(one.mean() - (1 - RATE)) < 5 * np.sqrt(RATE * (1 - RATE) / one.size)
    for one, other in itertools.combinations(kept, 2):
        both = (one & other).mean()
        assert abs(both - (1 - RATE) ** 2) < 0.05, both


ZERO, STACK = jnp.zeros((S, S)), jnp.zeros((3, S, S))


def scan_of_stack(p, x):
    return lax.scan(lambda c, w: (c, c @ w), x, p["w"])[1]


def scan_that_shares(p, x):
    return lax.scan(lambda c, _: (c, c @ p["w"]), x, None, length=3)[1]


def while_that_shares(p, x):
    def body(state):
        n, out = state
        return n + 1, out.at[n].set(x @ p["w"])

    return lax.while_loop(lambda state: state[0] < 3, body, (0, jnp.zeros((3, *x.shape))))[1]


def twice(p, x):
    return jnp.stack([x @ p["w"], x @ p["w"], p["w"].T.T @ x.T @ jnp.eye(len(x))][:2])


def one_call_twice(p, x):
    inner = jax.jit(lambda x, w: jax.jit(lambda x, w: x @ w)(x, w))
    return jnp.stack([inner(x, p["w"]), inner(x, p["w"])])


def nested_scans(p, x):
    return lax.scan(lambda c, w: (c, lax.scan(lambda c, _: (c, c @ w), c, None, length=2)[1]), x, p["w"])[1].reshape(
        6, *x.shape
    )


def looped_stack(p, x):
    return jnp.stack([x @ p["w"][n] for n in range(3)])


def mapped(p, x):
    return jax.vmap(lambda x: x @ p["w"])(jnp.stack([x, x]))


def branches(p, x):
    return jnp.stack([lax.cond(flag, lambda x: x @ p["w"], lambda x: 1 * (x @ p["w"]), x) for flag in (True, False)])


UNLIKE = {
    fn.__name__: (fn, w)
    for fn, w in (
        (scan_of_stack, STACK),
        (scan_that_shares, ZERO),
        (while_that_shares, ZERO),
        (twice, ZERO),
        (one_call_twice, ZERO),
        (nested_scans, STACK),
        (looped_stack, STACK),
        (mapped, ZERO),
        (branches, ZERO),
    )
}


@pytest.mark.parametrize("name", UNLIKE)
def test_every_use_layer_and_turn_draws_for_itself(name):
    fn, w = UNLIKE[name]
    masks = seen_by(fn, w)
    unlike(masks)
    kept = masks != 0
    np.testing.assert_allclose(masks[kept], np.broadcast_to(X / (1 - RATE), masks.shape)[kept], rtol=1e-6)
    np.testing.assert_array_equal(masks, seen_by(fn, w))  # traced again, the same
    unlike([masks[0], seen_by(fn, w, key=jax.random.key(6))[0]])


def test_sites_and_keys_of_every_kind_draw_for_themselves():
    config = rslora.LoraConfig(rank=S, alpha=1, scaling="constant", dropout=RATE)
    params = {"v": ZERO, "w": ZERO}
    lora = rslora.wrap(lambda p, x: jnp.stack([x @ p["v"], x @ p["w"]]), params, X, config=config)
    eye = {path: {"a": jnp.eye(S), "b": jnp.eye(S)} for path in params}
    for key in (jax.random.key(1), jax.random.PRNGKey(1), jax.random.key(1, impl="rbg")):
        unlike(lora.apply(params, eye, X, dropout_key=key))
    np.testing.assert_array_equal(lora.apply(params, eye, X), jnp.stack([X, X]))  # evaluation needs no switch


def test_sites_at_one_place_of_two_branches_draw_for_themselves():
    config = rslora.LoraConfig(rank=S, alpha=1, scaling="constant", dropout=RATE)
    params, eye = {"v": ZERO, "w": ZERO}, {path: {"a": jnp.eye(S), "b": jnp.eye(S)} for path in "vw"}

    def fn(p, x, flag):
        return lax.cond(flag, lambda: x @ p["v"], lambda: x @ p["w"])

    lora = rslora.wrap(fn, params, X, jnp.bool_(True), config=config)
    unlike([lora.apply(params, eye, X, jnp.bool_(flag), dropout_key=KEY) for flag in (True, False)])


def test_gradients_are_those_of_the_masks_that_the_value_had_under_remat():
    w = normal(4, 3, S, S) / S

    def fn(p, x):
        return lax.scan(jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None)), x, p["w"])[0]

    masks = (
        seen_by(lambda p, x: lax.scan(jax.checkpoint(lambda c, w: (c, c @ w)), x, p["w"])[1], jnp.zeros_like(w)) != 0
    )
    lora = rslora.wrap(fn, {"w": w}, X, config=rslora.LoraConfig(rank=3, alpha=7, dropout=RATE))
    adapters = trained(lora)
    gamma = 7 / np.sqrt(3)

    def by_hand(adapters, x):
        for n in range(3):
            a, b = (adapters["w"][name][n] for name in "ab")
            x = jnp.tanh(x @ w[n] + gamma * (x * masks[n] / (1 - RATE)) @ a @ b)
        return jnp.sum(jnp.sin(x))

    got = jax.jit(jax.grad(lambda a, x: jnp.sum(jnp.sin(lora.apply({"w": w}, a, x, dropout_key=KEY))), (0, 1)))(
        adapters, X
    )
    assert_near(got, jax.grad(by_hand, (0, 1))(adapters, X), 1e-4)


def test_masks_on_two_devices():
    said = run_on(2, "tests.dropout_program")
    assert "the masks on a mesh are those on one device" in said
    assert "each device that has data of its own draws for itself" in said


@pytest.mark.parametrize("name", CASES)
@pytest.mark.nightly
def test_every_program_takes_a_key_and_nothing_changes_at_step_0(name):
    case = CASES[name]()
    config = rslora.LoraConfig(rank=6, alpha=10, targets=case.targets, dropout=0.5)
    lora = rslora.wrap(case.fn, case.params, *case.args, config=config)
    fresh, moved = lora.init(jax.random.key(0)), trained(lora)
    apply = jax.jit(lambda a, key: lora.apply(case.params, a, *case.args, dropout_key=key))
    assert_near(apply(fresh, KEY), lora.apply(case.params, fresh, *case.args), max(2 * case.tolerance, 2e-5))
    jax.tree.map(np.testing.assert_array_equal, apply(moved, KEY), apply(moved, KEY))
    if all(site.fallbacks or site.kind == "embedding" for site in lora.sites.values()):
        return  # nothing that could be dropped, as is said
    others = jax.tree.leaves(apply(moved, jax.random.key(9)))
    assert any(
        not np.array_equal(one, other) for one, other in zip(jax.tree.leaves(apply(moved, KEY)), others, strict=True)
    )


def test_where_nothing_can_be_dropped_is_said():
    with pytest.warns(rslora.RsloraWarning, match="there dropout drops nothing"):
        rslora.wrap(lambda p, x: x @ jnp.tanh(p["w"]), {"w": ZERO}, X, config=rslora.LoraConfig(rank=3, dropout=RATE))
