"""The primitives that work entry by entry, and what becomes of a weight that meets data in each."""

from jax import lax
from jax.extend.core import primitives

# What works entry by entry, or puts arrays beside each other: a weight that meets data there is a table of numbers.
# fmt: off
ENTRYWISE = frozenset(
    (
        primitives.add_p, primitives.add_jaxvals_p, primitives.sub_p, primitives.mul_p, primitives.div_p,
        primitives.rem_p, primitives.max_p, primitives.min_p, primitives.pow_p, primitives.atan2_p,
        primitives.nextafter_p, primitives.and_p, primitives.or_p, primitives.xor_p, primitives.shift_left_p,
        primitives.eq_p, primitives.ne_p, primitives.lt_p, primitives.le_p, primitives.gt_p, primitives.ge_p,
        primitives.clamp_p, primitives.complex_p, primitives.select_n_p, primitives.concatenate_p,
        primitives.pad_p, primitives.gather_p, primitives.scatter_p, primitives.scatter_add_p, primitives.scatter_mul_p,
        primitives.scatter_max_p, primitives.scatter_min_p, primitives.dynamic_slice_p,
        primitives.dynamic_update_slice_p, primitives.sort_p, primitives.reduce_p, lax.stack_p,
        lax.optimization_barrier_p,
    )
)
# Among them, those in which a weight that meets data of its own shape keeps its axes.
KEEPING = frozenset(
    (
        primitives.mul_p, primitives.div_p, primitives.select_n_p, primitives.scatter_p, primitives.scatter_add_p,
        primitives.scatter_mul_p, primitives.dynamic_update_slice_p,
    )
)
# fmt: on
# And those in which data of its own shape change it: whether it is a weight shows where data meet the result.
MOVING = (primitives.add_p, primitives.sub_p, primitives.max_p, primitives.min_p, primitives.clamp_p)
SCALING = (primitives.mul_p, primitives.div_p)
JOINING = (*SCALING, primitives.concatenate_p, lax.stack_p)
