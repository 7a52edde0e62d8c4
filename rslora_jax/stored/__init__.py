"""What a base weight is, where it is not an array: `Stored`, and one file for each format."""

from rslora_jax.stored.float8 import Float8, float8
from rslora_jax.stored.form import Stored, dense, is_stored
from rslora_jax.stored.gguf import Gguf, gguf
from rslora_jax.stored.int8 import Int8, int8
from rslora_jax.stored.nf4 import NF4, nf4

__all__ = ["NF4", "Float8", "Gguf", "Int8", "Stored", "dense", "float8", "gguf", "int8", "is_stored", "nf4"]
