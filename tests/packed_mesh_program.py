"""Values, gradients and gathers of a small decoder over packed bases on four virtual devices, for the tests.

python -m tests.packed_mesh_program MESH FORM [FORM ...]
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

import rslora_jax as rslora
from rslora_jax.models.decoder import SHARDING_RULES, Decoder, DecoderConfig, Embed, Layer
from rslora_jax.parallel import sharding
from rslora_jax.sites import from_paths, named_leaves
from rslora_jax.stored import dense
from tests.reference import trained
from tests.stored.packed import FORMS, packed

ROWS, LENGTH = 4, 8


def model(form: str) -> Decoder:
    """A decoder whose widths are blocks enough for two devices."""
    width = 512 if "_K" in form else 128
    return Decoder(
        DecoderConfig(
            vocab_size=64, width=width, mlp_width=2 * width, num_layers=2, num_heads=4, num_kv_heads=2, scan_layers=True
        )
    )


def gathered(text: str) -> list[list]:
    """Return the dtype and the size of each array that a compiled program gathers."""
    found = re.findall(r"= (\w+)\[([\d,]*)\]\S* all-gather(?:-start)?\(", text)
    return [[dtype, int(np.prod([int(n) for n in shape.split(",") if n]))] for dtype, shape in found]


def largest_part(params) -> float:
    """Return the largest part of a weight's bytes that one device holds of a split kernel."""
    parts = []
    for path, leaf in named_leaves(params).items():
        if path.endswith("kernel"):
            held = sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(leaf))
            parts.append(held / sum(array.nbytes for array in jax.tree.leaves(leaf)))
    return max(parts)


def outcome(form: str, mesh_text: str) -> dict:
    """Return the largest difference from the dense base on one device, and what is gathered."""
    decoder, tokens = model(form), jax.random.randint(jax.random.key(3), (ROWS, LENGTH), 0, 64)
    base = decoder.init(jax.random.key(0), tokens[:1, :4])
    stored = from_paths(base, {path: packed(form, path, w) for path, w in named_leaves(base).items()})
    plain = from_paths(base, {path: dense(w) for path, w in named_leaves(stored).items()})
    mesh = sharding.make_mesh(mesh_text)
    where, found = sharding.batch_sharding(mesh, ROWS), {}
    laid = jax.device_put(stored, sharding.param_shardings(stored, mesh, SHARDING_RULES))
    pinned = sharding.pin_packed(sharding.pin_rows(decoder.apply, where, (Embed, Layer)), laid, where)

    def results(apply, params, on_mesh):
        lora = rslora.wrap(apply, params, tokens, config=rslora.LoraConfig(rank=6, alpha=10))
        given = trained(lora), params, tokens
        if on_mesh:
            given = (
                jax.device_put(given[0], sharding.adapter_shardings(lora.sites, params)),
                params,
                jax.device_put(tokens, where),
            )
        step = jax.jit(jax.value_and_grad(lambda a, p, t: jnp.sum(jnp.sin(lora.apply(p, a, t)))))
        compiled = step.lower(*given).compile()
        if on_mesh:
            found["gathers"] = gathered(compiled.as_text())
        return compiled(*given)

    many = results(pinned, laid, True)

    def apart(other):
        flat = zip(jax.tree.leaves(many), jax.tree.leaves(other), strict=True)
        return max(float(np.abs(np.asarray(x) - np.asarray(y)).max() / np.abs(np.asarray(y)).max()) for x, y in flat)

    return found | {"apart": apart(results(decoder.apply, plain, False)), "largest part": largest_part(laid)}


if __name__ == "__main__":
    assert len(jax.devices()) == 4 and set(sys.argv[2:]) <= set(FORMS)
    print(json.dumps({form: outcome(form, sys.argv[1]) for form in sys.argv[2:]}))
