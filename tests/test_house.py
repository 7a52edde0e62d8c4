"""The rules of the house, read off the source: each has a breach of its own beside it, which it must find."""

import ast
import collections
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.by_day_on("newest")

ROOT = Path(__file__).parent.parent
PACKAGE = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "rslora_jax").rglob("*.py"))
ALL = PACKAGE + sorted(
    path.relative_to(ROOT).as_posix() for of in ("tests", "scripts") for path in (ROOT / of).rglob("*.py")
)
LINES, BODY = 400, 50  # of a file; of a function, without its signature and docstring

# The core: what `wrap` needs, and what stands on it without an extra. `cli` is the commands' door.
CORE = ("transform", "methods", "starts", "stored", "several", "parallel", "store")
CORE_FILES = [
    path
    for path in PACKAGE
    if path.split("/")[1] in CORE
    or path == "rslora_jax/analysis/stability.py"
    or (path.count("/") == 1 and path not in ("rslora_jax/cli.py", "rslora_jax/__main__.py"))
]
CORE_IMPORTS = {"jax", "flax", "optax", "orbax", "numpy", *sys.stdlib_module_names}

# Where an update's size in numbers is what is asked for, and where a scale is written in another's terms.
MEASURE_GAMMA = (
    "rslora_jax/analysis/spectrum.py",
    "rslora_jax/interop/peft/scales.py",
    "rslora_jax/several/combine.py",
)
# Of named tuples, which are public, and of `jax.jit` and the system, which have no public ones.
UNDERSCORED = {"_replace", "_asdict", "_fields", "_make", "_cache_size", "_exit"}

OTHER_DIALECTS = re.compile(
    r"^(Parameters?|Arguments|Return|Throws|Raises \S+ (for|when|if).*)(:|\n-+)?$|^:(param|returns?|raises)\b",
    re.MULTILINE,
)

# What a rule finds, as (line, what is wrong).
Found = Iterator[tuple[int, str]]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def long_files(path: str, text: str, tree: ast.Module) -> Found:
    if text.count("\n") > LINES:
        yield LINES, f"more than {LINES} lines: one concept a file"


def long_functions(path: str, text: str, tree: ast.Module) -> Found:
    for node in functions(tree):
        body = node.body[1:] if ast.get_docstring(node) else node.body
        if body and body[-1].end_lineno - body[0].lineno >= BODY:
            yield node.lineno, f"{node.name} has more than {BODY} lines: it does not fit a screen"


def documented(path: str, text: str, tree: ast.Module) -> Found:
    if not ast.get_docstring(tree):
        yield 1, "a module without a docstring"
    for name, node in public(tree):
        text = ast.get_docstring(node)
        if text is None:
            yield node.lineno, f"{name} has no docstring"
        elif not re.fullmatch(r".*\.", text.split("\n\n")[0]):
            yield node.lineno, f"the docstring of {name} does not begin with one line that is a sentence"


def public(tree: ast.Module | ast.ClassDef, of: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Give public functions, classes and methods; a method that a class of ours documents need not do so again."""
    for node in tree.body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        if "overload" in {decorator.id for decorator in node.decorator_list if isinstance(decorator, ast.Name)}:
            continue
        if isinstance(tree, ast.ClassDef) and {(base, node.name) for base in names(tree.bases)} & DOCUMENTED:
            continue
        yield of + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from public(node, f"{node.name}.")


def names(nodes: list[ast.expr]) -> list[str]:
    return [node.id for node in nodes if isinstance(node, ast.Name)]


DOCUMENTED = {
    (node.name, method.name)
    for path in PACKAGE
    for node in ast.walk(ast.parse((ROOT / path).read_text()))
    if isinstance(node, ast.ClassDef)
    for method in node.body
    if isinstance(method, Function) and ast.get_docstring(method)
}


def one_dialect(path: str, text: str, tree: ast.Module) -> Found:
    for node in ast.walk(tree):
        if isinstance(node, Function | ast.ClassDef | ast.Module):
            text = ast.get_docstring(node) or ""
            other = OTHER_DIALECTS.search(text)
            if other:
                yield getattr(node, "lineno", 1), f"{other[0]!r}: write `Args:`, `Returns:`, `Raises:`"


def private_jax(path: str, text: str, tree: ast.Module) -> Found:
    if path != "rslora_jax/transform/compat.py":
        for line, name in imported(tree):
            if name.startswith("jax._src"):
                yield line, f"{name}: only transform/compat.py imports what JAX keeps private"


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Give all modules that are imported, with what is taken from each."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def core_alone(path: str, text: str, tree: ast.Module) -> Found:
    for node in tree.body if path in CORE_FILES else ():
        for line, name in imported(node) if isinstance(node, ast.Import | ast.ImportFrom) else ():
            first, *rest = name.split(".")
            if first == "rslora_jax":
                room = f"{rest[0]}/__init__.py" if rest and (ROOT / "rslora_jax" / rest[0]).is_dir() else ""
                if room and f"rslora_jax/{room}" not in CORE_FILES and rest[:2] != ["analysis", "stability"]:
                    yield line, f"{name}: the core stands below this room"
            elif first not in CORE_IMPORTS:
                yield line, f"{name}: the core imports jax, flax, optax, orbax and numpy alone"


def factors_by_name(path: str, text: str, tree: ast.Module) -> Found:
    if path.startswith(("rslora_jax/methods/", "rslora_jax/transform/")):
        return
    for node in ast.walk(tree):
        keys = node.keys if isinstance(node, ast.Dict) else [node.slice] if isinstance(node, ast.Subscript) else []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop"):
            keys = node.args[:1]
        if any(isinstance(key, ast.Constant) and key.value in ("a", "b") for key in keys):
            yield node.lineno, "names a factor: go over `site.factors`, or ask the method"
        product = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and path not in MEASURE_GAMMA
        if product and any(isinstance(x, ast.Attribute) and x.attr == "gamma" for x in (node.left, node.right)):
            yield node.lineno, "multiplies by gamma: what acts in place of W is the method's to say"


def primitives_by_name(path: str, text: str, tree: ast.Module) -> Found:
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            for side in (node.left, *node.comparators):
                if re.search(r"primitive\.name$|^primitive$", ast.unparse(side)) and any(
                    isinstance(part, ast.Constant) and isinstance(part.value, str)
                    for other in (node.left, *node.comparators)
                    for part in ast.walk(other)
                ):
                    yield node.lineno, f"{ast.unparse(node)}: compare primitives themselves, whose names change"


WORDS = collections.Counter(
    word
    for path in (*map(ROOT.joinpath, ALL), *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
    for word in set(re.findall(r"\w+", path.read_text()))
)


def own_business(path: str, text: str, tree: ast.Module) -> Found:
    for node in tree.body:
        if isinstance(node, Function) and not node.name.startswith("_") and WORDS[node.name] < 2:
            yield node.lineno, f"no other file speaks of {node.name}: begin its name with an underscore"


def others_private(path: str, text: str, tree: ast.Module) -> Found:
    own = {"self", "cls", *(node.name for node in tree.body if isinstance(node, ast.ClassDef))}
    for node in ast.walk(tree):
        private = isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr) and node.attr not in UNDERSCORED
        if private and ast.unparse(node.value) not in own:
            yield node.lineno, f"{ast.unparse(node)} is another's own"
    for line, name in imported(tree):
        if name.startswith("rslora_jax") and re.match("_[^_]", name.split(".")[-1]):
            yield line, f"{name} is its module's own"


RULES: list[tuple[Callable[[str, str, ast.Module], Found], list[str], list[tuple[str, str]]]] = [
    (long_files, ALL, [("rslora_jax/x.py", "\n" * (LINES + 1)), ("tests/x.py", "\n" * (LINES + 1))]),
    (long_functions, PACKAGE, [("rslora_jax/x.py", "def f():\n" + "    pass\n" * (BODY + 1))]),
    (
        documented,
        PACKAGE,
        [
            ("rslora_jax/x.py", "x = 1"),
            ("rslora_jax/x.py", '"""M."""\ndef f(): pass'),
            ("rslora_jax/x.py", '"""M."""\nclass C:\n    """C."""\n    def f(self): pass'),
            ("rslora_jax/x.py", '"""M."""\ndef f():\n    """Two\n    lines."""'),
            ("rslora_jax/x.py", '"""M."""\ndef f():\n    """No stop"""'),
        ],
    ),
    (
        one_dialect,
        PACKAGE,
        [
            ("rslora_jax/x.py", '"""M.\n\nParameters\n----------\nx: int\n"""'),
            ("rslora_jax/x.py", '"""M.\n\n:param x: int\n"""'),
            ("rslora_jax/x.py", '"""M.\n\nRaises `ValueError` when it rains.\n"""'),
        ],
    ),
    (
        private_jax,
        PACKAGE,
        [("rslora_jax/x.py", "def f():\n    from jax._src import core"), ("rslora_jax/x.py", "import jax._src.core")],
    ),
    (
        core_alone,
        PACKAGE,
        [
            ("rslora_jax/wrap.py", "import matplotlib"),
            ("rslora_jax/wrap.py", "from rslora_jax.train import fit"),
            ("rslora_jax/store/keys.py", "from grain import x"),
        ],
    ),
    (
        factors_by_name,
        PACKAGE,
        [
            ("rslora_jax/x.py", "f['b']"),
            ("rslora_jax/x.py", "f.get('b')"),
            ("rslora_jax/x.py", "{'a': 1}"),
            ("rslora_jax/x.py", "2 * site.gamma"),
        ],
    ),
    (
        primitives_by_name,
        PACKAGE,
        [
            ("rslora_jax/x.py", "eqn.primitive.name == 'scan'"),
            ("rslora_jax/x.py", "eqn.primitive.name in ('jit', 'pjit')"),
            ("rslora_jax/x.py", "primitive != 'mul'"),
        ],
    ),
    (own_business, PACKAGE, [("rslora_jax/x.py", "def known_here_alone(): pass")]),
    (
        others_private,
        ALL,
        [("rslora_jax/x.py", "lora._program"), ("tests/x.py", "from rslora_jax.wrap import _walk_of")],
    ),
]
by_rule = pytest.mark.parametrize(("rule", "files", "breaches"), RULES, ids=[rule.__name__ for rule, *_ in RULES])


@by_rule
def test_the_house_keeps_to(rule, files, breaches):
    found = []
    for path in files:
        text = (ROOT / path).read_text()
        found += [f"{path}:{line}: {what}" for line, what in rule(path, text, ast.parse(text))]
    assert not found, "\n".join(found)


@by_rule
def test_a_breach_is_found(rule, files, breaches):
    for path, text in breaches:
        assert list(rule(path, text, ast.parse(text))), text


def missing_names(text: str) -> list[str]:
    """Give what a file imports from modules of the package that have no such name."""
    imports = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rslora_jax")
    ]

    def is_there(module: str, name: str) -> bool:
        found = importlib.import_module(module)
        return hasattr(found, name) or bool(hasattr(found, "__path__") and importlib.util.find_spec(f"{module}.{name}"))

    names = [(node.module or "", alias.name) for node in imports for alias in node.names]
    return [f"{module}.{name}" for module, name in names if not is_there(module, name)]


def test_what_the_scripts_import_of_the_package_is_there():
    assert missing_names("from rslora_jax.models.places import Places, visible") == ["rslora_jax.models.places.visible"]
    for path in (ROOT / "scripts").rglob("*.py"):
        assert not missing_names(path.read_text()), path
