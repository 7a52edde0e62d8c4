"""Rows of scripts/paper_scale.py, as a table in the terminal and in Markdown, and as a CSV file."""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

# The tables of the page.
PAPER, LONG, BITS = "Llama 2 7B", "attention by length", "the base in few bits"
KEPT = "what is kept for the backward pass"
KEY = 11  # how many columns say what was asked for
BUDGET = 24e9  # of a card that the compiler at hand knows nothing of


@dataclasses.dataclass(frozen=True)
class Row:
    """What one case has shown: bytes and FLOPs of one device in one step; None where it did not compile.

    Where the compiler was only asked for the memory, that is `total_bytes`, and there are no FLOPs.
    """

    topology: str
    mesh: str
    rank: int
    remat: str
    activations: str
    adapters: str
    model: str
    base: str
    rows: int
    length: int
    attention: str
    device: str
    devices: int
    adapter_parameters: int
    argument_bytes: int
    temp_bytes: int | None
    total_bytes: int | None
    memory_bytes: int
    complaint: str
    flops: int | None
    flops_by_hand: int
    flops_xla: float | None
    kernel_flops: int
    collectives: str
    moved_bytes: int | None
    base_moved_bytes: int | None
    weights_gathered: int | None
    base_weights_gathered: int | None
    compile_s: float
    jax: str
    host_bytes: int | None = None  # temporary, in the host's memory

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(str(x) for x in dataclasses.astuple(self)[:KEY])

    @property
    def section(self) -> str:
        if self.model == PAPER:
            return PAPER
        if self.model == "Llama 3.1 8B" and self.topology == "v5e:2x4":  # one host
            return LONG
        return KEPT if self.length >= 8192 else BITS


def table(rows: Sequence[Row], section: str = PAPER) -> tuple[list[str], list[list[str]]]:
    """Return the head and the lines of one of the tables."""
    of = {PAPER: _paper, LONG: _long, BITS: _bits, KEPT: _kept}[section]
    found = [of(row) for row in rows if row.section == section]
    return list(of(None)), [list(line.values()) for line in found]


def _paper(r: Row | None) -> dict[str, str]:
    names = "slice|mesh|rank|remat|activations|adapters|arguments GB|temporary GB|total of GB|TFLOPs a device"
    names += "|to hand count|collectives a step|base alone moves GB|compile s"
    if r is None:
        return dict.fromkeys(names.split("|"), "")
    cells = [f"{r.topology} ({r.devices})", r.mesh, str(r.rank), r.remat, r.activations, r.adapters]
    cells += [gb(r.argument_bytes), gb(r.temp_bytes), total(r), *flops(r), r.collectives]
    return dict(zip(names.split("|"), [*cells, gb(r.base_moved_bytes), f"{r.compile_s:.0f}"], strict=True))


def _long(r: Row | None) -> dict[str, str]:
    names = "rows x tokens|attention|slice|mesh|remat|arguments GB|temporary GB|of the host GB|total of GB"
    names += "|TFLOPs a device|to hand count|and in the kernel|compile s"
    if r is None:
        return dict.fromkeys(names.split("|"), "")
    cells = [f"{r.rows} x {r.length:,}", r.attention, f"{r.topology} ({r.devices})", r.mesh, r.remat]
    cells += [gb(r.argument_bytes), gb(r.temp_bytes), gb(r.host_bytes or None), total(r), *flops(r)]
    cells += [f"{r.kernel_flops / 1e12:.1f}" if r.flops else "", f"{r.compile_s:.0f}" if r.flops else ""]
    return dict(zip(names.split("|"), cells, strict=True))


def _bits(r: Row | None) -> dict[str, str]:
    names = (
        "model|base|rows x tokens|slice|mesh|adapters|arguments GB|temporary GB|total of GB|in 24 GB|TFLOPs a device"
    )
    names += "|to hand count|XLA's own count, TFLOPs|compile s"
    if r is None:
        return dict.fromkeys(names.split("|"), "")
    cells = [r.model, r.base, f"{r.rows} x {r.length:,}", f"{r.topology} ({r.devices})", r.mesh, r.adapters]
    inside = "" if r.total_bytes is None else "yes" if r.total_bytes <= BUDGET else "no"
    own = "" if r.flops_xla is None else f"{r.flops_xla / 1e12:.2f}"
    cells += [
        gb(r.argument_bytes),
        gb(r.temp_bytes),
        total(r),
        inside,
        *flops(r),
        own,
        f"{r.compile_s:.0f}" if r.flops else "",
    ]
    return dict(zip(names.split("|"), cells, strict=True))


def _kept(r: Row | None) -> dict[str, str]:
    names = "model|base|rows x tokens|slice|mesh|remat|arguments GB|temporary GB|of the host GB|total of GB"
    names += "|TFLOPs a device|to hand count|compile s"
    if r is None:
        return dict.fromkeys(names.split("|"), "")
    cells = [r.model, r.base, f"{r.rows} x {r.length:,}", f"{r.topology} ({r.devices})", r.mesh, r.remat]
    cells += [gb(r.argument_bytes), gb(r.temp_bytes), gb(r.host_bytes or None), total(r), *flops(r)]
    return dict(zip(names.split("|"), [*cells, f"{r.compile_s:.0f}" if r.flops else ""], strict=True))


def gb(n: int | None) -> str:
    return "" if n is None else f"{n / 1e9:.2f}"


def total(r: Row) -> str:
    if r.total_bytes is None:
        return f"no: {r.complaint} of {gb(r.memory_bytes)}"
    return f"{'' if r.flops else 'about '}{gb(r.total_bytes)} of {gb(r.memory_bytes)}"


def flops(r: Row) -> tuple[str, str]:
    return ("", "") if r.flops is None else (f"{r.flops / 1e12:.1f}", f"{r.flops / r.flops_by_hand:.3f}")


def markdown(rows: Sequence[Row], section: str = PAPER) -> str:
    head, lines = table(rows, section)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["--"] * len(head), *lines)) + "\n"


def read_csv(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [parse(line) for line in csv.DictReader(file)]


def merge_csv(path: Path, rows: Sequence[Row], order: Sequence[tuple[str, ...]]) -> list[Row]:
    """Write the rows to a file, in place of its lines for the same cases, and return all it then holds, in order."""
    kept = {row.key: row for row in [*read_csv(path), *rows]}
    ranked = sorted(kept.values(), key=lambda r: order.index(r.key) if r.key in order else len(order))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in ranked)
    return ranked


def update_page(path: Path, rows: Sequence[Row]) -> None:
    """Put the tables in their places in a page, or make a page of them."""
    page = path.read_text() if path.exists() else ""
    for section in (PAPER, LONG, BITS, KEPT):
        begin, end = (f"<!-- {word} of scripts/paper_scale.py: {section} -->" for word in ("the table", "end"))
        before, _, after = (page if begin in page else f"{page}{begin}\n{end}\n").partition(begin)
        page = f"{before}{begin}\n{markdown(rows, section)}{end}{after.partition(end)[2]}"
    path.write_text(page)


def parse(line: dict[str, str]) -> Row:
    kinds = {f.name: f.type for f in dataclasses.fields(Row)}

    def make(kind):
        return str if kind is str else float if "float" in str(kind) else int

    values = {
        name: None if text == "" and kinds[name] is not str else make(kinds[name])(text) for name, text in line.items()
    }
    return Row(**values)
