"""How adapters start: from the weights, or from data, with the function as it was at step 0.

Each start gives `(params, adapters)`. Those that change the base give adapters that belong to the changed one;
`for_original_base` makes them adapters of the base as it was.
"""

from rslora_jax.starts.olora import olora
from rslora_jax.starts.original import for_original_base
from rslora_jax.starts.orthogonal import orthogonal
from rslora_jax.starts.pissa import pissa
from rslora_jax.starts.stream import changed

__all__ = ["changed", "for_original_base", "olora", "orthogonal", "pissa"]
