"""Compile the methods of one problem, see that they agree, and time them in turn."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import methods
from benchmarks.problem import Data, Problem

# Largest norm of a gradient's difference, relative to the gradient's norm. In bfloat16, torch's rotary embedding and
# attention round otherwise than JAX's: at width 512 its gradients are 0.043 from those in float32, JAX's 0.013.
TOLERANCE = {"float32": 2e-4, "bfloat16": 0.1}


@dataclasses.dataclass(frozen=True)
class Ready:
    """A step that can be called, and what its making has shown.

    Attributes:
      step: takes one step, perhaps before its result is there.
      wait: waits for a step's result.
      outputs: what a step returned, as (loss, gradients of the adapters or None).
      flops: of the compiled step on a CPU and a TPU, of the traced step's products on a GPU.
      temp_bytes: what it needs beside its arguments and results.
      trace_s: from the model to the lowered program, adapters put in; the median of three.
      compile_s: XLA's time.
    """

    step: Callable[[], Any]
    wait: Callable[[Any], Any]
    outputs: Callable[[Any], tuple[Any, Any]]
    flops: float | None = None
    temp_bytes: int | None = None
    trace_s: float | None = None
    compile_s: float | None = None


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of a step in each repeat of a method."""

    wall: tuple[float, ...]
    cpu: tuple[float, ...]


def lower(method: str, problem: Problem, arguments: Any) -> Any:
    """Return a method's lowered step."""
    with methods.precision(problem):
        return methods.jitted(method, problem).lower(*arguments)


def prepare(method: str, problem: Problem, data: Data) -> Ready:
    """Compile a method's step for a problem."""
    traces = []
    for _ in range(3):
        jax.clear_caches()  # each starts from nothing, as in a new process
        begun = time.perf_counter()
        lowered = lower(method, problem, data.arguments)
        traces.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    compiled = lowered.compile()
    compile_s = time.perf_counter() - begun
    flops, temp_bytes = counted(compiled)
    if jax.default_backend() == "gpu":
        # There XLA's count leaves out the products that it hands to a library.
        from rslora_jax.train.flops import count

        function = methods.jitted(method, problem)
        flops = count(jax.make_jaxpr(function)(*data.arguments))

    def step() -> Any:
        return compiled(*data.arguments)

    def outputs(result: Any) -> tuple[Any, Any]:
        value, gradients = result
        return value, gradients[0] if method in methods.ADAPTED else None

    return Ready(step, jax.block_until_ready, outputs, flops, temp_bytes, statistics.median(traces), compile_s)


def counted(compiled: Any) -> tuple[float | None, int | None]:
    """Return the FLOPs and the temporary bytes of a compiled program, None where the backend does not say."""
    costs, memory = compiled.cost_analysis(), compiled.memory_analysis()
    flops = (costs or {}).get("flops")
    return flops, None if memory is None else memory.temp_size_in_bytes


def disagreement(got: tuple[Any, Any], want: tuple[Any, Any]) -> float:
    """Return the largest difference in loss and adapter gradients, each in norm and relative to its own."""
    if jax.tree.structure(got[1]) != jax.tree.structure(want[1]):
        raise AssertionError("the methods adapt different weights")
    found = [abs(float(got[0]) / float(want[0]) - 1)]
    for g, w in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        g, w = (jnp.asarray(leaf, jnp.float32) for leaf in (g, w))
        found.append(float(jnp.linalg.norm(g - w) / jnp.linalg.norm(w)))
    return float(np.max(found))  # NaN if any is: Python's max would pass over it


def check(ready: Mapping[str, Ready], dtype: Any) -> tuple[dict[str, float], dict[str, str]]:
    """Run every method once and see that all give the same loss and adapter gradients.

    Returns:
      The disagreement of each adapted method with the first of those alike; and, of those that differ too much for
      their time to mean anything, what is wrong.
    """
    found: dict[str, float] = {}
    wrong: dict[str, str] = {}
    values: dict[str, float] = {}
    wanted: dict[tuple[str, ...], tuple[str, Any]] = {}
    for method in sorted(ready, key=lambda m: methods.ADAPTED.index(m) if m in methods.ADAPTED else -1):
        got = ready[method].outputs(ready[method].step())
        values[method] = float(got[0])
        if method not in methods.ADAPTED:
            continue
        other, want = wanted.setdefault(next(of for of in methods.ALIKE if method in of), (method, got))
        found[method] = disagreement(got, want)
        if not found[method] <= TOLERANCE[str(dtype)]:
            wrong[method] = (
                f"{method} and {other} were given the same adapters and differ by {found[method]:.1e} of a gradient's "
                f"norm (losses {values[method]:.6g} and {values[other]:.6g}): their times cannot be compared"
            )
    return found, wrong


def in_turn(ready: Mapping[str, Ready], repeats: int, steps: int, advance: Callable[[str], None]) -> dict[str, Timing]:
    """Time the methods one after the other, over and over, so that a slow minute of the machine meets all.

    A repeat is some steps, asked for at once as in training, so that a device need not wait for its host. Every other
    repeat goes backwards: what ran before leaves a GPU warmer or cooler, and so its clock lower or higher.
    """
    wall: dict[str, list[float]] = {name: [] for name in ready}
    cpu: dict[str, list[float]] = {name: [] for name in ready}
    for repeat in range(repeats):
        for name, method in reversed(ready.items()) if repeat % 2 else ready.items():
            cpu_begun, begun = time.process_time(), time.perf_counter()
            for _ in range(steps):
                result = method.step()
            method.wait(result)
            wall[name].append((time.perf_counter() - begun) / steps)
            cpu[name].append((time.process_time() - cpu_begun) / steps)
            del result
            advance(name)
    return {name: Timing(tuple(wall[name]), tuple(cpu[name])) for name in ready}
