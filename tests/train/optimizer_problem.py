"""A problem for optimisers, and optax by hand on it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rslora_jax as rslora


class Problem:
    """Two weights as a batch, so that factors are stacks; alpha is not r, and r is no square."""

    def __init__(self):
        keys = jax.random.split(jax.random.key(0), 2)
        self.params = {"w": jax.random.normal(keys[0], (2, 5, 7)) / 2}

        def model(p, x):
            return jnp.einsum("nbi,nio->bno", x, p["w"])

        config = rslora.LoraConfig(rank=3, alpha=7)
        self.lora = rslora.wrap(model, self.params, jnp.ones((2, 4, 5)), config=config)
        self.adapters = jax.tree.map(lambda x: x + 0.05, self.lora.init(keys[1]))
        draw = np.random.default_rng(0).normal
        self.batches = [draw(size=(2, 4, 5)).astype("float32") for _ in range(3)]

    def mean(self, adapters, x):
        """The mean loss with the weight formed by hand."""
        w = self.params["w"] + 7 / np.sqrt(3) * adapters["w"]["a"] @ adapters["w"]["b"]
        return jnp.mean((jnp.einsum("nbi,nio->bno", x, w) - 1) ** 2)

    def by_hand(self, optimizer, ask, steps):
        """The adapters after so many steps of optax alone."""

        @jax.jit
        def step(adapters, state, x):
            def value_fn(adapters):
                return self.mean(adapters, x)

            fast = adapters.fast if isinstance(adapters, optax.LookaheadParams) else adapters
            value, grad = jax.value_and_grad(value_fn)(fast)
            extra = {"value": value, "grad": grad, "value_fn": value_fn, "obj_fn": value_fn}
            extra["grad_fn"] = lambda adapters, _: jax.grad(value_fn)(adapters)
            updates, state = optimizer.update(grad, state, adapters, **{name: extra[name] for name in ask})
            return optax.apply_updates(adapters, updates), state

        lookahead = "lookahead" in optimizer.update.__qualname__
        adapters = optax.LookaheadParams.init_synced(self.adapters) if lookahead else self.adapters
        state = optimizer.init(adapters)
        for x in self.batches[:steps]:
            adapters, state = step(adapters, state, x)
        return adapters.fast if lookahead else adapters


def squares(run, batch):
    return jnp.sum((run(batch) - 1) ** 2), jnp.float32(4 * 2 * 7)


def equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)

    def bits(x):
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    jax.tree.map(lambda g, w: np.testing.assert_array_equal(bits(g), bits(w)), got, want)
    assert jax.tree.map(lambda x: (x.dtype, x.shape), got) == jax.tree.map(lambda x: (x.dtype, x.shape), want)


def near(got, want, tolerance=1e-4):
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=tolerance * np.abs(w).max()), got, want)
