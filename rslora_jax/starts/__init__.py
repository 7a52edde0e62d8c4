"""How adapters start: from the weights, or from data, with the function as it was at step 0.

Each start gives `(params, adapters)`. Those that change the base give adapters that belong to the changed one;
`for_original_base` makes them adapters of the base as it was.
"""

from rslora_jax.starts.eva import eva
from rslora_jax.starts.loftq import loftq
from rslora_jax.starts.lora_ga import lora_ga
from rslora_jax.starts.named import begin
from rslora_jax.starts.olora import olora
from rslora_jax.starts.original import for_original_base
from rslora_jax.starts.orthogonal import orthogonal
from rslora_jax.starts.pissa import pissa
from rslora_jax.starts.shares import eva_config
from rslora_jax.starts.stream import changed

__all__ = [
    "begin",
    "changed",
    "eva",
    "eva_config",
    "for_original_base",
    "loftq",
    "lora_ga",
    "olora",
    "orthogonal",
    "pissa",
]
