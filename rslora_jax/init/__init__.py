"""How the factors A and B start."""

from rslora_jax.init.random import gaussian, init_adapters, uniform

__all__ = ["gaussian", "init_adapters", "uniform"]
