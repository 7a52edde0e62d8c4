"""Law: an adapter of one use of a tied weight acts in that use alone, and those of both uses each in their own.

The reference is the same program with a table for each use, merged by numpy in float64; gradients by the chain rule.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import rslora_jax as rslora
from rslora_jax import LoraConfig
from tests.reference import assert_near, trained
from tests.stored.eight_bits import EightBits, eight_bits

V, D, IDS = 14, 6, np.array([[1, 2, 13], [4, 0, 10]])
USES = ("lookup", "product")
LOOKUP_PRODUCT = ("t@lookup", "t@product")


def dense(w):
    return w.dense() if isinstance(w, EightBits) else w


# Each takes a table for its look-ups and one for its products, the other weights, and token ids.


def plain(read, head, w, ids):
    return jnp.tanh(read[ids] @ w) @ head.T


def head_first(read, head, w, ids):
    logits = jnp.einsum("vd,btd->btv", head, jnp.tanh(read[ids[..., ::-1]]))
    return logits @ jnp.ones((V, 5))


def scaled_and_cast(read, head, w, ids):
    x = (jnp.sqrt(6.0) * read)[ids] @ w
    return (x @ (head / 3).astype(jnp.float32).T).astype(jnp.float32)


def padded(read, head, w, ids):
    return jnp.pad(read, ((0, 3), (0, 0)))[ids] @ w @ jnp.pad(head, ((0, 3), (0, 0))).T


def cut(read, head, w, ids):
    x = jnp.concatenate([read[:9], read[9:]])[ids] @ w
    return x @ head[:11].T


def in_heads(read, head, w, ids):
    x = read.reshape(V, 2, 3)[ids]
    return jnp.einsum("bthk,vhk->btv", x, head.reshape(V, 2, 3))


def nested(read, head, w, ids):
    @jax.checkpoint
    @jax.jit
    def inner(read, head, ids):
        return jnp.tanh(jnp.take(read, ids, axis=0, mode="clip") @ w) @ head.T

    return inner(read, head, ids)


def scanned(read, head, w, ids):
    def step(carry, token):
        carry = jnp.tanh(carry + read[token])
        return carry, carry @ head.T

    return jax.lax.scan(step, jnp.zeros((2, D)), ids.T)[1]


def mapped(read, head, w, ids):
    return jax.vmap(lambda row: read[row] @ w @ head.T)(ids)


def rows_by_slices(read, head, w, ids):
    rows = jnp.stack([jax.lax.dynamic_slice_in_dim(read, i, 1)[0] for i in ids[0]])
    return rows @ head.T


def two_lookups(read, head, w, ids):
    return (read[ids] + read[ids[::-1]] @ w) @ head.T + (read[ids] * 2) @ head.T


def sharded(read, head, w, ids):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    inner = lambda read, head, ids: jnp.tanh(read[ids]) @ head.T  # noqa: E731
    return jax.shard_map(inner, mesh=mesh, in_specs=(P(), P("x"), P()), out_specs=P(None, None, "x"))(read, head, ids)


PROGRAMS = {p.__name__: p for p in (plain, head_first, scaled_and_cast, padded, cut, in_heads, nested, scanned, mapped)}
PROGRAMS |= {p.__name__: p for p in (rows_by_slices, two_lookups, sharded)}
FEW = ("plain", "nested", "scanned")


def table(rng, stored):
    w = jnp.asarray(rng.standard_normal((V, D)), jnp.float32)
    return eight_bits(w) if stored else w


def tied(program):
    return lambda p, ids: program(p["t"], p["t"], p["w"], ids)


def update(site, factors):
    a, b = (np.asarray(factors[name], np.float64) for name in "ab")
    made = site.alpha / np.sqrt(site.rank) * a @ b
    return made.T if site.in_axes == (1,) else made


def config(uses, **more):
    targets = tuple(f"t@{use}" for use in uses)
    return LoraConfig(
        rank=3, targets=targets, alpha=5, rank_pattern={"*@product": 2} if "product" in uses else {}, **more
    )


CASES = [
    pytest.param(
        name, uses, stored, marks=[] if name in FEW and not (stored and name == "scanned") else pytest.mark.nightly
    )
    for name, uses, stored in itertools.product(PROGRAMS, [USES[:1], USES[1:], USES], (False, True))
    if not (stored and name == "sharded")  # a stored weight that a mesh cuts is made dense, as is said
]


@pytest.mark.parametrize(("name", "uses", "stored"), CASES)
def test_an_adapter_of_a_use_acts_in_that_use_alone(name, uses, stored):
    program, rng = PROGRAMS[name], np.random.default_rng(3)
    params = {"t": table(rng, stored), "w": jnp.asarray(rng.standard_normal((D, D)), jnp.float32)}
    ids = jnp.asarray(IDS)
    lora = rslora.wrap(tied(program), params, ids, config=config(uses, on_fallback="error"))
    assert [(s.path, s.weight, s.use, s.tied) for s in lora.sites.values()] == [(f"t@{u}", "t", u, True) for u in uses]
    assert set(lora.left_out) >= {f"t@{use}" for use in USES if use not in uses} and "t" not in lora.left_out
    adapters = trained(lora, scale=0.4)

    changes = {s.use: update(s, adapters[s.path]) for s in lora.sites.values()}
    base = np.asarray(dense(params["t"]), np.float64)
    both = [jnp.asarray(base + changes.get(use, 0), jnp.float32) for use in USES]
    by_hand = functools.partial(program, w=params["w"], ids=ids)
    assert_near(lora.apply(params, adapters, ids), by_hand(*both), 2e-6)
    assert_near(
        lora.apply(params, lora.init(jax.random.key(0)), ids),
        tied(program)(params | {"t": dense(params["t"])}, ids),
        1e-6,
    )

    cotangent = jnp.asarray(rng.standard_normal(by_hand(*both).shape), jnp.float32)
    grads = jax.jit(jax.grad(lambda a: (lora.apply(params, a, ids) * cotangent).sum()))(adapters)
    dense_grads = dict(zip(USES, jax.grad(lambda *w: (by_hand(*w) * cotangent).sum(), (0, 1))(*both), strict=True))
    for site in lora.sites.values():
        g = np.asarray(dense_grads[site.use], np.float64)
        g = site.alpha / np.sqrt(site.rank) * (g.T if site.in_axes == (1,) else g)
        a, b = (np.asarray(adapters[site.path][n], np.float64) for n in "ab")
        assert_near(grads[site.path], {"a": g @ b.T, "b": a.T @ g}, 2e-5)


def test_a_weight_with_one_use_has_one_adapter_whatever_the_pattern():
    params = {"read": jnp.ones((V, D)), "w": jnp.ones((D, D)), "head": jnp.ones((D, V))}

    def untied(p, ids):
        return p["read"][ids] @ p["w"] @ p["head"]

    lora = rslora.wrap(
        untied, params, jnp.asarray(IDS), config=LoraConfig(rank=2, alpha=3, targets=["*@lookup", "head@product"])
    )
    assert [*lora.sites] == ["read", "head"] and not any(site.tied for site in lora.sites.values())
    with pytest.raises(ValueError, match="target 'head@lookup' matches head, of which there is no lookup"):
        rslora.wrap(untied, params, jnp.asarray(IDS), config=LoraConfig(targets="head@lookup"))


def test_targets_and_exclusions_name_uses():
    params, ids = {"t": jnp.ones((V, D)), "w": jnp.ones((D, D))}, jnp.asarray(IDS)

    def sites(**fields):
        lora = rslora.wrap(tied(plain), params, ids, config=LoraConfig(rank=2, alpha=3, **fields))
        assert {site.weight for site in lora.sites.values()} | {p.split("@")[0] for p in lora.left_out} == {"t", "w"}
        return [*lora.sites]

    assert sites(targets="*") == ["t", "w"]
    assert sites(targets="*@lookup") == ["t@lookup"]
    assert sites(targets="{w,t@lookup}") == ["t@lookup", "w"] and sites(targets="t@{product,lookup}") == [
        *LOOKUP_PRODUCT
    ]
    assert sites(targets="*@product") == ["t@product", "w"]
    assert sites(targets="*", exclude="*@product") == ["t@lookup"]
    assert sites(targets="*", exclude="t@lookup") == ["t@product", "w"]
    assert sites(targets=["t@lookup", "t@product"], exclude="t@lookup") == ["t@product"]
    assert sites(targets=["w", "t@lookup"], exclude="t") == ["w"]
    with pytest.raises(ValueError, match="name t whole, and t@lookup too"):
        sites(targets=["t", "t@lookup"])


PICKED = {
    "by number": lambda p, x, n: x @ p["w"][2] @ p["w"][0],
    "by data": lambda p, x, n: x @ p["w"][n[0]] @ p["w"][n[1]],
    "for each row": lambda p, x, n: jnp.einsum("bi,bio->bo", jnp.einsum("bi,bio->bo", x, p["w"][n]), p["w"][n]),
}


@pytest.mark.parametrize("how", PICKED)
def test_what_picks_matrices_of_a_stack_is_no_look_up(how):
    numbers = jnp.array([2, 0, 1, 2])
    lora = rslora.wrap(PICKED[how], {"w": jnp.ones((3, D, D))}, jnp.ones((4, D)), numbers)
    (site,) = lora.sites.values()
    assert set(site.uses) == {"product"} and not site.tied and lora.tied == ()


def test_what_hides_the_use_of_a_tied_weight_is_refused():
    params, ids = {"t": jnp.ones((V, D)), "w": jnp.ones((D, D))}, jnp.asarray(IDS)

    def changed(p, ids):
        return p["t"][ids] @ jnp.tanh(p["t"]).T

    with pytest.raises(ValueError, match=r"t@lookup is to adapt one use of its weight, .* \(tanh\): leave out @lookup"):
        rslora.wrap(changed, params, ids, config=LoraConfig(rank=2, alpha=3, targets="t@lookup"))


def test_parts_that_are_joined_again_with_ranks_of_their_own_are_refused():
    params, ids = {"t": jnp.ones((V, D)), "w": jnp.ones((D, D))}, jnp.asarray(IDS)

    def joined(p, ids):
        return jnp.concatenate([2 * p["t"][:9], 3 * p["t"][9:]])[ids] @ p["t"].T

    with pytest.raises(ValueError, match=r"t@lookup is to adapt one use of its weight, .* \(concatenate\)"):
        rslora.wrap(joined, params, ids, config=config(USES))


def test_one_merged_weight_is_refused():
    params, ids = {"t": jnp.ones((V, D)), "w": jnp.ones((D, D))}, jnp.asarray(IDS)
    lora = rslora.wrap(tied(plain), params, ids, config=config(USES))
    with pytest.raises(ValueError, match="t@lookup adapts one use of a weight: merged"):
        lora.merge(params, lora.init(jax.random.key(0)))


@pytest.mark.by_day_on("newest")
def test_adapters_of_uses_are_measured_saved_and_placed(tmp_path):
    from rslora_jax.analysis import stability
    from rslora_jax.parallel.sharding import adapter_shardings

    rng, ids = np.random.default_rng(0), jnp.asarray(IDS)
    params = {"t": table(rng, False), "w": jnp.asarray(rng.standard_normal((D, D)), jnp.float32)}
    lora = rslora.wrap(tied(plain), params, ids, config=config(USES))
    adapters = trained(lora)
    found = stability.measure(lora, lambda run, ids: (run(ids) ** 2).mean(), params, adapters, ids)
    outputs = {s.use: s.gamma * adapters[s.path]["a"] @ adapters[s.path]["b"] for s in lora.sites.values()}
    x = outputs["lookup"][ids]
    np.testing.assert_allclose(found["t@lookup"].output[1], jnp.abs(x).mean(), rtol=1e-5)
    hidden = jnp.tanh((params["t"] + outputs["lookup"])[ids] @ params["w"])
    np.testing.assert_allclose(found["t@product"].output[1], jnp.abs(hidden @ outputs["product"]).mean(), rtol=1e-5)
    assert [*adapter_shardings(lora.sites, params)["t@product"]] == ["a", "b"]
