"""Where a compiled step's time goes on a GPU: its kernels, by what they are for, from a trace of `jax.profiler`."""

import collections
import dataclasses
import re
import tempfile
from pathlib import Path
from typing import Any

import jax

BASE, ADAPTERS, AROUND = "base's products", "adapters' products", "around the adapters' products"
ATTENTION, REST = "attention", "norms, activations, sums"
KINDS = (BASE, ADAPTERS, AROUND, ATTENTION, REST)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of a step: the instruction of the compiled program it belongs to, where that is from, and its time.

    `name` is the instruction's, `source` JAX's name stack, `seconds` the time of all its calls in a step.
    """

    name: str
    source: str
    seconds: float


def kernels(compiled: Any, arguments: Any, steps: int = 3) -> list[Kernel]:
    """Run a compiled step under the profiler and return its kernels, the dearest first.

    Command buffers must be off (`XLA_FLAGS=--xla_gpu_enable_command_buffer=`): they hide which kernel is whose.
    """
    jax.block_until_ready(compiled(*arguments))
    seconds: dict[str, float] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                out = compiled(*arguments)
            jax.block_until_ready(out)
        for path in Path(folder).rglob("*.xplane.pb"):
            for name, spent in events(jax.profiler.ProfileData.from_file(str(path))):
                seconds[name] += spent / steps
    sources = name_stacks(compiled.as_text())
    found = [Kernel(name, sources.get(name, ""), spent) for name, spent in seconds.items()]
    return sorted(found, key=lambda kernel: -kernel.seconds)


def events(profile: Any) -> list[tuple[str, float]]:
    """Return (instruction, seconds) of every kernel that a GPU ran; without one, of every instruction of a program."""
    planes = list(profile.planes)
    lines = [line for plane in planes if "GPU" in plane.name for line in plane.lines]
    found = [event for line in lines if line.name.startswith("Stream") for event in line.events]
    if not lines:
        every = (event for plane in planes for line in plane.lines for event in line.events)
        found = [event for event in every if "hlo_op" in dict(event.stats)]
    return [(str(dict(event.stats).get("hlo_op", event.name)), event.duration_ns / 1e9) for event in found]


def name_stacks(text: str) -> dict[str, str]:
    """Return where each instruction of a compiled program comes from.

    >>> name_stacks('  %dot.1 = f32[2]{0} dot(%a, %b), metadata={op_name="jit(f)/q_proj/dot_general"}')
    {'dot.1': 'jit(f)/q_proj/dot_general'}
    """
    found = re.finditer(r'^ *(?:ROOT )?%?([\w.-]+) = .*?op_name="([^"]*)"', text, re.MULTILINE)
    return {match[1]: match[2] for match in found}


def kind(kernel: Kernel) -> str:
    """Say what a kernel is for.

    The adapters' products are einsums over the rank's letter; XLA joins some of them, or the base's, and what it does
    then in other kernels (casts, slices, sums of a product split along what it sums) is around them. Where an update
    is added in a kernel with what follows, as in the activation, that kernel is the rest's.

    >>> kind(Kernel("custom-call.3", "layers_0/attn/q_proj/jit(adapted_product)/abc,cZ->abZ/dot_general", 0.0))
    "adapters' products"
    >>> kind(Kernel("loop_add_fusion", "jvp(Stack)/layers_0/mlp_norm/add", 0.0))
    'norms, activations, sums'
    """
    product = kernel.name.startswith(("custom-call", "gemm_fusion", "cublas"))
    if "_proj" in kernel.source:
        if product:
            return ADAPTERS if re.search(r"Z->|,Z\w+->", kernel.source) else BASE
        return AROUND if "adapted_product" in kernel.source or "kernel" in kernel.source else REST
    if "/attn/" in kernel.source:
        return ATTENTION
    return REST


def by_kind(found: list[Kernel]) -> dict[str, float]:
    """Return the seconds of each kind of kernel."""
    seconds = dict.fromkeys(KINDS, 0.0)
    for kernel in found:
        seconds[kind(kernel)] += kernel.seconds
    return seconds
