"""Several adapters of one base: side by side (`stack`), one for each example (`per_example`), or as one (`combine`)."""

from rslora_jax.several.combine import combine
from rslora_jax.several.per_example import per_example
from rslora_jax.several.stack import stack

__all__ = ["combine", "per_example", "stack"]
