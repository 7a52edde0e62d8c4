"""A decoder with adapters on meshes of four devices, by the kernel and with all scores: prints how far they differ."""

import functools
import json

import jax
import jax.numpy as jnp

import rslora_jax as rslora
from rslora_jax.models import kernels
from rslora_jax.models.decoder import SHARDING_RULES, Decoder, DecoderConfig, Embed, Layer
from rslora_jax.parallel import sharding

SIZES = dict(vocab_size=32, width=64, mlp_width=32, num_layers=2, num_heads=4, num_kv_heads=2, scan_layers=True)


def loss_and_gradient(how, mesh):
    model = Decoder(DecoderConfig(**SIZES, remat="full", attention=how, window=50, window_layers=(True, False)))
    tokens = jax.random.randint(jax.random.key(0), (4, 130), 0, 32)
    variables = model.init(jax.random.key(1), tokens[:, :8])
    variables = jax.device_put(variables, sharding.param_shardings(variables, mesh, SHARDING_RULES))
    where = sharding.batch_sharding(mesh, 4)
    apply = sharding.pin_rows(model.apply, where, (Embed, Layer))
    config = rslora.LoraConfig(rank=3, alpha=5)
    lora = rslora.wrap(apply, variables, jax.ShapeDtypeStruct((1, 8), "int32"), config=config)
    adapters = jax.tree.map(lambda x: x + 0.05, lora.init(jax.random.key(2)))

    def loss(adapters, variables, tokens):
        return jnp.mean(lora.apply(variables, adapters, tokens) ** 2)

    step = jax.jit(jax.value_and_grad(loss)).lower(adapters, variables, jax.device_put(tokens, where))
    return step.as_text().count("manual_computation"), step.compile()(adapters, variables, tokens)


def main():
    kernels.splash_kernel = functools.partial(kernels.splash_kernel, interpret=True)
    found = {}
    for axes in ("fsdp=2,tensor=2", "data=4"):
        mesh = sharding.make_mesh(axes)
        (none, want), (shared, got) = (loss_and_gradient(how, mesh) for how in ("xla", "pallas"))
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
        found[axes] = none, shared, max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
