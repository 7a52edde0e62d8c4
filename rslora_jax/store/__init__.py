"""Adapters on disk: checkpoints with orbax, and checksums that tell bases apart."""

from rslora_jax.store import checkpoint
from rslora_jax.store.checkpoint import Damaged, load_about, load_adapters, load_model_state
from rslora_jax.store.checksum import checksums
from rslora_jax.store.one_call import load, save
from rslora_jax.store.start import Start, load_start

__all__ = [
    "Damaged",
    "Start",
    "checkpoint",
    "checksums",
    "load",
    "load_about",
    "load_adapters",
    "load_model_state",
    "load_start",
    "save",
]
