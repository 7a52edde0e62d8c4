"""FLOPs of a training step of adapters by the program itself, and how much of a device's peak a run makes of them.

Counted are products (`dot_general`, convolutions, `ragged_dot`), two FLOPs for a multiply-add, in the gradient to the
adapters. So a frozen weight of i x o costs 4io a token and not the 6io of full training: 2io for its product and 2io
for the gradient of its input, where there is one to hand on. What adapters add is counted in the order of contractions
that `transform/cost.py` chose for each product.

These are the model's FLOPs (PaLM, arXiv 2204.02311, appendix B): what is computed again to save memory counts once,
under `jax.checkpoint` as in the sum W + AB that an adapted product may form twice.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives

from rslora_jax.pytrees import Params, PyTree
from rslora_jax.train.loss import Loss
from rslora_jax.transform import compat
from rslora_jax.transform.programs import Held, fold, held
from rslora_jax.wrap import Adapters, Lora

# Dense bfloat16 TFLOPS of a device by words of its name; the first line that fits counts. From NVIDIA's data sheets of
# each product, most of which give twice as much, with sparsity (V100 and T4 have no bfloat16: theirs is float16), and
# from cloud.google.com/tpu/docs (v2, v3, v4, v5e, v5p, v6e), by chip; on TPU v2 and v3 a device is half a chip.
_PEAK_TFLOPS = (
    ("TPU v2", 22.5),
    ("TPU v3", 61.5),
    ("TPU v4 lite", 138),
    ("TPU v4", 275),
    ("TPU v5 lite", 197),
    ("TPU v5e", 197),
    ("TPU v5", 459),
    ("TPU v5p", 459),
    ("TPU v6 lite", 918),
    ("TPU v6e", 918),
    ("V100 PCIE", 112),
    ("V100S", 130),
    ("V100", 125),
    ("T4", 65),
    ("A10", 125),
    ("A30", 165),
    ("A100", 312),
    ("L4", 121),
    ("L40", 181),
    ("L40S", 362),
    ("H100 PCIe", 756),
    ("H100 NVL", 835),
    ("H100", 989),
    ("H200 NVL", 835),
    ("H200", 989),
    ("GH200", 989),
    ("B200", 2250),
    ("GB200", 2500),
)


def peak_flops(device: jax.Device) -> float | None:
    """Return the most dense bfloat16 FLOPs a second of a device, by its `device_kind`; None where it is not known.

    >>> peak_flops(jax.devices("cpu")[0]) is None
    True
    """
    words = set(re.split(r"[\s-]+", device.device_kind))
    if "MIG" in words:  # a part of a GPU
        return None
    return next((1e12 * tflops for name, tflops in _PEAK_TFLOPS if words.issuperset(name.split())), None)


def step_flops(lora: Lora, loss: Loss, params: Params, adapters: Adapters, batch: PyTree) -> int:
    """Count the model's FLOPs of one training step: the loss and its gradient to the adapters.

    Only shapes matter: all arguments may be `jax.ShapeDtypeStruct`s. It takes as long as tracing the gradient does. The
    optimiser, and all that is no product, is not counted, nor what a Pallas kernel or a foreign call does inside. A
    `cond` counts as its dearest branch, a `while` as one turn. Attention in chunks (`models.chunked`) counts the scores
    that its backward pass forms again, and those that no token sees. The work of all devices counts; in a `shard_map`
    also what `jax.checkpoint` repeats there. So the utilisation is
    step_flops / (seconds a step * number of devices * `peak_flops` of one).

    Args:
      lora: from `wrap`.
      loss: as `fit` takes it.
      params, adapters, batch: of a step.

    >>> import rslora_jax as rslora
    >>> params, x = {"w": jnp.ones((8, 16))}, jnp.ones((4, 8))
    >>> lora = rslora.wrap(lambda p, x: x @ p["w"], params, x, config=rslora.LoraConfig(rank=2, alpha=3))
    >>> loss = lambda run, x: (jnp.sum(run(x) ** 2), jnp.float32(4))
    >>> base, met, left = 2 * 4 * 8 * 16, 2 * 4 * 8 * 2, 2 * 4 * 2 * 16
    >>> step_flops(lora, loss, params, lora.init(jax.random.key(0)), x) == base + (met + left) + (met + 2 * left)
    True
    """

    def total(adapters: Adapters, params: Params, batch: PyTree) -> Any:
        return loss(functools.partial(lora.apply, params, adapters), batch)[0]

    program = jax.make_jaxpr(total)(adapters, params, batch)
    evaluate = _without_remat()

    def plain(*arguments: Any) -> Any:
        return evaluate(program, *jax.tree.leaves(arguments))[0]

    return count(jax.make_jaxpr(jax.value_and_grad(plain))(adapters, params, batch))


def _without_remat() -> Any:
    """Return an evaluator of programs for counting, without `jax.checkpoint`: `evaluate(jaxpr, *values) -> outputs`.

    It takes the first turn of a scan out of it: often it is the only one whose carried values do not depend on
    the adapters, such as tokens just looked up, and then needs no gradient of them.
    """

    @functools.cache
    def called(jaxpr: compat.Jaxpr) -> Any:  # the same program is traced once, however often it is called
        return jax.jit(functools.partial(evaluate, jaxpr))

    def evaluate(jaxpr: compat.Jaxpr, *values: Any) -> list[Any]:
        return fold(jaxpr, values, one)

    def one(eqn: compat.Eqn, values: list[Any]) -> Sequence[Any]:
        programs = held(eqn)
        if programs and programs.call and not programs.own_derivative:
            return called(programs.inner[0].jaxpr)(*values)
        if programs and programs.one_of:
            return lax.switch(values[0], [functools.partial(evaluate, i.jaxpr) for i in programs.inner], *values[1:])
        if eqn.primitive is primitives.scan_p and eqn.params["length"]:
            return _scan_from_the_second(eqn, values, called(eqn.params["jaxpr"]))
        return compat.bind(eqn, *values)

    return evaluate


def _scan_from_the_second(eqn: compat.Eqn, values: list[Any], turn: Callable[..., list[Any]]) -> list[Any]:
    """Evaluate a scan with one turn before it; which goes first, in a reversed one, makes no difference to a count."""
    num_consts, num_carry = compat.scan_counts(eqn)
    consts, carry, xs = values[:num_consts], values[num_consts:][:num_carry], values[num_consts + num_carry :]

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        outs = turn(*consts, *carry, *xs)
        return outs[:num_carry], outs[num_carry:]

    carry, y = body(carry, [x[0] for x in xs])
    carry, ys = lax.scan(body, carry, [x[1:] for x in xs], eqn.params["length"] - 1)
    return [*carry, *(jnp.concatenate([y[None], ys]) for y, ys in zip(y, ys, strict=True))]


def count(jaxpr: compat.Jaxpr) -> int:
    """Return the FLOPs of the products that a program's outputs depend on, those of equal products once.

    >>> count(jax.make_jaxpr(lambda x, w: (x @ w) + jax.jit(jnp.matmul)(x, w))(jnp.ones((4, 8)), jnp.ones((8, 8))))
    512
    """
    numbers: dict[Any, int] = {}
    nodes: list[tuple[int, set[Any]]] = []  # FLOPs of an equation, and the equations that it takes its values from

    def walk(jaxpr: compat.Jaxpr, inputs: Sequence[Any]) -> list[Any]:
        """Return the outputs as (source, n): what is computed the same way from the same has the same name."""
        return fold(jaxpr, inputs, equation, constant=_constant, literal=_literal)

    def equation(eqn: compat.Eqn, values: list[Any]) -> list[Any]:
        programs = held(eqn)
        if programs and programs.call:
            return walk(programs.inner[0].jaxpr, values)
        key = (eqn.primitive, tuple(values), id(eqn) if programs else repr(eqn.params))
        if key not in numbers:
            numbers[key] = len(nodes)
            nodes.append((_held_flops(programs) if programs else _own_flops(eqn), {source for source, _ in values}))
        return [(numbers[key], n) for n in range(len(eqn.outvars))]

    inputs = [("input", n) for n in range(len(compat.opened(jaxpr)[0].invars))]
    live, total = {source for source, _ in walk(jaxpr, inputs)}, 0
    for number, (flops, sources) in reversed([*enumerate(nodes)]):
        if number in live:
            total += flops
            live |= sources
    return total


def _constant(value: Any) -> tuple[str, int]:
    return "constant", id(value)


def _literal(atom: Any) -> tuple[str, str]:
    return "literal", repr(atom)


def _held_flops(programs: Held) -> int:
    """Count what an equation runs of the programs that it holds: each as often as it does, or the dearest."""
    each = [inner.times * count(inner.jaxpr) for inner in programs.inner]
    return max(each) if programs.one_of else sum(each)


def _own_flops(eqn: compat.Eqn) -> int:
    """Count a product; all else is free."""
    of = _PRODUCTS.get(eqn.primitive)
    return of(*(v.aval.shape for v in (*eqn.invars[:2], *eqn.outvars)), eqn.params) if of else 0


_Shape = tuple[int, ...]


def _dot_flops(lhs: _Shape, rhs: _Shape, out: _Shape, params: dict[str, Any]) -> int:
    (contracted, _), _ = params["dimension_numbers"]
    return 2 * math.prod(out) * math.prod(lhs[n] for n in contracted)


def _ragged_dot_flops(lhs: _Shape, rhs: _Shape, out: _Shape, params: dict[str, Any]) -> int:
    numbers = params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    # Where the groups are cut out of what is summed over, each has a result of its own from its part.
    groups = out[0] if set(numbers.lhs_ragged_dimensions) <= set(contracted) else 1
    return 2 * math.prod(out) // groups * math.prod(lhs[n] for n in contracted)


def _convolution_flops(lhs: _Shape, rhs: _Shape, out: _Shape, params: dict[str, Any]) -> int:
    """Count a convolution without what meets padding or a dilation's holes: so its gradients count the same."""
    numbers = params["dimension_numbers"]
    batch, features, *places = (out[n] for n in numbers.out_spec)
    total = 2 * batch * features * rhs[numbers.rhs_spec[1]]
    for n, size in enumerate(places):
        low, _ = params["padding"][n]
        dilation = params["lhs_dilation"][n]
        starts, taps = np.arange(size) * params["window_strides"][n], np.arange(rhs[numbers.rhs_spec[2 + n]])
        at = starts[:, None] + taps * params["rhs_dilation"][n] - low
        inside = (at >= 0) & (at <= (lhs[numbers.lhs_spec[2 + n]] - 1) * dilation) & (at % dilation == 0)
        total *= int(inside.sum())
    return total


_PRODUCTS: Mapping[compat.Primitive, Callable[..., int]] = {
    primitives.dot_general_p: _dot_flops,
    primitives.conv_general_dilated_p: _convolution_flops,
    compat.ragged_dot_general_p: _ragged_dot_flops,
}
