"""The default data set: the docstrings of the standard library on this machine, which needs no download."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from rslora_jax.train.examples import Example

# Tests, generated tables, other people's packages, and what some systems install apart from Python: without
# these, two installations of one Python version give the same pairs.
_LINUX_SPLITS_OFF = {"idlelib", "tkinter", "turtledemo", "lib2to3", "distutils", "ensurepip"}
_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "lib-dynload", "__pycache__"}
_SKIPPED_FOLDERS = _LINUX_SPLITS_OFF | _NOT_THE_LIBRARY | {"test", "tests", "pydoc_data"}
_SKIPPED_FILES = {"turtle.py", "sitecustomize.py", "usercustomize.py"}
_MAX_CODE_CHARS = 500
_MIN_WORDS = 3
_MAX_DOCSTRING_CHARS = 300
_HELD_OUT_ONE_IN = 10
# Modules differ in size: with this salt a tenth of the modules is also a tenth of the pairs.
_SALT = b"held-out "
_REQUEST = "\n\nWrite a one-line docstring for "

_Definition = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def docstring_pairs(split: Literal["train", "heldout"]) -> tuple[Example, ...]:
    """Make pairs of a function's source and the first paragraph of its docstring.

    The prompt is the real source text, with its decorators and without its docstring, cut after about
    500 characters, and a request that names the function. Nothing is imported, only parsed. The order
    is fixed: by module name, then by line.

    About one *module* in ten is held out, by a hash of its name: functions of a module resemble each other,
    so a split by function would test on what was trained on. Code met twice is kept once, whatever the name
    of its class, so none is on both sides.

    Raises:
      ValueError: `split` is something else, or this Python came without the sources of its library.

    >>> pair = next(pair for pair in docstring_pairs("train") if pair.origin == "json:loads")
    >>> print(pair.prompt)  # doctest: +ELLIPSIS
    def loads(s, *, ...
    <BLANKLINE>
    Write a one-line docstring for loads.
    <BLANKLINE>
    """
    if split not in ("train", "heldout"):
        raise ValueError(f'split is {split!r}; use "train" or "heldout"')
    pairs = tuple(pair for pair in _all_pairs() if is_held_out(_module_of(pair)) == (split == "heldout"))
    if not pairs:
        raise ValueError(f"{_library()} holds no Python sources; give a data file of your own")
    return pairs


def is_held_out(module: str) -> bool:
    """Say whether a module's pairs are held out, by a hash of its name alone.

    >>> is_held_out("argparse"), is_held_out("heapq")
    (False, False)
    """
    digest = hashlib.sha256(_SALT + module.encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HELD_OUT_ONE_IN == 0


def pairs_of_source(source: str, module: str) -> list[Example]:
    '''Make the pairs of one module from its source text.

    Functions, and methods of classes at any depth, in the order of their lines; no functions inside
    functions, whose source is part of the outer one's.

    Raises:
      SyntaxError: the source is not Python.

    >>> source = 'def double(x):\\n    """Return twice the number."""\\n    return 2 * x\\n'
    >>> pair, = pairs_of_source(source, "maths")
    >>> print(pair.prompt)
    def double(x):
        return 2 * x
    <BLANKLINE>
    Write a one-line docstring for double.
    <BLANKLINE>
    >>> pair.completion
    'Return twice the number.'
    '''
    with warnings.catch_warnings():
        # Old modules hold escapes such as "\d", of which the parser complains.
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    # Not splitlines(), which also splits at form feeds, where the parser does not.
    lines = source.split("\n")
    pairs = []
    for name, node in _definitions(tree.body):
        docstring, code = _summary(node), _code_without_docstring(node, lines)
        if docstring and code:
            prompt = f"{code}{_REQUEST}{name}.\n"
            pairs.append(Example(prompt, docstring, origin=f"{module}:{name}"))
    return pairs


def code_of(pair: Example) -> str:
    """Give the source in a pair's prompt, without the request that follows it.

    >>> code_of(Example("def f(): ...\\n\\nWrite a one-line docstring for f.\\n", "Do nothing at all."))
    'def f(): ...'
    """
    assert isinstance(pair.prompt, str)
    return pair.prompt.rpartition(_REQUEST)[0]


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _module_of(pair: Example) -> str:
    return pair.origin.partition(":")[0]


@functools.cache
def _all_pairs() -> tuple[Example, ...]:
    by_code: dict[str, Example] = {}
    for module, path in sorted(_modules(_library())):
        try:
            with tokenize.open(path) as file:
                pairs = pairs_of_source(file.read(), module)
        except (SyntaxError, UnicodeDecodeError):
            continue
        for pair in pairs:
            by_code.setdefault(code_of(pair), pair)
    return tuple(by_code.values())


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if path.name in _SKIPPED_FILES or _SKIPPED_FOLDERS.intersection(parts[:-1]):
            continue
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, _Definition]]:
    for node in body:
        if isinstance(node, _Definition):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from _definitions(node.body, f"{prefix}{node.name}.")
        else:
            for block in ("body", "handlers", "orelse", "finalbody"):
                yield from _definitions(getattr(node, block, []), prefix)


def _summary(node: _Definition) -> str | None:
    paragraph = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").partition("\n\n")[0]
    text = " ".join(paragraph.split())
    is_useful = len(text.split()) >= _MIN_WORDS and len(text) <= _MAX_DOCSTRING_CHARS
    return text if is_useful else None


def _code_without_docstring(node: _Definition, lines: list[str]) -> str | None:
    docstring, *rest = node.body
    docstring_end = docstring.end_lineno or docstring.lineno
    # Offsets count bytes. A docstring that shares a line with code cannot be cut out by lines.
    before = lines[docstring.lineno - 1].encode()[: docstring.col_offset]
    after = lines[docstring_end - 1].encode()[docstring.end_col_offset :]
    if before.strip() or after.strip() or not rest:
        return None
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    head = lines[start : docstring.lineno - 1]
    tail = lines[docstring_end : node.end_lineno]
    while not tail[0].strip():
        tail = tail[1:]
    # Not textwrap.dedent(), which a string that reaches the left margin stops.
    indent = node.col_offset
    return _shorten([line[indent:] if line[:indent].isspace() else line for line in head + tail])


def _shorten(lines: list[str]) -> str:
    kept: list[str] = []
    room = _MAX_CODE_CHARS
    for line in lines:
        room -= len(line) + 1
        if room < 0:
            return "\n".join([*kept, "    ..."])
        kept.append(line)
    return "\n".join(kept)
