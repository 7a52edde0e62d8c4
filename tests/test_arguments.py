"""Files to test may be named in any order."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.nightly


def test_a_file_of_the_folder_above_takes_no_fixture_from_those_named_after_it():
    files = ["commands/test_tables.py", "test_patterns_end.py", "commands/test_resume.py"]
    flags = ["--setup-plan", "-m", "nightly or not nightly", "-n", "0", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *flags, *(f"tests/{file}" for file in files)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0 and "SETUP    S place" in done.stdout, done.stdout
