"""Rows of the benchmark, as a table on the terminal and in Markdown, a CSV file and a picture."""

import csv
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.measure import Ready, Timing
from benchmarks.problem import Problem

# Whose least FLOPs are not known: torch's counter leaves some out, and DoRA has its norms beside the products.
_UNCOUNTED = ("peft", "peft-compiled", "peft-dora", "torch", "dora")


@dataclasses.dataclass(frozen=True)
class Row:
    """The figures of one method at one rank and number of tokens; times are medians, in seconds.

    `why` says what kept a method from being measured; it then has no figures.
    """

    tokens: int
    rank: int
    method: str
    step_s: float | None = None
    step_min_s: float | None = None
    step_max_s: float | None = None
    to_floor: float | None = None
    cpu_s: float | None = None
    flops: float | None = None
    least_flops: float | None = None
    planned_flops: float | None = None
    temp_bytes: int | None = None
    trace_s: float | None = None
    compile_s: float | None = None
    disagreement: float | None = None
    repeats: int = 0
    why: str = ""


def make_row(
    problem: Problem, method: str, ready: Ready, timing: Timing, floor: Timing | None, floor_flops: float | None, **more
) -> Row:
    """Put the figures of one method together.

    The ratio to the floor is the median over the repeats of the ratio within each: both were then run within
    seconds of each other. The least FLOPs are the floor's as compiled, and what the method needs beside on paper.
    """
    pairs = zip(timing.wall, floor.wall, strict=True) if floor else ()
    ratios = [mine / base for mine, base in pairs]
    return Row(
        tokens=problem.tokens,
        rank=problem.rank,
        method=method,
        step_s=statistics.median(timing.wall),
        step_min_s=min(timing.wall),
        step_max_s=max(timing.wall),
        to_floor=statistics.median(ratios) if ratios else None,
        cpu_s=statistics.median(timing.cpu),
        flops=ready.flops,
        least_flops=floor_flops + problem.least(method) if floor_flops and method not in _UNCOUNTED else None,
        planned_flops=floor_flops + problem.planned() if floor_flops and method == "rslora" else None,
        temp_bytes=ready.temp_bytes,
        trace_s=ready.trace_s,
        compile_s=ready.compile_s,
        repeats=len(timing.wall),
        **more,
    )


def busy(rows: Sequence[Row]) -> list[Row]:
    """Return the rows whose repeats differ so much that the machine must have done something else."""
    return [r for r in rows if r.step_max_s and r.step_min_s and r.step_max_s > 1.5 * r.step_min_s]


def table(rows: Sequence[Row], title: str) -> Table:
    """Return the rows as a table, a section for each rank and number of tokens."""
    out = Table(title=title, caption="to floor: median of the ratios within each repeat; from - to: least and most")
    names = "tokens rank method|step s|from - to|to floor|CPU s|GFLOPs|to least|TFLOP/s|temp MB|trace s|compile s"
    for name in names.replace(" rank method", "|rank|method").split("|"):
        out.add_column(name, justify="left" if name == "method" else "right")

    def show(value, form, unit=1):
        return "" if value is None else format(value / unit, form)

    for n, r in enumerate(rows):
        if n and (r.tokens, r.rank) != (rows[n - 1].tokens, rows[n - 1].rank):
            out.add_section()
        out.add_row(
            str(r.tokens),
            str(r.rank),
            r.method,
            show(r.step_s, ".4g"),
            "not measured" if r.why else f"{r.step_min_s:.4g} - {r.step_max_s:.4g}",
            show(r.to_floor, ".3f"),
            show(r.cpu_s, ".4g"),
            show(r.flops, ".4g", 1e9),
            show(r.flops and r.least_flops and r.flops / r.least_flops, ".3f"),
            show(r.flops and r.step_s and r.flops / r.step_s, ".4g", 1e12),
            show(r.temp_bytes, ".1f", 1e6),
            show(r.trace_s, ".2f"),
            show(r.compile_s, ".2f"),
        )
    return out


def markdown(rows: Sequence[Row], title: str, facts: dict[str, Any]) -> str:
    """Return the rows as two tables in Markdown, a line for each rank and a column for each method."""
    names = list(dict.fromkeys(r.method for r in rows))
    cells = {(r.tokens, r.rank, r.method): r for r in rows}
    lines = [f"{title}. {facts['cores']} cores, {facts['date'][:10]}, {max(r.repeats for r in rows)} repeats.", ""]

    def add(heading: str, show: Callable[[Row], str]) -> None:
        lines.extend([heading, "", f"| tokens | rank | {' | '.join(names)} |", "|--:|--:|" + "--:|" * len(names)])
        for tokens, rank in dict.fromkeys((r.tokens, r.rank) for r in rows):
            found = [cells.get((tokens, rank, name)) for name in names]
            lines.append(f"| {tokens} | {rank} | {' | '.join(show(r) if r else '' for r in found)} |")
        lines.append("")

    def time(r: Row) -> str:
        if r.step_s is None:
            return "not measured"
        return f"{r.step_s:.3g} s" + (f", {r.to_floor:.2f}" if r.to_floor and r.method != "floor" else "")

    def space(r: Row) -> str:
        least = f", {r.flops / r.least_flops:.3f}" if r.flops and r.least_flops else ""
        return ("" if r.temp_bytes is None else f"{r.temp_bytes / 1e6:.0f} MB") + least

    add("Step time, and its ratio to the floor (medians):", time)
    # A GPU's compiler does not count the products that it hands to a library.
    kind = "the products' FLOPs as traced" if facts["platform"] == "gpu" else "compiled FLOPs"
    add(f"Temporary memory, and {kind} relative to the least there is:", space)
    lines += [f"- Not measured at {r.tokens} tokens, rank {r.rank}: {r.method}: {r.why}" for r in rows if r.why]
    return "\n".join(lines)


def write_csv(path: Path, rows: Sequence[Row], facts: dict[str, Any]) -> None:
    """Write the rows, each with the facts that hold for all of them, so that files of several runs can be joined."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*(f.name for f in dataclasses.fields(Row)), *facts])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) | facts for row in rows)


def write_png(path: Path, rows: Sequence[Row], title: str) -> None:
    """Draw the step time relative to the floor and the temporary bytes over the rank, a line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    counts = sorted({r.tokens for r in rows})
    figure, axes = plt.subplots(len(counts), 2, figsize=(11, 3.6 * len(counts)), squeeze=False, layout="constrained")
    for tokens, (left, right) in zip(counts, axes, strict=True):
        for n, method in enumerate(dict.fromkeys(r.method for r in rows)):
            mine = sorted((r for r in rows if r.tokens == tokens and r.method == method), key=lambda r: r.rank)
            style = {"color": f"C{n}", "marker": "o", "markersize": 4, "label": method}
            times = [(r.rank, r.to_floor) for r in mine if r.to_floor is not None]
            bytes_ = [(r.rank, r.temp_bytes / 1e6) for r in mine if r.temp_bytes is not None]
            for axis, points in ((left, times), (right, bytes_)):
                if points:
                    axis.plot(*zip(*points, strict=True), **style)
        left.set_ylabel("step time / floor")
        right.set_ylabel("temporary memory, MB")
        for axis in (left, right):
            axis.set_title(f"{tokens} tokens a step", fontsize=10)
            axis.set_xscale("log", base=2)
            axis.set_xlabel("rank")
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper")  # beside the lines, not on them
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)
