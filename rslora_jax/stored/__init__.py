"""What a base weight is, where it is not an array: `Stored`, and one file for each format."""

from rslora_jax.stored.form import Stored, dense, is_stored

__all__ = ["Stored", "dense", "is_stored"]
