"""Weights that a program gathers or passes on by hand on four devices, beside weights merged by hand: a script.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m tests.collective_program

On one device a collective does nothing, and what is wrong with it does not show.
"""

import warnings

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

import rslora_jax as rslora
from tests.program_models import normal
from tests.reference import assert_near, gradients_by_hand, merged_by_hand, trained

DEVICES = 4
RING = [(n, (n + 1) % DEVICES) for n in range(DEVICES)]


def gather(w, axis, tiled=True):
    return lax.all_gather(w, "n", axis=axis, tiled=tiled)


def ring(w, x):
    """A product whose weight is cut along its in-axis and goes round."""
    size, y = w.shape[0], 0.0
    for turn in range(DEVICES):
        mine = (lax.axis_index("n") - turn) % DEVICES
        y = y + lax.dynamic_slice_in_dim(x, mine * size, size, 1) @ w
        w = lax.ppermute(w, "n", RING)
    return y


def own_rows(w, x):
    """Each device takes rows of its own of a whole weight, and all are gathered again."""
    size = w.shape[0] // DEVICES
    mine = lax.dynamic_slice_in_dim(w, lax.axis_index("n") * size, size, 0)
    return x @ gather(mine, 0)


# Name: (body, how the weight is cut, what falls back).
PROGRAMS = {
    "gathered along in": (lambda w, x: x @ gather(w, 0), P("n", None), ""),
    "gathered along out": (lambda w, x: x @ gather(w, 1), P(None, "n"), ""),
    "gathered as a stack": (
        lambda w, x: jnp.einsum("tni,nio->to", x.reshape(5, 4, 3), gather(w, 0, False)),
        P("n", None),
        "",
    ),
    "gathered along the other axis": (lambda w, x: x[:, :3] @ gather(w, 1), P("n", None), "all_gather"),
    "gathered, scaled by the device": (
        lambda w, x: jnp.concatenate([x] * DEVICES, 1) @ gather(w * (1.0 + lax.axis_index("n")), 0),
        P(None, None),
        "all_gather",
    ),
    "moved by the device, gathered": (lambda w, x: x @ gather(w + lax.axis_index("n"), 0)[::4], P(None, None), ""),
    "own rows": (own_rows, P(None, None), ""),
    "round a ring": (ring, P("n", None), ""),
    "passed on to some": (lambda w, x: x[:, :3] @ lax.ppermute(w, "n", RING[:2]), P("n", None), ""),
}


def check(name: str, vma: bool) -> None:
    body, spec, fallback = PROGRAMS[name]
    mesh = jax.make_mesh((DEVICES,), ("n",), axis_types=(jax.sharding.AxisType.Auto,))

    def total(w, x):
        return lax.psum(jnp.sin(body(w, x)) * (1.0 + lax.axis_index("n")), "n")

    def fn(p, x):
        return jax.shard_map(total, mesh=mesh, in_specs=(spec, P()), out_specs=P(), check_vma=vma)(p["w"], x)

    params, x = {"w": normal(0, 12, 16)}, normal(1, 5, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rslora.RsloraWarning)
        lora = rslora.wrap(fn, params, x, config=rslora.LoraConfig(rank=3, alpha=7))
    assert lora.sites["w"].fallbacks == ((fallback,) if fallback else ()), (name, lora.sites["w"].fallbacks)
    adapters = trained(lora)
    by_hand = merged_by_hand(lora, params, adapters)
    got, want = jax.jit(lora.apply)(params, adapters, x), jax.jit(fn)(by_hand, x)
    assert_near(got, want, 2e-5)
    grads = jax.jit(jax.grad(lambda a: lora.apply(params, a, x).sum()))(adapters)
    dw = jax.jit(jax.grad(lambda p: fn(p, x).sum()))(by_hand)
    assert_near(grads, gradients_by_hand(lora, adapters, dw), 2e-4)


def main() -> None:
    assert jax.device_count() == DEVICES, jax.device_count()
    for name in PROGRAMS:
        for vma in (True, False):
            check(name, vma)
            print(f"right: {name}, check_vma={vma}")


if __name__ == "__main__":
    main()
