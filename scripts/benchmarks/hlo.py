"""Count what a compiled program does: its matrix products and its collectives, loops as often as they turn.

XLA's own `cost_analysis` counts the body of a loop once. A model whose layers are scanned is one loop, so here the
program's text is read: every computation with how often it runs, from the trip counts of the loops around it.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "f4": 0.5} | {
    f"{kind}{bits}": bits // 8 for kind in "suf" for bits in (8, 16, 32, 64)
}
BYTES |= {"bf16": 2, "c64": 8, "c128": 16}
TUPLE_PART = "get-tuple-element"
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*)(?:e\dm\d\w*)?\[([\d,]*)\]")
_CALLED = re.compile(r"\b(body|condition|calls|to_apply|branch_computations|called_computations)=(\{[^}]*\}|%[\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of `KINDS`.
      shapes: the shapes of what it makes on each device, as (dtype, sizes).
      times: how often a run of the program does it.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    times: int

    @property
    def bytes(self) -> int:
        """Bytes it makes on each device, all times together."""
        return self.times * int(sum(BYTES.get(dtype, 1) * math.prod(sizes) for dtype, sizes in self.shapes))


@dataclasses.dataclass(frozen=True)
class Counts:
    """What one device does in a run of a program.

    Attributes:
      flops: of all matrix products and convolutions, two for a multiply-add.
      flops_once: the same with every loop's body counted once, as XLA's `cost_analysis` does.
      collectives: what moves between devices.
    """

    flops: int
    flops_once: int
    collectives: tuple[Collective, ...]


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    result: str
    opcode: str
    rest: str

    @property
    def shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        return tuple((d, tuple(int(n) for n in sizes.split(",") if n)) for d, sizes in _SHAPE.findall(self.result))


def count(text: str) -> Counts:
    """Count the text of a compiled program (`compiled.as_text()`).

    Raises:
      ValueError: a loop does not say how often it turns.

    >>> import jax, jax.numpy as jnp
    >>> layers = lambda x, ws: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]
    >>> counts = count(jax.jit(layers).lower(jnp.ones((4, 8)), jnp.ones((5, 8, 8))).compile().as_text())
    >>> counts.flops, counts.flops_once
    (2560, 512)
    """
    computations, entry = _parse(text)
    times, once = collections.Counter({entry: 1}), collections.Counter({entry: 1})
    for name in reversed(computations):  # a computation stands before those that call it
        for callee, turns in _calls(computations[name], computations):
            times[callee] += times[name] * turns
            once[callee] += once[name]
    products = {name: sum(_product(body)) for name, body in computations.items()}
    moves = {}
    for name, body in computations.items():
        for one in body.values():
            kind = one.opcode.removesuffix("-start")
            if kind in KINDS and times[name]:
                # The parts of one asynchronous collective stand in several fusions, on one channel.
                channel = re.search(r"channel_id=(\d+)", one.rest)
                key = (kind, channel[1]) if channel else (name, one.name)
                moves.setdefault(key, Collective(kind, _made(one), times[name]))

    def total(by):
        return sum(by[name] * flops for name, flops in products.items())

    return Counts(total(times), total(once), tuple(moves.values()))


def _parse(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    computations: dict[str, dict[str, _Instruction]] = {}
    entry, body = "", {}
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            body = computations[found[2]] = {}
            entry = found[2] if found[1] else entry
        elif found := _INSTRUCTION.match(line):
            body[found[1]] = _Instruction(*found.groups())
    return computations, entry


def _calls(body: dict[str, _Instruction], computations: dict) -> Iterator[tuple[str, int]]:
    for one in body.values():
        turns = _turns(one, body, computations) if one.opcode == "while" else 1
        for _, names in _CALLED.findall(one.rest):
            for name in re.findall(r"%([\w.-]+)", names):
                yield name, turns


def _turns(loop: _Instruction, around: dict[str, _Instruction], computations: dict) -> int:
    """Return how often a loop turns: what XLA noted, or what its counter's start, bound and step say.

    One that goes on while a bool is true, which its first turn makes false, turns once at most, and counts as one turn.
    """
    if known := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.rest):
        return int(known[1])
    condition, body = (computations[re.search(rf"{n}=%([\w.-]+)", loop.rest)[1]] for n in ("condition", "body"))
    flag = re.search(r"index=(\d+)", last.rest) if (last := list(condition.values())[-1]).opcode == TUPLE_PART else None
    if flag and _is_false(_element(list(body.values())[-1], int(flag[1]), body)):
        return 1
    compare = next((one for one in condition.values() if one.opcode == "compare"), None)
    if compare and "direction=LT" in compare.rest:
        counter, bound = (condition[name] for name in _operands(compare))
        place = re.search(r"index=(\d+)", counter.rest)
        if place and counter.opcode == TUPLE_PART:
            start = _constant(_element(around[_operands(loop)[0]], int(place[1]), around), around)
            step = _element(list(body.values())[-1], int(place[1]), body)
            steps = [_constant(body[name], body) for name in _operands(step)] if step.opcode == "add" else []
            by = next((n for n in steps if n is not None), None)
            if start is not None and by and (end := _constant(bound, condition)) is not None:
                return max(0, -(-(end - start) // by))
    raise ValueError(f"the loop {loop.name} does not say how often it turns: it cannot be counted")


def _operands(one: _Instruction) -> list[str]:
    return re.findall(r"%([\w.-]+)", one.rest.split(")")[0])


def _element(one: _Instruction, place: int, body: dict[str, _Instruction]) -> _Instruction:
    """Return what makes an element of a tuple, past copies."""
    one = body[_operands(one)[place]]
    while one.opcode == "copy":
        one = body[_operands(one)[0]]
    return one


def _constant(one: _Instruction, body: dict[str, _Instruction]) -> int | None:
    while one.opcode == "copy":
        one = body[_operands(one)[0]]
    return int(one.rest.split(")")[0]) if one.opcode == "constant" else None


def _is_false(one: _Instruction) -> bool:
    return one.opcode == "constant" and one.rest.startswith(("false", "0)"))


def _made(one: _Instruction) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return what a collective makes; the start of an asynchronous one but an all-reduce lists its operand first."""
    paired = one.opcode.endswith("-start") and one.opcode != "all-reduce-start"
    if not paired:
        return one.shapes
    wide = [s for s in one.shapes if s[1]]  # the scalars are its handles
    return tuple(wide[len(wide) // 2 :])


def _product(body: dict[str, _Instruction]) -> Iterator[int]:
    """Give the FLOPs of every product of a computation."""
    for one in body.values():
        if one.opcode in ("dot", "convolution"):
            left, right = (body[name].shapes[0][1] for name in _operands(one)[:2])
            out = one.shapes[0][1]
            if one.opcode == "dot":
                summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)[1]
                yield 2 * math.prod(out) * math.prod(left[int(n)] for n in summed.split(",") if n)
            else:
                yield convolution_flops(one.rest, left, right, out)


def convolution_flops(rest: str, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]) -> int:
    """Return the FLOPs of a convolution, which is what a TPU makes of every matrix product.

    Batch axes become spatial axes with padding or dilation, so only the places count at which data meet.
    """
    ins, kernel, outs = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest).groups()
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", (re.search(r"window=\{([^}]*)\}", rest) or [0, ""])[1]))
    met = 1
    for n in range(len(ins) - 2):

        def part(key, default, n=n):
            return window[key].split("x")[n] if key in window else default

        places = np.arange(out[outs.index(str(n))])[:, None] * int(part("stride", "1"))
        places = places + np.arange(right[kernel.index(str(n))]) * int(part("rhs_dilate", "1"))
        places = places - int(part("pad", "0_0").split("_")[0])
        dilate = int(part("lhs_dilate", "1"))
        last = (left[ins.index(str(n))] - 1) * dilate
        met *= int(((places >= 0) & (places <= last) & (places % dilate == 0)).sum())
    return 2 * met * out[outs.index("b")] * out[outs.index("f")] * right[kernel.index("i")]
