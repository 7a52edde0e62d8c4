"""A deprecated call of ours is an error in the tests, and one inside a library is not."""

import warnings
from pathlib import Path

import pytest

import rslora_jax

PACKAGE = Path(rslora_jax.__file__).parent
SCRIPTS = [path.stem for path in (PACKAGE.parent / "scripts").glob("*.py")]
MODULES = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in PACKAGE.rglob("*.py")]


def call_from(module):
    """Call something deprecated from a module of this name."""
    exec("old()", {"__name__": module, "old": lambda: warnings.warn("old is deprecated", DeprecationWarning, 2)})


def test_ours_is_an_error():
    for module in ["rslora_jax", "tests.conftest", "paper.rates", *MODULES, *SCRIPTS]:
        with pytest.raises(DeprecationWarning, match="old is deprecated"):
            call_from(module)


@pytest.mark.parametrize("module", ["orbax.checkpoint", "jax.numpy", "rslora_jaxlike", "stability_of_others", "pytest"])
def test_a_librarys_is_not(module):
    call_from(module)


def test_this_file_is_ours():
    with pytest.raises(DeprecationWarning):
        warnings.warn("old", DeprecationWarning, stacklevel=1)
