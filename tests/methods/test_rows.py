"""Trained rows of tables and heads, against the same rows put into the base, over all programs of the laws."""

import functools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rslora_jax as rslora
from rslora_jax import train
from rslora_jax.analysis import stability
from rslora_jax.parallel import sharding
from rslora_jax.sites import from_paths, named_leaves
from tests.program_models import normal
from tests.programs import CASES
from tests.reference import assert_near
from tests.stored.eight_bits import eight_bits

pytestmark = pytest.mark.usefixtures("compile_fast")


def of_rows(case):
    """Wrap a program with two rows of everything that has rows trained; None where nothing does."""
    everything = rslora.wrap(
        case.fn, case.params, *case.args, config=rslora.LoraConfig(rank=1, targets="*", allow_large_rank=True)
    )
    rows = {}
    for path, site in everything.sites.items():
        axes = site.in_axes if site.kind == "embedding" else site.out_axes
        if site.kind in ("embedding", "linear") and not site.stack_axes and len(axes) == 1 and site.shape[axes[0]] > 1:
            rows[path.replace("[", "[[]")] = [site.shape[axes[0]] - 1, 0]
    config = rslora.LoraConfig(targets=(), trained_rows=rows)
    return rslora.wrap(case.fn, case.params, *case.args, config=config) if rows else None


def moved(adapters):
    rng = np.random.default_rng(4)
    return jax.tree.map(lambda x: jnp.asarray(x + 0.3 * rng.standard_normal(x.shape), x.dtype), adapters)


def in_place(lora, params, adapters):
    """Put rows into the base, in numpy."""
    leaves = dict(named_leaves(params))
    for path, site in lora.sites.items():
        axis = site.in_axes[0] if site.kind == "embedding" else site.out_axes[0]
        table = np.moveaxis(np.asarray(leaves[path], np.float64).copy(), axis, 0)
        table[list(site.method.ids)] = np.asarray(adapters[path]["rows"], np.float64)
        leaves[path] = jnp.asarray(np.moveaxis(table, 0, axis), leaves[path].dtype)
    return from_paths(params, leaves)


DAY = ("linen tied, every matrix",)


@pytest.mark.by_day_on("newest")
@pytest.mark.parametrize("name", [n if n in DAY else pytest.param(n, marks=pytest.mark.nightly) for n in CASES])
def test_laws_1_and_2_on_every_program(name):
    case = CASES[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rslora.RsloraWarning)
        lora = of_rows(case)
        if lora is None:
            pytest.skip("no weight of this program is a table or a head")
        fresh = lora.init(jax.random.key(0), case.params)
        adapters = moved(fresh)
        merged = in_place(lora, case.params, adapters)
        got, want = jax.jit(lora.apply)(case.params, fresh, *case.args), jax.jit(case.fn)(case.params, *case.args)
        assert_near(got, want, 1e-6 if case.tolerance < 1e-3 else case.tolerance)
        assert_near(lora.merge(case.params, adapters), merged, max(case.tolerance, 1e-6))
        apply, plain = (lambda a: lora.apply(case.params, a, *case.args)), (lambda p: case.fn(p, *case.args))
        assert_near(jax.jit(apply)(adapters), jax.jit(plain)(merged), max(2 * case.tolerance, 2e-5))
        if name.startswith("control while"):  # of which JAX has no reverse mode
            return

        def loss(fn, of):
            return jnp.sum(jnp.sin(jax.tree.leaves(fn(of))[0].real.astype(jnp.float32)))

        grads = jax.jit(jax.grad(functools.partial(loss, apply)))(adapters)
        dw = named_leaves(jax.jit(jax.grad(functools.partial(loss, plain), allow_int=True))(merged))
    tolerance = max(50 * case.tolerance, 1e-3) if case.tolerance < 1e-3 else 0.15
    for path, site in lora.sites.items():
        axis = site.in_axes[0] if site.kind == "embedding" else site.out_axes[0]
        of_ids = np.moveaxis(np.asarray(dw[path], np.float64), axis, 0)[list(site.method.ids)]
        assert_near(grads[path]["rows"], of_ids, tolerance, floor=1e-3)


def tied(p, ids):
    def layer(x, w):
        return jnp.tanh(x @ w), None

    x, _ = jax.lax.scan(jax.checkpoint(layer), 3 * p["table"][ids], p["layers"])
    return x @ p["table"].T


def parts(vocabulary=11, width=8):
    layers = normal(0, 3, width, width)
    return {"table": normal(2, vocabulary, width), "layers": layers}, jnp.arange(7)


def wrapped(params, ids, **config):
    config = rslora.LoraConfig(**{"rank": 3, "alpha": 7.0, "trained_rows": {"table": [10, 2]}} | config)
    return rslora.wrap(tied, params, ids, config=config)


@pytest.mark.by_day_on("oldest")
def test_beside_adapters_with_dropout_and_all_that_goes_over_sites():
    params, ids = parts()
    lora = wrapped(params, ids, dropout=0.5)
    assert lora.num_parameters == 3 * 2 * 24 + 16
    assert "3 matrices and 2 rows" in str(lora) and "by name only" not in str(lora)
    assert lora.labels()["table"] == {"rows": "trained"}
    adapters = lora.init(jax.random.key(0), params)
    with jax.disable_jit():
        chex.assert_trees_all_equal(lora.apply(params, adapters, ids), tied(params, ids))
    # Of rows nothing is dropped: with B at zero, all that differs is what they make of it.
    adapters["table"]["rows"] = normal(5, 2, 8)
    merged = {**params, "table": params["table"].at[jnp.array([10, 2])].set(adapters["table"]["rows"])}
    got = jax.jit(lora.apply)(params, adapters, ids, dropout_key=jax.random.key(1))
    assert_near(got, tied(merged, ids), 1e-5)
    ones = jax.tree.map(jnp.ones_like, adapters)
    for optimizer in (train.scale_by_rank(lora, reference_rank=8), train.lora_plus(lora, 16.0)):
        after, _ = optimizer.update(ones, optimizer.init(adapters))
        assert (after["table"]["rows"] == 1).all()
    found = stability.measure(lora, lambda run, x: run(x).sum(), params, adapters, ids)
    assert list(found) == ["layers"]
    assert rslora.LoraConfig.from_json(lora.config.to_json()) == lora.config
    with pytest.raises(ValueError, match="Rows starts from the values of table: give the base"):
        lora.init(jax.random.key(0))


def test_the_table_is_neither_copied_nor_differentiated():
    size, width = 8192, 64
    params, ids = parts(size, width)
    ids = jnp.arange(16)
    lora = wrapped(params, ids, trained_rows={"table": [size - 1, 5]})
    adapters = jax.eval_shape(lora.init, jax.random.key(0), params)

    def loss(apply, p, ids):
        return jnp.sum(jax.nn.logsumexp(apply(p, ids)[:8], -1))

    step = jax.jit(jax.grad(lambda a, p, ids: loss(lambda p, ids: lora.apply(p, a, ids), p, ids)))
    alone = jax.jit(jax.grad(lambda q, p, ids: loss(tied, {**p, "layers": q}, ids)))
    taken = step.lower(adapters, params, ids).compile().memory_analysis().temp_size_in_bytes
    base = alone.lower(params["layers"], params, ids).compile().memory_analysis().temp_size_in_bytes
    logits = len(ids) / width  # of a table: what the rows add to them is an array
    assert taken - base < (logits + 0.2) * 4 * size * width, (taken - base) / (4 * size * width)


@pytest.mark.by_day_on("newest")
def test_rows_of_a_stored_table_and_on_a_mesh():
    params, ids = parts(width=16)
    stored = {**params, "table": eight_bits(params["table"])}
    lora = wrapped(stored, ids)
    adapters = lora.init(jax.random.key(0), stored)
    adapters["table"]["rows"] = normal(5, 2, 16)
    table = stored["table"].dense().at[jnp.array([10, 2])].set(adapters["table"]["rows"])
    assert_near(lora.apply(stored, adapters, ids), tied({**params, "table": table}, ids), 1e-5)
    mesh = sharding.make_mesh("fsdp=-1")
    placed = jax.device_put(params, sharding.param_shardings(params, mesh, [("table", (None, "fsdp"))]))
    lora = wrapped(params, ids)
    assert tuple(sharding.adapter_shardings(lora.sites, placed)["table"]["rows"].spec) == (None, "fsdp")


ERRORS = [
    (dict(trained_rows={"tabel": [1]}), "trained_rows 'tabel' matches no parameter: did you mean table"),
    (dict(trained_rows={"table": [11]}), "table of 11 rows, and names row 11: they are numbered from 0 to 10"),
    (dict(trained_rows={"table": [1, 3, 1]}), "names row 1 twice"),
    (dict(trained_rows={"table": []}), "names no row"),
    (dict(trained_rows={"table": [-1]}), "-1 is not the number of a row"),
    (dict(trained_rows={"table": [True]}), "True is not the number of a row"),
    (dict(trained_rows={"layers": [1]}, targets=()), "matches layers, which is neither a table that is looked up"),
    (dict(trained_rows=[("table", [1]), ("t*", [2])]), "and so does another pattern"),
    (dict(targets=["table", "layers"]), "which is adapted or trained whole too"),
    (dict(targets=["table@product", "layers"]), "which is adapted or trained whole too \\(table@product\\)"),
    (dict(trained="table"), "which is adapted or trained whole too"),
]


@pytest.mark.parametrize(("config", "said"), ERRORS)
def test_what_has_no_rows_is_said(config, said):
    with pytest.raises(ValueError, match=said):
        wrapped(*parts(), **config)
