"""Rows of scripts/paper_scale.py, as a table in the terminal and in Markdown, and as a CSV file."""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

BEGIN, END = "<!-- the table of scripts/paper_scale.py -->", "<!-- end of the table -->"


@dataclasses.dataclass(frozen=True)
class Row:
    """What one case has shown: bytes and FLOPs of one device in one step; None where it did not compile."""

    topology: str
    mesh: str
    rank: int
    remat: str
    activations: str
    adapters: str
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
    collectives: str
    moved_bytes: int | None
    base_moved_bytes: int | None
    weights_gathered: int | None
    base_weights_gathered: int | None
    compile_s: float
    jax: str

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(str(x) for x in dataclasses.astuple(self)[:6])


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return the table's head and its lines."""
    head = "slice|mesh|rank|remat|activations|adapters|arguments GB|temporary GB|total of GB|TFLOPs a device"
    head += "|to hand count|collectives a step|base alone moves GB|compile s"

    def gb(n):
        return "" if n is None else f"{n / 1e9:.2f}"

    lines = []
    for r in rows:
        total = (
            f"{gb(r.total_bytes)} of {gb(r.memory_bytes)}" if r.flops else f"no: {r.complaint} of {gb(r.memory_bytes)}"
        )
        flops = ("", "") if r.flops is None else (f"{r.flops / 1e12:.1f}", f"{r.flops / r.flops_by_hand:.3f}")
        place = f"{r.topology} ({r.devices})"
        cells = [place, r.mesh, str(r.rank), r.remat, r.activations, r.adapters, gb(r.argument_bytes), gb(r.temp_bytes)]
        lines.append([*cells, total, *flops, r.collectives, gb(r.base_moved_bytes), f"{r.compile_s:.0f}"])
    return head.split("|"), lines


def markdown(rows: Sequence[Row]) -> str:
    head, lines = table(rows)
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
    """Put the table in its place in a page, or make a page of it."""
    page = path.read_text() if path.exists() else f"{BEGIN}\n{END}\n"
    before, _, after = page.partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{markdown(rows)}{END}{after.partition(END)[2]}")


def parse(line: dict[str, str]) -> Row:
    kinds = {f.name: f.type for f in dataclasses.fields(Row)}

    def make(kind):
        return str if kind is str else float if "float" in str(kind) else int

    values = {
        name: None if text == "" and kinds[name] is not str else make(kinds[name])(text) for name, text in line.items()
    }
    return Row(**values)
