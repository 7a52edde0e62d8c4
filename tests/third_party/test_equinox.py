"""A language model of Equinox's own layers, which work on one token and are mapped over the rest."""

import jax
import jax.numpy as jnp
import pytest

from tests.third_party.checks import assert_exact, wrapped

eqx = pytest.importorskip("equinox", reason="needs equinox: see tests/third_party/README.md", exc_type=ImportError)

pytestmark = pytest.mark.nightly

VOCABULARY, WIDTH, LENGTH = 50, 16, 6


class Block(eqx.Module):
    norms: list
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key):
        one, two = jax.random.split(key)
        self.norms = [eqx.nn.LayerNorm(WIDTH), eqx.nn.RMSNorm(WIDTH)]
        self.attention = eqx.nn.MultiheadAttention(4, WIDTH, key=one)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 3 * WIDTH, 1, jax.nn.gelu, key=two)

    def __call__(self, x):
        h = jax.vmap(self.norms[0])(x)
        x = x + self.attention(h, h, h, mask=jnp.tril(jnp.ones((LENGTH, LENGTH), bool)))
        return x + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x))


class Decoder(eqx.Module):
    embed: eqx.nn.Embedding
    positions: eqx.nn.Embedding
    blocks: Block  # stacked
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear | None

    def __init__(self, key, tied):
        keys = jax.random.split(key, 5)
        self.embed = eqx.nn.Embedding(VOCABULARY, WIDTH, key=keys[0])
        self.positions = eqx.nn.Embedding(LENGTH, WIDTH, key=keys[1])
        self.blocks = eqx.filter_vmap(Block)(jax.random.split(keys[2], 2))
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.head = None if tied else eqx.nn.Linear(WIDTH, VOCABULARY, use_bias=False, key=keys[3])

    def __call__(self, tokens):
        x = jax.vmap(self.embed)(tokens) + jax.vmap(self.positions)(jnp.arange(LENGTH))
        arrays, rest = eqx.partition(self.blocks, eqx.is_array)
        x, _ = jax.lax.scan(lambda x, block: (eqx.combine(block, rest)(x), None), x, arrays)
        x = jax.vmap(self.norm)(x)
        return x @ self.embed.weight.T if self.head is None else jax.vmap(self.head)(x)


def decoder(tied):
    params, static = eqx.partition(Decoder(jax.random.key(0), tied), eqx.is_array)

    def fn(params, tokens):
        return jax.vmap(eqx.combine(params, static))(tokens)

    return fn, params, jax.random.randint(jax.random.key(1), (2, LENGTH), 0, VOCABULARY)


LINEAR = {f"blocks/attention/{name}_proj/weight" for name in ("query", "key", "value", "output")}
LINEAR |= {f"blocks/mlp/layers/{n}/weight" for n in range(2)}


@pytest.mark.parametrize("tied", [False, True])
def test_by_default_the_layers_are_adapted_and_the_head_and_tables_are_not(tied):
    fn, params, tokens = decoder(tied)
    lora, said = wrapped(fn, params, tokens)
    assert set(lora.sites) == LINEAR and not said
    for site in lora.sites.values():  # stored (layers, out, in)
        assert (site.stack_axes, site.in_axes, site.out_axes, site.fallbacks) == ((0,), (2,), (1,), ())
    assert lora.left_out["embed/weight"] == lora.left_out["positions/weight"] == "embedding: by name only"
    assert tied or lora.left_out["head/weight"] == "output head: by name only"
    assert_exact(lora, params, tokens)


@pytest.mark.parametrize("tied", [False, True])
def test_a_named_table_is_adapted_as_an_embedding_and_a_tied_one_is_not_materialised(tied):
    fn, params, tokens = decoder(tied)
    lora, said = wrapped(fn, params, tokens, targets=["*/weight"], exclude=["*norm*"])
    tables = {"embed/weight", "positions/weight"}
    assert set(lora.sites) == LINEAR | tables | (set() if tied else {"head/weight"})
    for path in tables:
        site = lora.sites[path]
        assert (site.kind, site.in_axes, site.out_axes) == ("embedding", (0,), (1,))
    assert not said and not any(site.fallbacks for site in lora.sites.values())
    assert_exact(lora, params, tokens)


def test_one_token_at_a_time_has_the_same_weights():
    """A recurrent cell, fed row by row in a scan."""
    keys = jax.random.split(jax.random.key(0), 3)
    parts = {
        "embed": eqx.nn.Embedding(VOCABULARY, WIDTH, key=keys[0]),
        "cell": eqx.nn.GRUCell(WIDTH, WIDTH, key=keys[1]),
        "head": eqx.nn.Linear(WIDTH, VOCABULARY, key=keys[2]),
    }
    params, static = eqx.partition(parts, eqx.is_array)

    def fn(params, tokens):
        p = eqx.combine(params, static)

        def step(h, token):
            h = p["cell"](p["embed"](token), h)
            return h, p["head"](h)

        return jax.lax.scan(step, jnp.zeros(WIDTH), tokens)[1]

    tokens = jax.random.randint(jax.random.key(1), (LENGTH,), 0, VOCABULARY)
    lora, said = wrapped(fn, params, tokens)
    assert set(lora.sites) == {"cell/weight_ih", "cell/weight_hh"} and not said
    assert lora.left_out["embed/weight"] == "embedding: by name only"
    assert lora.left_out["head/weight"] == "output head: by name only"
    lora, said = wrapped(fn, params, tokens, targets=["all-linear", "embed/*", "head/weight"])
    assert lora.sites["embed/weight"].kind == "embedding" and not said
    assert_exact(lora, params, tokens)
