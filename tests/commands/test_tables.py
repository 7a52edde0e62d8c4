"""Tables on terminals of any width: whatever they hold, no number is cut."""

import io

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from rich.console import Console
from rich.table import Table

from rslora_jax.commands.tables import fit_table

WORDS = st.text("ab1[/]9.e+±‖γ", min_size=1, max_size=12)
CELLS = st.lists(WORDS, max_size=4).map(" ".join)


def printed(table, width):
    file = io.StringIO()
    fitted = fit_table(table, width)
    Console(highlight=False, markup=False, width=fitted, file=file).print(table)
    return fitted, file.getvalue().splitlines()


def make(head, rows, boxed):
    table = Table() if boxed else Table(box=None, pad_edge=False, header_style="")
    for n, title in enumerate(head):
        table.add_column(title, justify="right" if n else "left", no_wrap=n == 0)
    for row in rows:
        table.add_row(*row)
    return table


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(20, 130), st.booleans())
def test_no_word_is_cut_and_what_can_fit_does(data, columns, width, boxed):
    head, *rows = data.draw(st.lists(st.tuples(*[CELLS] * columns), min_size=2, max_size=5))
    fitted, lines = printed(make(head, rows, boxed), width)
    assert max(map(len, lines)) <= fitted
    words = {word for line in lines for word in line.replace("┃", " ").replace("│", " ").split()}
    assert {word for row in (head, *rows) for cell in row[1:] for word in cell.split()} <= words
    least = sum(max([1, *(len(w) for row in (head, *rows) for w in row[n].split())]) for n in range(columns))
    if least + 3 * columns + 1 <= width:
        assert fitted == width and {w for row in (head, *rows) for w in row[0].split()} <= words


@pytest.mark.parametrize("boxed", [True, False])
def test_a_long_name_is_broken_before_the_table_is_too_wide(boxed):
    name, row = "a/run/of/a/very/long/path/" * 3, ["1.05e+00 (9.49e-01 to 1.15e+00)", "3"]
    fitted, lines = printed(make(["model", "size", "rank"], [[name, *row]], boxed), 60)
    assert fitted == 60
    cells = [line.replace("│", " ").split() for line in lines]
    assert "".join(word for cell in cells for word in cell if word in name and "/" in word) == name
