"""Settings of all tests."""

import gc
import os
from pathlib import Path

import jax
import pytest

# The tests compile thousands of small programs, many of them alike: op by op, in both processes, on every run.
# JAX writes an entry in place: a process that reads what another still writes gets a UserWarning and compiles itself,
# so tests that count warnings or forbid them do so by category.
CACHE = Path(__file__).parent.parent / ".cache" / f"jax-{jax.__version__}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
if jax.__version_info__ < (0, 11):  # its XLA compiles three times as fast without these; later ones have no such flag
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"

# Traced programs are millions of small objects that stay: looking through them all the time takes a tenth of it.
gc.freeze()
gc.set_threshold(50_000, 20, 100)


def pytest_configure(config):
    """Make a deprecated call from a script an error, as from the package and the tests; scripts go by bare names.

    And take the files that are named folder by folder: pytest 9.1 loses the fixtures of a folder's conftest.py where a
    file of the folder above is named between two of its own (pytest-dev/pytest#14635).
    """
    if config.args_source is config.ArgsSource.ARGS:
        config.args.sort()
    names = sorted(path.stem for path in (Path(__file__).parent.parent / "scripts").iterdir())
    config.addinivalue_line("filterwarnings", rf"error::DeprecationWarning:({'|'.join(names)})(\.|\Z)")


@pytest.fixture
def script(monkeypatch):
    """The script that reproduces the paper's figures, which imports others beside it by their bare names."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
    import rank_sweep

    return rank_sweep


@pytest.fixture(scope="module")
def compile_fast():
    """Compile without most optimisations, in modules whose programs are small and run once or twice."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# Of what is in these folders, the package's examples too, hardly anything depends on JAX: files, words and
# flags. `test_cli.py`, which does the main job, is on both.
BY_DAY_ON = {"commands": "newest", "confined": "newest", "interop": "oldest", "readers": "oldest"}


def pytest_collection_modifyitems(config, items):
    """By day, leave what takes long and hardly depends on JAX to one end of its range; at night both do all of it."""
    here = "oldest" if jax.__version_info__ < (0, 11) else "newest"
    if config.option.markexpr != "not nightly":
        return
    for item in items:
        mark = item.get_closest_marker("by_day_on")
        if item.get_closest_marker(
            "reference"
        ):  # .ci/run installs torch on the oldest alone: elsewhere it would be on none
            end = "oldest"
        else:
            end = mark.args[0] if mark else BY_DAY_ON.get((*item.nodeid.split("/"), "")[1], here)
        if end != here:
            item.add_marker(pytest.mark.skip(reason=f"by day on the {end} JAX, at night on both"))
