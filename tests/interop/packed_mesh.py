"""Load a GGUF file onto a mesh of four virtual devices, and compare with one device.

python -m tests.interop.packed_mesh FILE [FORMAT]
"""

import math
import sys

import jax
import numpy as np

from rslora_jax.interop import load_model
from rslora_jax.models.decoder import SHARDING_RULES
from rslora_jax.parallel.sharding import make_mesh, param_shardings
from rslora_jax.sites import named_leaves

if __name__ == "__main__":
    mesh = make_mesh("fsdp=2,tensor=2")
    quantize = sys.argv[2] if len(sys.argv) > 2 else None
    how = {"quantize": quantize, "text": False}
    parted = load_model(sys.argv[1], shardings=lambda shapes: param_shardings(shapes, mesh, SHARDING_RULES), **how)
    whole = named_leaves(load_model(sys.argv[1], **how).variables)
    for path, leaf in named_leaves(parted.variables).items():
        jax.tree.map(np.testing.assert_array_equal, leaf, whole[path])
        arrays = jax.tree.leaves(leaf)
        parts = [math.prod(mesh.shape[n] for n in array.sharding.spec if n) for array in arrays]
        for array, count in zip(arrays, parts, strict=True):
            assert all(part.data.nbytes == array.nbytes // count for part in array.addressable_shards), path
        if path.endswith("kernel"):
            assert max(parts) > 1, path
    print("all as on one device")
