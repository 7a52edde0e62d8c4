"""All that users do with a base, done with a stored one: it is as if they did it with the weights it stands for."""

import copy
import dataclasses
import functools
import pickle
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import export, lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import rslora_jax as rslora
from rslora_jax import train
from rslora_jax.sites import from_paths, named_leaves
from rslora_jax.store import checkpoint
from rslora_jax.stored import dense, float8, int8, is_stored, nf4
from tests.methods.gained import Gained
from tests.methods.gained import trained as moved
from tests.program_models import normal
from tests.reference import assert_near
from tests.stored.blocks import blocks
from tests.stored.eight_bits import eight_bits

pytestmark = [
    pytest.mark.by_day_on("oldest"),
    pytest.mark.usefixtures("compile_fast"),
    pytest.mark.filterwarnings("ignore::rslora_jax.RsloraWarning"),
]

STORED = {
    "eight": lambda w: eight_bits(w) if w.ndim > 1 else w,
    "blocks": blocks,  # without a stack, and vectors too
    "matrices": lambda w: blocks(w, w.ndim - 2) if w.ndim > 1 else w,
    "nf4": lambda w: nf4(w, -2, w.ndim - 2, block=4) if w.ndim > 1 else w,
    "nf4 flat": lambda w: nf4(w, -2, w.ndim - 2) if w.ndim > 1 else w,
    "int8": lambda w: int8(w, -2, w.ndim - 2) if w.ndim > 1 else w,
    "float8": lambda w: float8(w, -2, w.ndim - 2) if w.ndim > 1 else w,
}
FORMATS = ("nf4", "nf4 flat", "int8", "float8")
AT_NIGHT = pytest.mark.nightly


def weights() -> dict[str, jax.Array]:
    return {"table": normal(2, 10, 12), "layers": normal(0, 3, 12, 12), "out": normal(1, 12, 8), "bias": normal(3, 12)}


def stack_of_layers(p: Any, x: Any, at: Any) -> Any:
    h = p["table"][at] + x + p["bias"]
    h, _ = lax.scan(lambda c, w: (jnp.tanh(c @ w), None), h, p["layers"])
    return h @ p["out"]


def arrays(params: Any) -> Any:
    """Return a base with arrays in place of stored weights, all else as it was."""
    return from_paths(params, {path: jnp.asarray(dense(leaf)) for path, leaf in named_leaves(params).items()})


def wrapped(fn: Callable, params: Any, args: Any, method: Any = "lora", **config: Any) -> rslora.Lora:
    return rslora.wrap(fn, params, *args, config=rslora.LoraConfig(rank=3, alpha=7, method=method, **config))


ARGS = (normal(5, 6, 12), jnp.arange(6) % 10)


@functools.cache
def made(form: str, gained: bool = False) -> tuple[Any, Any, rslora.Lora, Any]:
    """Return a stored base, that of arrays, the function with adapters on all its weights, and adapters."""
    stored = {path: STORED[form](w) for path, w in weights().items()}
    names = ["table", "layers", "out"]
    lora = wrapped(stack_of_layers, stored, ARGS, Gained() if gained else "lora", targets=names)
    return stored, arrays(stored), lora, moved(lora.init(jax.random.key(0)))


def loss(lora: rslora.Lora, params: Any, adapters: Any, *args: Any) -> Any:
    return jnp.sum(jnp.sin(lora.apply(params, adapters, *args).astype(jnp.float32)))


# What is done with the function, a base, adapters and arguments.


def two(tree: Any) -> Any:
    return jax.tree.map(lambda v: jnp.stack([v, v]), tree)


def vmapped_base(lora, params, adapters, x, at):
    return jax.vmap(lora.apply, (0, 0, None, None))(two(params), two(adapters), x, at)


def vmapped_gradients(lora, params, adapters, x, at):
    def one(adapters, x):
        return jax.grad(lambda adapters: loss(lora, params, adapters, x, at))(adapters)

    return jax.vmap(one, (0, None))(two(adapters), x)


def mapped(lora, params, adapters, x, at):
    return lax.map(lambda x: lora.apply(params, adapters, x, at), jnp.stack([x, x + 1]))


def pmapped(lora, params, adapters, x, at):
    def one(tree):
        return jax.tree.map(lambda v: v[None], tree)

    return jax.pmap(lora.apply, devices=jax.devices()[:1])(one(params), one(adapters), one(x), one(at))


def exported(lora, params, adapters, x, at):
    (n,) = export.symbolic_shape("n")
    shapes = jax.ShapeDtypeStruct((n, 12), x.dtype), jax.ShapeDtypeStruct((n,), at.dtype)
    return export.export(jax.jit(lora.apply))(params, adapters, *shapes).call(params, adapters, x, at)


def donated(lora, params, adapters, x, at):
    run = jax.jit(lambda params, *args: (lora.apply(params, *args), params), donate_argnums=0)
    _, params = run(jax.tree.map(jnp.copy, params), adapters, x, at)
    return run(params, adapters, x, at)[0]


def tangents(lora, params, adapters, x, at):
    along = jax.tree.map(jnp.cos, adapters)

    def of(adapters):
        return lora.apply(params, adapters, x, at)

    return jax.jvp(of, (adapters,), (along,)), jax.linearize(of, adapters)[1](along)


def second_derivative(lora, params, adapters, x, at):
    return jax.hessian(lambda s: loss(lora, params, jax.tree.map(lambda v: s * v, adapters), x, at))(1.1)


def gradient_by_data(lora, params, adapters, x, at):
    return jax.grad(lambda x: loss(lora, params, adapters, x, at))(x)


def checkpointed(lora, params, adapters, x, at):
    of = jax.checkpoint(functools.partial(loss, lora, params), policy=jax.checkpoint_policies.dots_saveable)
    return jax.grad(of)(adapters, x, at)


def merged(lora, params, adapters, x, at):
    both = lora.merge(params, adapters), lora.merge(params, adapters, copy=True), jax.jit(lora.merge)(params, adapters)
    return [arrays(of) for of in both]


def from_numpy(lora, params, adapters, x, at):
    return lora.apply(jax.tree.map(np.asarray, params), adapters, x, at)


def copied(lora, params, adapters, x, at):
    params = pickle.loads(pickle.dumps(copy.deepcopy(lax.stop_gradient(jax.tree.map(lambda v: v, params)))))
    return lora.apply(params, adapters, x, at)


def on_an_explicit_mesh(lora, params, adapters, x, at):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Explicit,))
    laid = jax.device_put((params, adapters, x, at), NamedSharding(mesh, P()))
    step = jax.jit(jax.value_and_grad(functools.partial(loss, lora), 1))
    with jax.set_mesh(mesh):
        return step(*laid), arrays(lora.merge(*laid[:2]))


WAYS = [
    *(vmapped_base, vmapped_gradients, mapped, pmapped, exported, donated, tangents, second_derivative),
    *(gradient_by_data, checkpointed, merged, from_numpy, copied, on_an_explicit_mesh),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize(
    "form",
    ["matrices", *(pytest.param(name, marks=AT_NIGHT) for name in ("eight", "blocks", "gained eight", *FORMATS))],
)
def test_a_stored_base_is_as_the_arrays_it_stands_for(form, way):
    stored, plain, lora, adapters = made(form.removeprefix("gained "), form.startswith("gained "))
    # The function was wrapped on the stored base: the arrays are then the other case too.
    assert_near(way(lora, stored, adapters, *ARGS), way(lora, plain, adapters, *ARGS), 1e-4, floor=1e-3)


@pytest.mark.parametrize("form", ["eight", pytest.param("blocks", marks=AT_NIGHT)])
def test_the_same_is_found_wherever_it_is_wrapped(form):
    stored, plain, lora, adapters = made(form)

    def bare(lora):
        return {path: dataclasses.replace(site, fallbacks=()) for path, site in lora.sites.items()}

    for params in (plain, jax.eval_shape(lambda: stored)):
        other = wrapped(stack_of_layers, params, ARGS, targets=["table", "layers", "out"])
        assert bare(other) == bare(lora) and other.left_out == lora.left_out
        assert_near(other.apply(stored, adapters, *ARGS), lora.apply(plain, adapters, *ARGS), 1e-5)
    shaped = jax.eval_shape(lora.merge, jax.eval_shape(lambda: stored), adapters)
    assert shaped["out"].shape == (12, 8) and is_stored(shaped["bias"]) == (form == "blocks")


def test_the_reason_is_said_where_a_scan_cannot_take_a_form_apart():
    assert made("blocks")[2].sites["layers"].fallbacks == ("scan of a stored weight",)
    assert not any(made(form)[2].sites["layers"].fallbacks for form in ("eight", "matrices"))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize("form", ["eight", pytest.param("blocks", marks=AT_NIGHT)])
def test_a_stored_weight_is_computed_with_in_its_own_dtype(form, dtype):
    with jax.enable_x64(dtype == "float64"):
        stored = {path: STORED[form](w.astype(dtype)) for path, w in weights().items()}
        x, at = ARGS[0].astype(dtype), ARGS[1]
        lora = wrapped(stack_of_layers, stored, (x, at), dtype="float64" if dtype == "float64" else "float32")
        adapters = moved(lora.init(jax.random.key(0)))
        got, want = (lora.apply(params, adapters, x, at) for params in (stored, arrays(stored)))
        assert got.dtype == dtype
        assert_near(got, want, {"float64": 1e-12}.get(dtype, 0.02))


def picks(p, x, at):
    """A stack indexed by data in all ways, and a table that is looked up in all ways."""
    n = (x.sum() > 0).astype(int)
    h = jnp.einsum("tb,tbc->tc", x @ p["layers"][n], p["layers"][at % 3])
    h = jax.vmap(lambda row, n: row @ p["layers"][n])(h, at % 3)
    h = h @ lax.dynamic_index_in_dim(p["layers"], n, 0, False) @ jnp.take(p["layers"], n[None], 0, mode="fill")[0]
    filled = p["table"].at[at].get(mode="fill", fill_value=3.0)
    return h @ p["out"], filled, p["table"][n], p["layers"][n, at[1]], p["layers"][:, n]


@pytest.mark.parametrize(
    "adapted",
    ["layers", "out", pytest.param("table", marks=AT_NIGHT), pytest.param(("table", "layers", "out"), marks=AT_NIGHT)],
)
@pytest.mark.parametrize("form", ["matrices", *(pytest.param(name, marks=AT_NIGHT) for name in ("eight", "blocks"))])
def test_a_stack_indexed_by_data_and_a_table(form, adapted):
    stored = {path: STORED[form](w) for path, w in weights().items()}
    lora = wrapped(picks, stored, ARGS, targets=adapted)
    adapters = moved(lora.init(jax.random.key(0)))

    def whole(params):
        def out(adapters):
            return lora.apply(params, adapters, *ARGS)

        return out(adapters), jax.grad(lambda adapters: sum(jnp.sin(y).sum() for y in out(adapters)))(adapters)

    assert_near(jax.jit(whole)(stored), jax.jit(whole)(arrays(stored)), 1e-4, floor=1e-3)


def test_a_table_without_an_adapter_is_never_dense():
    params, at = {"table": eight_bits(normal(0, 5000, 64)), "w": normal(1, 64, 64)}, jnp.arange(7)
    lora = wrapped(lambda p, at: jnp.tanh(2 * p["table"][at]) @ p["w"], params, (at,), targets="w")
    step = jax.jit(jax.grad(lambda adapters, params: lora.apply(params, adapters, at).sum()))
    used = step.lower(lora.init(jax.random.key(0)), params).compile().memory_analysis().temp_size_in_bytes
    assert used < 5000 * 64


@jax.custom_vjp
def own(w, x):
    return jnp.tanh(x @ w)


own.defvjp(lambda w, x: (own(w, x), (w, x)), lambda kept, dy: (kept[1].T @ dy, dy @ kept[0].T))


def controlled(p, x, at):
    """Weights that loops carry and branches choose, and one under a rule of its own."""
    h = own(p["layers"][0], x)
    h = lax.cond(h.sum() > 0, lambda w, h: h @ w, lambda w, h: -h @ w, p["layers"][1], h)
    h = lax.fori_loop(0, 2, lambda n, c: jnp.tanh(c @ p["layers"][n]), h)
    w = lax.scan(lambda c, _: (c, None), p["out"], None, length=2)[0]
    return h @ w + h @ lax.cond(x.sum() > 0, lambda p: p["out"], lambda p: -p["out"], p)


@pytest.mark.parametrize("form", ["eight", pytest.param("blocks", marks=AT_NIGHT)])
def test_loops_branches_and_own_derivatives(form):
    stored = {path: STORED[form](w) for path, w in weights().items()}
    lora = wrapped(controlled, stored, ARGS, targets=["layers", "out"])
    adapters = moved(lora.init(jax.random.key(0)))
    step = jax.jit(jax.value_and_grad(functools.partial(loss, lora), 1))
    assert_near(step(stored, adapters, *ARGS), step(arrays(stored), adapters, *ARGS), 1e-4, floor=1e-3)


def test_in_boxes_of_linen():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.normal(1.0), ("rows", None))
            return nn.Dense(8, kernel_init=init)(nn.tanh(nn.Dense(12, kernel_init=init)(x)))

    x, is_box = normal(1, 4, 12), lambda node: isinstance(node, nn.Partitioned)
    variables = Two().init(jax.random.key(0), x)
    boxed = jax.tree.map(
        lambda b: b.replace_boxed(eight_bits(b.unbox())) if is_box(b) else b, variables, is_leaf=is_box
    )
    lora = wrapped(Two().apply, boxed, (x,))
    assert sorted(lora.sites) == ["params/Dense_0/kernel", "params/Dense_1/kernel"]
    adapters = moved(lora.init(jax.random.key(0)))
    got = lora.merge(boxed, adapters)
    assert is_box(got["params"]["Dense_0"]["kernel"])
    assert_near(Two().apply(got, x), lora.apply(boxed, adapters, x), 1e-5)


def test_in_variables_of_nnx():
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.up, self.down = nnx.Linear(12, 12, rngs=rngs), nnx.Linear(12, 8, rngs=rngs)

        def __call__(self, x):
            return self.down(nnx.tanh(self.up(x)))

    x, is_box = normal(1, 4, 12), lambda node: isinstance(node, nnx.Variable)
    graph, state = nnx.split(Two(nnx.Rngs(0)))

    def pack(of):
        return of.replace(eight_bits(of[...])) if of[...].ndim > 1 else of

    boxed = jax.tree.map(pack, state, is_leaf=is_box)
    lora = wrapped(lambda state, x: nnx.merge(graph, state)(x), boxed, (x,))
    adapters = moved(lora.init(jax.random.key(0)))
    fn, params = rslora.from_nnx(nnx.merge(graph, boxed))
    other = wrapped(fn, params, (x,))
    assert is_stored(params["up"]["kernel"]) and list(other.sites) == list(lora.sites)
    want = fn(arrays(other.merge(params, adapters)), x)
    assert_near((lora.apply(boxed, adapters, x), other.apply(params, adapters, x)), (want, want), 1e-5)


def test_training_resumes_and_knows_the_base_by_its_form(tmp_path):
    stored, plain, lora, _ = made("eight")
    batches = [(normal(n, 6, 12), ARGS[1], normal(n + 99, 6, 8)) for n in range(9)]

    def by_batch(run, batch):
        return (jnp.sum((run(*batch[:2]) - batch[2]) ** 2), jnp.float32(6))

    options = dict(batches=batches, loss=by_batch, optimizer=optax.adam(1e-2), show=False)
    fit = functools.partial(train.fit, lora, adapters=lora.init(jax.random.key(0)), **options)
    whole = fit(stored, steps=5, folder=tmp_path / "whole")
    fit(stored, steps=3, folder=tmp_path / "cut")
    resumed = fit(stored, steps=5, folder=tmp_path / "cut", resume=True)
    chex.assert_trees_all_equal(resumed.adapters, whole.adapters)
    with pytest.raises(ValueError, match=r"another base.*EightBits of float32\[3,12,12\]"):
        fit(plain, steps=7, folder=tmp_path / "cut", resume=True)
    chex.assert_trees_all_equal(checkpoint.load_adapters(tmp_path / "cut", params=stored)[1], whole.adapters)
