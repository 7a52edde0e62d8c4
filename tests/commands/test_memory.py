"""`rslora train` says what its flags of memory do, and refuses what they are not, before anything is read."""

import pytest

from rslora_jax.cli import main
from rslora_jax.commands import train as command
from rslora_jax.models.remat import REMAT_POLICIES


@pytest.fixture
def goes_no_further(monkeypatch):
    """Fail where the command looks at data or model."""
    monkeypatch.setattr(command, "_open_start", lambda a: pytest.fail("it went on"))


@pytest.mark.parametrize(("name", "near"), [("ofload", "offload"), ("Full", "full"), ("dots_savable", "dots_saveable")])
def test_a_policy_that_is_unknown_is_refused_with_what_comes_close(name, near, tmp_path, capsys, goes_no_further):
    assert main(["train", "--remat", name, "--out", str(tmp_path / "run")]) == 2
    assert f"remat='{name}' is unknown (did you mean '{near}'?)" in capsys.readouterr().err


def test_offload_on_a_cpu_says_that_it_saves_nothing(tmp_path, capsys, monkeypatch):
    def stop(a):
        raise ValueError("far enough")

    monkeypatch.setattr(command, "_open_start", stop)
    for policy in ("offload", "full"):
        assert main(["train", "--remat", policy, "--out", str(tmp_path / "run")]) == 2
        said = capsys.readouterr().err
        assert ("a CPU's own: it takes what --remat full takes" in said) == (policy == "offload")


def test_the_help_says_each_policy_by_name(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = capsys.readouterr().out
    aliases = {"checkpoint_dots", "checkpoint_dots_with_no_batch_dims"}  # jax's older words for two that are said
    for name in {"none", "full", *REMAT_POLICIES} - aliases:
        assert name in said.replace("\n" + 24 * " ", " "), name
