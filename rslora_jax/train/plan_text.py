"""A plan as text: what a terminal of 80 columns can show, and a file can keep."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Callable, Iterator, Sequence

from rslora_jax.terminal import one_line, printable
from rslora_jax.train.footprint import fits
from rslora_jax.train.glance import Bin, Data, Piece, Sample
from rslora_jax.train.planning import Plan, Taken
from rslora_jax.train.room import MOST_ROWS

Mark = Callable[[str], str]

_NAMED = 5  # examples that were cut
_LONGEST = 320  # characters of a piece
_WIDEST = 120


def brackets(text: str) -> str:
    """Mark a text where there are no colours."""
    return f"⟦{text}⟧"


def plan_text(plan: Plan, *, mark: Mark = brackets, width: int | None = None) -> str:
    """Write a plan.

    Args:
      plan: the plan.
      mark: marks a line of what is learnt.
      width: of a line; by default the terminal's, of 120 at most.
    """
    width = min(width or shutil.get_terminal_size((100, 24)).columns, _WIDEST)
    parts = [_data(plan.data, mark, width)] if plan.data else []
    parts += [_run(plan), _parameters(plan, width), _memory(plan), _time(plan)]
    return "\n\n".join(parts)


def size(count: float) -> str:
    """Write a number of bytes.

    >>> size(12_300), size(4_560_000), size(7.89e11)
    ('12.3 kB', '4.56 MB', '789 GB')
    """
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        number = count / 10**power
        if number >= 0.9995 or unit == "kB":
            break
    return f"{number:.0f} {unit}" if number >= 99.95 else f"{number:.{1 if number >= 9.995 else 2}f} {unit}"


def rate(count: float, unit: str) -> str:
    """Write a large number by its prefix.

    >>> rate(1.234e12, "FLOP"), rate(56_000_000, "FLOP/s")
    ('1.23 TFLOP', '56 MFLOP/s')
    """
    for prefix, power in (("P", 15), ("T", 12), ("G", 9), ("M", 6), ("k", 3)):
        if count >= 10**power:
            return f"{count / 10**power:.3g} {prefix}{unit}"
    return f"{count:.3g} {unit}"


def duration(seconds: float) -> str:
    """Write about how long something takes.

    >>> [duration(x) for x in (0.00123, 0.456, 4.56, 75, 800, 8000, 3e5)]
    ['1.2 ms', '456 ms', '4.6 s', '75 s', '13 min', '2 h 13 min', '3 d 11 h']
    """
    if seconds < 1:
        return f"{1000 * seconds:.{1 if seconds < 0.01 else 0}f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def counted(number: int, noun: str) -> str:
    """Write how many there are of something.

    >>> counted(1, "row"), counted(2000, "row")
    ('1 row', '2,000 rows')
    """
    return f"{number:,} {noun}" + "s" * (number != 1)


def _data(data: Data, mark: Mark, width: int) -> str:
    """Write what the data look like."""
    s = data.statistics
    lines = [
        "data",
        f"  {counted(s.examples, 'example')}, {s.tokens:,} tokens ({s.loss_tokens:,} with loss)",
        f"  {counted(s.rows, 'row')} of {s.row_length:,} places, {1 - s.padding:.1%} filled, "
        f"{data.together:.3g} {'sequences' if data.together > 1 else 'sequence'} in each",
    ]
    if s.sequences > s.examples:
        lines.append(f"  {counted(s.sequences, 'sequence')}: long texts are split, and some chats are taken apart")
    lines += ["", f"the first of them as the model meets them, {mark('with loss')}"]
    lines += [line for sample in data.samples for line in _sample(sample, mark, width)]
    lines += ["", f"tokens of a sequence: {data.middle:,} in the middle, {data.longest:,} at most"]
    lines += _histogram(data.lengths, s.row_length, width)
    if data.cut:
        lines += ["", f"cut to fit a row: {len(data.cut):,} of {counted(s.sequences, 'sequence')}"]
        for one in data.cut[:_NAMED]:
            parts = [(one.prompt, "of its prompt"), (one.completion, "of its completion")]
            lost = " and ".join(f"{n:,} {what}" for n, what in parts if n)
            lines.append(f"  {one_line(one.origin, max(width - len(lost) - 9, 16))} loses {lost}")
        if len(data.cut) > _NAMED:
            lines.append(f"  and {len(data.cut) - _NAMED:,} that lose less")
    else:
        lines.append("  nothing is cut")
    return "\n".join(lines)


def _sample(sample: Sample, mark: Mark, width: int) -> Iterator[str]:
    """Write a sequence, with what of it is learnt marked."""
    yield f"  {one_line(sample.origin, width - 40)}: {sample.tokens:,} tokens, {sample.learnt:,} with loss"
    line, room = "", width - 6
    for piece in map(_shortened, sample.pieces):
        for n, text in enumerate(piece.text.split("\n")):
            if n:
                yield f"    {line}".rstrip()
                line, room = "", width - 6
            while text:
                taken = _fitting(text, room)
                if not taken and room < width - 6:
                    yield f"    {line}".rstrip()
                    line, room = "", width - 6
                    continue
                taken = taken or text[:1]
                line += mark(taken) if piece.is_learnt else taken
                room -= _cells(taken) + 2 * piece.is_learnt
                text = text[len(taken) :]
    if line:
        yield f"    {line}".rstrip()


def _shortened(piece: Piece) -> Piece:
    """Take the middle out of a piece that is long, and write out what would steer a terminal."""
    text, half = printable(piece.text), _LONGEST // 2
    if len(text) > _LONGEST + 60:
        text = f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
    return Piece(text, piece.is_learnt)


def _fitting(text: str, room: int) -> str:
    """Return as much of a text as fits so many columns."""
    taken = 0
    for n, character in enumerate(text):
        taken += _cells(character)
        if taken > room:
            return text[:n]
    return text


def _cells(text: str) -> int:
    """Count the columns that a text takes."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def _histogram(bins: Sequence[Bin], row_length: int, width: int) -> Iterator[str]:
    """Draw a histogram of lengths."""
    most = max(one.sequences for one in bins)
    numbers = [f"{one.first:,} to {one.last:,}" if one.last > one.first else f"{one.first:,}" for one in bins]
    left, right = max(map(len, numbers)), max(len(f"{one.sequences:,}") for one in bins)
    room = min(width - left - right - 25, 50)  # 20 of which are for what may stand behind
    for one, number in zip(bins, numbers, strict=True):
        bar = "#" * -(-room * one.sequences // most)
        beyond = "  too long for a row" if one.first > row_length else ""
        yield f"  {number:>{left}}  {one.sequences:>{right},} {bar}{beyond}".rstrip()


def _run(plan: Plan) -> str:
    """Write how long a run is."""
    left = plan.steps - plan.done
    in_parts = f" in {plan.parts} parts" if plan.parts > 1 else ""
    after = f", after {plan.done:,} done before" if plan.done else ""
    lines = ["run", f"  {counted(left, 'step')} of {counted(plan.rows, 'row')}{in_parts}{after}"]
    if plan.epochs is not None:
        lines.append(f"  {plan.epochs:.3g} epochs of {left / plan.epochs:,.4g} steps")
    if plan.tokens:
        about = "" if plan.tokens.counted else "about "
        lines.append(f"  {about}{plan.tokens.read:,} tokens ({plan.tokens.learnt:,} with loss)")
    return "\n".join(lines)


def _parameters(plan: Plan, width: int) -> str:
    """Write how many numbers there are, and how many are trained of each kind of weight."""
    total = sum(plan.trained.values())
    rows = [("base", f"{plan.base:,}", ""), ("trained", f"{total:,}", f"{total / max(plan.base, 1):.2%} of the base")]
    rows += [(f"  {path}", f"{n:,}", f"{n / max(total, 1):.1%} of these") for path, n in plan.trained.items()]
    return "\n".join(["parameters", *_aligned(rows, width)])


def _aligned(rows: Sequence[tuple[str, str, str]], width: int) -> Iterator[str]:
    """Lay out names, numbers and remarks; of a name that is too long, the end stays."""
    right = max(len(number) for _, number, _ in rows)
    most = width - right - 2 - 2 - 2 - max(len(remark) for *_, remark in rows)
    names = [name if len(name) <= most else f"  ...{name[5 - most :]}" for name, *_ in rows]
    left = max(map(len, names))
    for name, (_, number, remark) in zip(names, rows, strict=True):
        yield f"  {name:<{left}}  {number:>{right}}  {remark}".rstrip()


def _memory(plan: Plan) -> str:
    """Write what a step takes of a device, and would take in other parts."""
    each = f", of each of {plan.devices} devices" if plan.devices > 1 else ""
    lines = [f"memory{each} ({plan.device})"]
    if m := plan.memory:
        scoring = [("scoring, in place of a step", m.evaluation)] if m.evaluation else []
        kinds = [
            ("base", m.base),
            ("adapters", m.adapters),
            ("adapters as they began", m.start),
            ("the optimiser's state", m.optimizer),
            ("a batch, counters, keys", m.rest),
            ("gradients, in a step", m.gradients),
            ("activations and the like, in a step", m.activations),
            *scoring,
        ]
        lines += [f"  {name:<35}  {size(count):>9}" for name, count in [*kinds, ("at most", m.total)]]
    if plan.limit:
        lines[-1] += f"  of {size(plan.limit)}{_whether(plan.fits)}"
    lines += ["", "with --accumulate, parts that a batch is taken in"]
    lines += [_line(one, plan) for one in plan.taken]
    if plan.largest:
        about = "" if plan.largest.compiled else "about "
        more = " or more" if plan.largest.rows == MOST_ROWS else ""
        lines.append(f"  the largest batch that fits in one: {about}{counted(plan.largest.rows, 'row')}{more}")
    return "\n".join(lines)


def _line(one: Taken, plan: Plan) -> str:
    """Write what a step takes in so many parts."""
    takes = f"{size(one.memory.temporary):>9} a step, {size(one.memory.total):>9} in all" if one.memory else "too much"
    does = False if one.memory is None else fits(one.memory.total, plan.limit)
    own = "  (this run)" if one.parts == plan.parts else ""
    parts = f"{one.parts:>4} of {counted(one.rows, 'row')}"
    return f"  {parts:<16} {takes}{_whether(does)}{own}"


def _whether(does: bool | None) -> str:
    """Say whether something fits, where the device tells."""
    return {None: "", True: ": fits", False: ": does not fit"}[does]


def _time(plan: Plan) -> str:
    """Write how long a step and a run take."""
    flops = f" of {rate(plan.flops, 'FLOP')}" if plan.flops else ""
    if plan.step is None or plan.seconds is None:
        return f"time\n  no step{flops} was timed, as it does not fit"
    lines = ["time", f"  {duration(plan.step.seconds)} for a step{flops}"]
    if plan.flops:
        lines[-1] += f": {rate(plan.flops / plan.step.seconds, 'FLOP/s')}"
    lines[-1] += f"; compiled in {duration(plan.step.compiling)}"
    scoring = ""
    if s := plan.scored:
        each = f"{counted(s.batches, 'batch').replace('batchs', 'batches')} of held-out data"
        lines.append(f"  {duration(s.took.seconds * s.batches)} for {each}, {counted(plan.evaluations, 'time')}")
        scoring = " and scoring"
    lines.append(f"  about {duration(plan.seconds)} for {counted(plan.steps - plan.done, 'step')}{scoring}")
    return "\n".join(lines)
