from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap

import pytest

from rslora_jax.train.docstrings import code_of, docstring_pairs, is_held_out, pairs_of_source
from rslora_jax.train.examples import Example

PRINT_PAIRS = """
from rslora_jax.train.docstrings import docstring_pairs
print(repr((docstring_pairs("train"), docstring_pairs("heldout"))))
"""


@pytest.fixture(scope="module")
def train() -> tuple[Example, ...]:
    return docstring_pairs("train")


@pytest.fixture(scope="module")
def heldout() -> tuple[Example, ...]:
    return docstring_pairs("heldout")


def test_there_are_thousands_and_about_a_tenth_is_held_out(train, heldout):
    assert len(train) + len(heldout) > 3000
    assert 0.07 < len(heldout) / (len(train) + len(heldout)) < 0.13


def test_no_module_and_no_code_is_on_both_sides(train, heldout):
    modules, codes = (
        [{key(pair) for pair in side} for side in (train, heldout)]
        for key in (lambda pair: pair.origin.split(":")[0], code_of)
    )
    assert not modules[0] & modules[1]
    assert not codes[0] & codes[1]
    assert len(codes[0]) == len(train) and len(codes[1]) == len(heldout)
    assert all(map(is_held_out, modules[1])) and not any(map(is_held_out, modules[0]))


def test_the_pairs_are_of_a_size_to_train_on(train):
    for pair in train:
        assert code_of(pair) and len(pair.prompt) < 700
        assert len(pair.completion.split()) >= 3 and len(pair.completion) <= 300
        assert "\n" not in pair.completion


def test_tests_and_other_peoples_packages_are_left_out(train, heldout):
    modules = {pair.origin.split(":")[0] for pair in train + heldout}
    parts = {part for module in modules for part in module.split(".")}
    assert not parts & {"test", "tests", "site-packages", "tkinter", "idlelib", "pip", "numpy"}
    assert {"argparse", "json.decoder", "collections"} <= modules


def test_code_that_was_not_cut_is_real_source_without_its_docstring(train):
    whole = [pair for pair in train if not code_of(pair).endswith("\n    ...")]
    assert len(whole) > 0.65 * len(train)
    for pair in whole[::7]:
        (function,) = ast.parse(code_of(pair)).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        own = " ".join((ast.get_docstring(function) or "").split())
        assert not own.startswith(pair.completion)


def test_another_process_makes_the_same_pairs_in_the_same_order(train, heldout):
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONIOENCODING": "utf-8"}
    other = subprocess.run([sys.executable, "-c", PRINT_PAIRS], capture_output=True, check=True, env=environment)
    assert other.stdout.decode().strip() == repr((train, heldout))


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split is 'test'; use"):
        docstring_pairs("test")  # type: ignore[arg-type]


SOURCE = textwrap.dedent(
    '''
    """The module."""

    class Outer:
        """The class."""

        class Inner:
            @property
            def size(self):  # bytes
                """Give the size in bytes.

                More on that.
                """

                text = """
    at the margin"""
                return len(text)

    if True:
        async def load(path):
            r"""Read the \\d
            of a file."""
            def nested():
                """Stay inside of it."""
            return nested

    def same_line(): "Share a line with def."; return 1

    def only():
        """Have no body to read."""

    def terse():
        """Too short."""
        return 1

    def undocumented():
        return 1
    '''
)


def test_what_becomes_of_each_kind_of_function():
    size, load = pairs_of_source(SOURCE, "maths")
    assert (size.origin, size.completion) == ("maths:Outer.Inner.size", "Give the size in bytes.")
    assert size.prompt == (
        '@property\ndef size(self):  # bytes\n    text = """\nat the margin"""\n    return len(text)'
        "\n\nWrite a one-line docstring for Outer.Inner.size.\n"
    )
    assert (load.origin, load.completion) == ("maths:load", "Read the \\d of a file.")
    assert code_of(load).startswith("async def load(path):\n    def nested():\n")


def test_long_code_is_cut_at_a_line_and_shows_it():
    body = "".join(f"    x = {n}\n" for n in range(400))
    (pair,) = pairs_of_source(f'def f():\n    """Count up for long."""\n{body}', "maths")
    assert code_of(pair).endswith("\n    ...") and 400 < len(code_of(pair)) <= 510
    assert code_of(pair).startswith("def f():\n    x = 0\n    x = 1\n")
