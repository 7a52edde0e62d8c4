"""Tables on a terminal."""

from __future__ import annotations

import io
from typing import Any


def print_table(table: Any) -> None:
    """Print a table of rich's, of which nothing is cut; where nobody looks, it is not broken to a terminal's width."""
    from rich.console import Console

    terminal, text = Console(), io.StringIO()
    width = fit_table(table, terminal.width if terminal.is_terminal else 200)
    # As plain text: what steers a terminal in it is of a cell, and is shown.
    Console(file=text, highlight=False, markup=False, width=width).print(table)
    print(text.getvalue(), end="", flush=True)


def fit_table(table: Any, width: int) -> int:
    """Set the widths of a table's columns so that it fits, and return the width to print it in.

    The widest are narrowed first, but never below their longest word: so numbers stay whole. Where that is not enough,
    the first column, of names, is broken anywhere; and at last the table is wider than was asked for.
    """
    from rich.cells import cell_len
    from rich.console import Console
    from rich.measure import Measurement

    def total() -> int:
        return Measurement.get(without_end, without_end.options, table).maximum

    without_end = Console(width=100_000, markup=False)
    texts = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    least = [max((cell_len(word) for text in each for word in text.split()), default=1) for each in texts]
    for column, each in zip(table.columns, texts, strict=True):
        column.width, column.no_wrap, column.overflow = max(map(cell_len, each)), False, "fold"
    if table.box is None and total() > width:
        table.padding = (0, 1, 0, 0)  # one blank between columns for two
    for bounds in (least, [min(least[0], 20), *least[1:]]):
        while total() > width:
            wide = [column for column, bound in zip(table.columns, bounds, strict=True) if column.width > bound]
            if not wide:
                break
            max(wide, key=lambda column: column.width).width -= 1
    return max(width, total())
