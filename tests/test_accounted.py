"""Law 5b: every parameter is adapted, left out with its reason, or unused, and nothing is left out in silence."""

import importlib.util
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import rslora_jax as rslora
from tests.accounted import ENTRIES, NAMES, Entry
from tests.program_models import normal
from tests.reference import assert_near, gradients_by_hand, merged_by_hand, trained

pytestmark = pytest.mark.usefixtures("compile_fast")

X = normal(9, 5, 12)
EACH = pytest.mark.parametrize("entry", [pytest.param(entry, id=entry.code) for entry in ENTRIES])


def wrapped(fn, params, *args, **config):
    """Return the wrapped function, and what was said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        lora = rslora.wrap(fn, params, *args, config=rslora.LoraConfig(**{"rank": 3, "alpha": 7} | config))
    return lora, [str(w.message) for w in said if w.category is rslora.RsloraWarning]


def letters(site: rslora.Site) -> str:
    sides = {"i": site.in_axes, "o": site.out_axes, "s": site.stack_axes}
    return "".join(next(c for c, axes in sides.items() if n in axes) for n in range(len(site.shape)))


@EACH
def test_a_parameter_is_adapted_as_it_is_used_or_left_out_with_its_reason(entry: Entry):
    lora, said = wrapped(entry.fn, entry.params, *entry.args)
    assert {name: letters(site) for name, site in lora.sites.items()} == entry.adapted
    assert set(lora.left_out) == set(entry.left_out) and not lora.unused
    assert all(lora.left_out[name].startswith(why) for name, why in entry.left_out.items())
    materialised = [site for site in lora.sites.values() if site.fallbacks]
    assert bool(materialised) == bool(entry.fallback)
    if entry.fallback:
        assert any(entry.fallback in site.fallbacks for site in materialised)
    parts = [part for part in (entry.warning, "materialised" if entry.fallback else "") if part]
    assert len(said) == len(parts) and all(any(part in text for text in said) for part in parts)


@pytest.mark.by_day_on("oldest")
@EACH
def test_what_is_adapted_is_exact(entry: Entry):
    lora, _ = wrapped(entry.fn, entry.params, *entry.args)
    adapters = trained(lora)
    by_hand = merged_by_hand(lora, entry.params, adapters)
    got, want = jax.jit(lora.apply)(entry.params, adapters, *entry.args), jax.jit(entry.fn)(by_hand, *entry.args)
    assert_near(got, want, 2e-5)
    assert jnp.abs(want - entry.fn(entry.params, *entry.args)).max() > 1e-3
    if "kernel" in entry.code or "linear_call" in entry.code:
        return  # JAX differentiates neither a Pallas kernel nor a linear call by what is not its linear argument

    def loss(y):
        return jnp.sum(jnp.sin(y))

    grads = jax.jit(jax.grad(lambda a: loss(lora.apply(entry.params, a, *entry.args))))(adapters)
    dw = jax.jit(jax.grad(lambda p: loss(entry.fn(p, *entry.args)), allow_int=True))(by_hand)
    assert_near(grads, gradients_by_hand(lora, adapters, dw), 2e-4)


@pytest.mark.parametrize("name", ["w", "square"])
def test_what_is_left_out_loudly_is_exact_once_its_axes_are_stated(name):
    entry = next(e for e in ENTRIES if e.left_out.get(name, "").startswith("meets data"))
    lora, said = wrapped(entry.fn, entry.params, *entry.args)
    (line,) = [text.split("state its axes: ")[1] for text in said if name in text and "state" in text]
    config = eval(line, {"LoraConfig": rslora.LoraConfig})  # it is ready to paste
    assert rslora.LoraConfig.from_json(config.to_json()) == config
    lora, _ = wrapped(entry.fn, entry.params, *entry.args, axes=config.axes)
    assert letters(lora.sites[name]) == "io" and lora.sites[name].fallbacks and not lora.left_out
    adapters = trained(lora)
    want = entry.fn(merged_by_hand(lora, entry.params, adapters), *entry.args)
    assert_near(jax.jit(lora.apply)(entry.params, adapters, *entry.args), want, 2e-5)


def test_stated_axes_take_the_place_of_those_found_and_have_to_fit():
    params = {"w": normal(0, 12, 12), "v": normal(1, 12, 12), "bias": jnp.ones(12)}

    def fn(p, x):
        return x @ p["w"] + x @ p["v"] + p["bias"]

    lora, _ = wrapped(fn, params, X, axes={"w": ("out", "in")})
    assert (letters(lora.sites["w"]), letters(lora.sites["v"])) == ("oi", "io")
    adapters = trained(lora)
    assert_near(lora.apply(params, adapters, X), fn(merged_by_hand(lora, params, adapters), X), 1e-5)
    with pytest.raises(ValueError, match=r"axes 'bias' states 2 axes, and matches bias of shape \(12,\)"):
        wrapped(fn, params, X, axes={"bias": ("in", "out")})
    with pytest.raises(ValueError, match="axes 'u' matches no parameter: did you mean"):
        wrapped(fn, params, X, axes={"u": ("in", "out")})
    with pytest.raises(ValueError, match="at least one 'in' and one 'out'"):
        rslora.LoraConfig(axes={"w": ("in", "stack")})


def test_where_nothing_is_found_the_error_says_what_was_left_out_and_why():
    params = {"layers_0": {"s": jnp.ones(12)}, "layers_1": {"s": jnp.ones(12)}, "w": normal(0, 12, 16)}

    def fn(p, x):
        return ((x * p["layers_0"]["s"] + p["layers_1"]["s"])[..., None] * p["w"]).sum(1)

    with pytest.raises(ValueError, match="no weight is left to adapt") as error:
        wrapped(fn, params, X)
    for part in ("norms and biases: layers_{0..1}/s", "meets data in mul and reduce_sum", "axes={'w': ('in', 'out')}"):
        assert part in str(error.value)


def test_a_target_that_cannot_be_adapted_says_why_and_what_to_write():
    def fn(p, x):
        return x @ p["v"] + (x[..., None] * p["w"]).sum(1)

    params = {"w": normal(0, 12, 16), "v": normal(1, 12, 16)}
    with pytest.raises(ValueError, match=r"target 'w' matches w .*mul and reduce_sum.*axes=\{'w': \('in', 'out'\)\}"):
        wrapped(fn, params, X, targets=["w"])


def test_what_is_dead_is_unused_and_takes_no_part():
    """Whatever hides it: a call, a scan, a loop, a branch."""

    def fn(p, x):
        jnp.take(p["stack"], jnp.array([0, 1]), axis=0)
        x @ jnp.tanh(p["w"][:, :2])  # which would be a fallback
        _, y = jax.jit(lambda w, x: (x @ w, x + 1))(p["dead"], x)
        y = jax.lax.scan(lambda x, w: (x @ w, (x @ p["other"]).sum()), y, p["stack"])[0]
        return y @ p["w"]

    params = {
        "stack": normal(0, 3, 12, 12),
        "dead": normal(1, 12, 12),
        "other": normal(2, 12, 12),
        "w": normal(3, 12, 4),
    }
    lora, said = wrapped(fn, params, X)
    assert set(lora.unused) == {"dead", "other"} and not lora.left_out and not said
    assert letters(lora.sites["stack"]) == "sio" and not lora.sites["w"].fallbacks
    assert "2 unused" in str(lora)
    changed = params | {name: 5 * params[name] for name in lora.unused}
    assert (fn(changed, X) == fn(params, X)).all()


def test_an_axis_that_a_scan_takes_apart_is_no_tables_rows_and_a_large_table_is_said():
    params = {"stack": normal(0, 3, 12, 12)}

    def both(p, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, p["stack"])[0] + p["stack"][NAMES["idx"] % 3].sum()

    lora, said = wrapped(both, params, X)
    assert letters(lora.sites["stack"]) == "sio" and any("materialised" in text for text in said)

    def table(p, x):
        return x + p["stack"][NAMES["idx"] % 3].sum()

    lora, said = wrapped(table, params, X, targets=["*"])
    assert any("is taken for a table" in text or "taken for a table" in text for text in said)
    assert any("LoraConfig(axes={'stack': ('stack', 'in', 'out')})" in text for text in said)


def test_lookups_of_every_form_are_lookups():
    forms = {
        "index": lambda e, i: e[i],
        "take": lambda e, i: jnp.take(e, i, axis=0),
        "take clipped": lambda e, i: jnp.take(e, i, axis=0, mode="clip"),
        "vmap of index": lambda e, i: jax.vmap(lambda i: e[i])(i),
        "vmap of take": lambda e, i: jax.vmap(lambda i: jnp.take(e, i, axis=0))(i),
        "vmap of dynamic_slice": lambda e, i: jax.vmap(lambda i: jax.lax.dynamic_slice(e, (i, 0), (1, 12))[0])(i),
        "vmap twice": lambda e, i: jax.vmap(jax.vmap(lambda i: e[i]))(i[None])[0],
        "map": lambda e, i: jax.lax.map(lambda i: e[i[None]][0], i),
        "columns": lambda e, i: e.T[:, i].T,
        "scan of index": lambda e, i: jax.lax.scan(lambda c, i: (c, e[i]), 0, i)[1],
        "scan of dynamic_slice": lambda e, i: jax.lax.scan(
            lambda c, i: (c, jax.lax.dynamic_index_in_dim(e, i, keepdims=False)), 0, i
        )[1],
        "scan of take": lambda e, i: jax.lax.scan(lambda c, i: (c, jnp.take(e, i, axis=0)), 0, i)[1],
        "one": lambda e, i: e[i[0]][None],
        "one hot": None,
    }
    del forms["one hot"]
    params = {"table": normal(0, 10, 12), "w": normal(1, 12, 12), "head": normal(2, 12, 10)}
    for name, look in forms.items():

        def fn(p, i, look=look):
            return jnp.tanh(look(p["table"], i) @ p["w"]) @ p["head"]

        lora, said = wrapped(fn, params, NAMES["ids"], targets=["*"])
        assert lora.sites["table"].kind == "embedding", name
        assert not said and not lora.sites["table"].fallbacks, name
        assert list(wrapped(fn, params, NAMES["ids"])[0].sites) == ["w"], name  # the head is known by the table
        adapters = trained(lora)
        want = fn(merged_by_hand(lora, params, adapters), NAMES["ids"])
        assert_near(jax.jit(lora.apply)(params, adapters, NAMES["ids"]), want, 1e-5)


@pytest.mark.parametrize(("rank", "want"), [(2, 2), (8, 8), (24, 10)])
def test_a_rank_above_a_weights_own_is_cut_down_and_said(rank, want):
    params = {"w": normal(0, 12, 10), "big": normal(1, 12, 60)}

    def fn(p, x):
        return x @ p["w"] @ p["w"].T @ p["big"]

    lora, said = wrapped(fn, params, X, rank=rank)
    site = lora.sites["w"]
    assert site.rank == want and site.gamma == pytest.approx(7 / want**0.5)
    assert bool(said) == (rank > want) and all("full rank" in text for text in said)
    assert (f"{want} = full" in str(lora)) == (rank >= want and want == 10)
    with pytest.raises(ValueError, match="rank 11 is above 10"):
        wrapped(fn, params, X, rank_pattern={"w": 11})
    assert wrapped(fn, params, X, rank_pattern={"w": 11}, allow_large_rank=True)[0].sites["w"].rank == 11


def test_the_documentations_table_is_what_the_tests_ran():
    script = Path(__file__).parent.parent / "scripts/adapted_table.py"
    spec = importlib.util.spec_from_file_location("adapted_table", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page()


def test_the_table_shows_what_is_left_out_by_reason():
    entry = next(e for e in ENTRIES if "table" in e.left_out and "head" in e.left_out)
    text = str(wrapped(entry.fn, entry.params | {"unseen": jnp.ones(3)}, *entry.args)[0])
    assert "not adapted: 1 head by name only, 1 table by name only, 1 unused" in text
    assert "  table by name only: table" in text and "  unused: unseen" in text
