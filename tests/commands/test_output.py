"""What cannot be written, and what is not installed, is told in a sentence before a model or data are read."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from rslora_jax.cli import COMMANDS, main
from rslora_jax.commands import flags, heldout, runs
from rslora_jax.interop import adapter_folder, load, new_folder
from rslora_jax.interop.new_folder import written_whole
from tests.commands.test_flags import recorded

# The flags of each command that name what is to be written, with what else it must be given.
OUTS = [
    ("train", "--out", []),
    ("train", "--cache", []),
    ("generate", "--out", ["--prompt", "hi"]),
    ("eval", "--json", []),
    ("inspect", "--out", ["one"]),
    ("merge", "--out", ["one"]),
    ("export", "--out", ["one"]),
    ("import", "--out", ["one"]),
    ("combine", "--out", ["one", "two"]),
]
PLACES = {
    "under a file": (lambda here: here / "file" / "new", "not a directory|is no folder"),
    "where the system says no": (lambda here: Path("/proc/rslora-new"), "cannot be written"),
}


def test_every_flag_that_names_what_is_written_is_checked():
    named = {
        (command, "--out")
        for command in COMMANDS
        if any("--out" in a.option_strings for a in recorded(command).actions)
    }
    assert named <= {(command, flag) for command, flag, _ in OUTS}


@pytest.fixture
def nothing_is_read(monkeypatch, place):
    """A folder with a run in it, and a base and data of which no byte may be read."""

    def read(*args, **options):
        raise AssertionError("a model or data were read first")

    # Where they are already: what imports them while they are replaced would keep what takes their place.
    for module in (load, adapter_folder, runs):
        monkeypatch.setattr(module, "load_model", read)
    monkeypatch.setattr(heldout, "read_examples", read)
    monkeypatch.setattr(heldout, "docstring_pairs", read)
    monkeypatch.chdir(place.folder)


def refused(arguments, capsys):
    assert main([str(one) for one in arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("rslora: error: ") and err.count("\n") == 1 and len(err) < 330, (out, err)
    return err


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize(("command", "flag", "more"), OUTS, ids=[f"{c}{f}" for c, f, _ in OUTS])
@pytest.mark.usefixtures("nothing_is_read")
def test_what_cannot_be_written_is_told_first(command, flag, more, where, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    make, said = PLACES[where]
    rest = [] if flag == "--out" or command != "train" else ["--out", tmp_path / "run"]
    error = refused([command, *more, flag, make(tmp_path), *rest], capsys)
    assert str(make(tmp_path).name) in error and any(word in error.lower() for word in said.split("|")), error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("command", "flag", "more"), OUTS, ids=[f"{c}{f}" for c, f, _ in OUTS])
@pytest.mark.usefixtures("nothing_is_read")
def test_a_full_disk_is_told_first(command, flag, more, tmp_path, capsys, monkeypatch):
    def full(**options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rslora_jax.store.folder.tempfile.NamedTemporaryFile", full)
    rest = [] if flag == "--out" or command != "train" else ["--out", tmp_path / "run"]
    assert "cannot be written: no space left on device" in refused(
        [command, *more, flag, tmp_path / "new", *rest], capsys
    )


@pytest.mark.parametrize(("command", "package"), [(c, p) for c in COMMANDS for p in COMMANDS[c].needs])
@pytest.mark.usefixtures("nothing_is_read")
def test_what_is_not_installed_is_told_first(command, package, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    needed = {name: ["one", "--out", "o"] for name in ("merge", "export", "import", "combine")}
    arguments = needed.get(command, ["one"] if command == "inspect" else [])
    assert f"`rslora {command}` needs {package}: pip install 'rslora_jax[train]'" in refused(
        [command, *arguments], capsys
    )


@pytest.mark.usefixtures("nothing_is_read")
def test_event_files_without_their_package_are_told_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    error = refused(["train", "--tensorboard", "--out", tmp_path / "run"], capsys)
    assert "--tensorboard needs tensorboardX: pip install 'rslora_jax[tensorboard]'" in error


def test_a_file_to_write_may_be_no_folder(tmp_path):
    with pytest.raises(ValueError, match="is a folder: give a file"):
        flags.check_new_file("--json", str(tmp_path))
    flags.check_new_file("--json", str(tmp_path / "new.json"))
    assert not list(tmp_path.iterdir())


WRITER = """
    import sys, time
    from rslora_jax.interop.new_folder import written_whole
    with written_whole(sys.argv[1]) as out:
        (out / "half").write_text("half")
        print("writing", flush=True)
        time.sleep(60)
"""


@pytest.mark.by_day_on("newest")
def test_a_killed_writer_leaves_nothing_for_good_and_a_living_one_is_let_be(tmp_path):
    out, stranger = tmp_path / "out[1]", tmp_path / ".out[1]-mine"
    stranger.mkdir()  # of the user's: it has no lock of ours
    (stranger / "a").write_text("a")
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(out)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p or "." for p in sys.path), "JAX_PLATFORMS": "cpu"}
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) for _ in range(2)]
    for writer in writers:
        assert writer.stdout.readline() == b"writing\n"
    drafts = set(tmp_path.iterdir()) - {stranger}
    assert len(drafts) == 2
    os.kill(writers[0].pid, signal.SIGKILL)
    writers[0].wait()
    with written_whole(out) as draft:
        assert len(set(tmp_path.iterdir()) - {stranger, draft}) == 1  # that of the one which still writes
    assert set(tmp_path.iterdir()) - drafts == {stranger, out} and not list(out.iterdir())
    writers[1].kill()
    writers[1].wait()
    out.rmdir()
    with pytest.raises(RuntimeError), written_whole(out):
        raise RuntimeError
    assert set(tmp_path.iterdir()) == {stranger} and (stranger / "a").read_text() == "a"
    for writer in writers:
        writer.stdout.close()
    assert new_folder.check_free(out) is None
