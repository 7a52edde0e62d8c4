"""The script that compares a base's forms: a run of two steps in two of them, from the command line to its table."""

import json
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.nightly

SCRIPTS = Path(__file__).parent.parent / "scripts"


def test_two_forms_of_the_real_model_go_on_where_they_were_cut_and_differ_by_rounding(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import quantised

    def run(forms):
        monkeypatch.setattr(
            sys, "argv", ["quantised.py", "--steps", "2", "--turns", "1", "--forms", forms, "--out", str(tmp_path)]
        )
        quantised.main()

    run("float32")
    begun = (tmp_path / "float32" / "figures.json").stat().st_mtime_ns
    run("float32,own")
    assert (tmp_path / "float32" / "figures.json").stat().st_mtime_ns == begun
    exact, own = (json.loads((tmp_path / form / "figures.json").read_text()) for form in ("float32", "own"))
    assert own["losses"] == pytest.approx(exact["losses"], abs=1e-5) and own["peak"] < exact["peak"]
    table = (tmp_path / "table.md").read_text()
    assert table == capsys.readouterr().out.rpartition("in turn\n")[2].strip("\n") + "\n"
    assert "| 538.1 MB |" in table and "| 96.6 MB |" in table
    with pytest.raises(SystemExit):
        run("float16")
