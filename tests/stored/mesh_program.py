"""Weights on a mesh of four devices are put into fewer bits where they lie."""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import rslora_jax as rslora
from rslora_jax.stored.rounding import FORMATS
from tests.program_models import normal

PARAMS = {
    "up": normal(0, 3, 128, 256),
    "down": normal(1, 256, 64),
    "odd": normal(2, 66, 10),
    "experts": normal(3, 4, 64, 8),
}
SPECS = {"up": P(None, "fsdp", "tensor"), "down": P("tensor", "fsdp"), "odd": P("fsdp"), "experts": P("fsdp")}


def check() -> None:
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    there = {name: jax.device_put(w, NamedSharding(mesh, SPECS[name])) for name, w in PARAMS.items()}
    for format in FORMATS:
        small, made = rslora.quantize(there, format)
        alone, other = rslora.quantize(PARAMS, format)
        for name, w in small.items():
            for one, same in zip(jax.tree.leaves(w), jax.tree.leaves(alone[name]), strict=True):
                np.testing.assert_array_equal(one, same, err_msg=f"{name} in {format}")
            codes = jax.tree.leaves(w)[0]
            is_cut = not (name == "odd" and format == "nf4")  # whose blocks go through all of it
            assert codes.sharding.is_equivalent_to(there[name].sharding, codes.ndim) == is_cut, (
                name,
                format,
                codes.sharding,
            )
            assert abs(made.weights[name].error - other.weights[name].error) < 1e-6
        shapes = {n: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=w.sharding) for n, w in there.items()}
        for one, same in zip(*map(jax.tree.leaves, (rslora.quantize(shapes, format)[0], small)), strict=True):
            assert one.sharding == same.sharding
    print("all held on", len(jax.devices()), "devices")


if __name__ == "__main__":
    check()
