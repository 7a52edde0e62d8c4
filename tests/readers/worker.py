"""Reads damaged files one after the other and says what came of each: a process of its own, which may die of one.

    python -m tests.readers.worker SEED FIRST COUNT [KIND]

Each line of its output is a case as JSON: at its beginning, and with its outcome at its end.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tests.readers.damages import blind
from tests.readers.kinds import KINDS, Kind

SECONDS, BYTES, CHARACTERS = 10, 1 << 30, 300


def main(seed: str, first: int, count: int, only: str = "") -> None:
    """Do cases `first` to `first + count` of a seed."""
    limit = resource.getrlimit(resource.RLIMIT_AS)
    kinds = [kind for kind in KINDS if only in ("", kind.name)]
    with tempfile.TemporaryDirectory(prefix="r-") as parent:
        for kind in kinds:
            kind.make(Path(parent, kind.name))
            shutil.copytree(Path(parent, kind.name), _whole(Path(parent, kind.name)))
            if first == 0 or only:
                tell({"case": -1, "kind": kind.name} | outcome(kind, Path(parent, kind.name)))
        # What goes far beyond the law's bound is not to take the machine with it.
        resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + 6 * BYTES, limit[1]))
        for number in range(first, first + count):
            kind = kinds[number % len(kinds)]
            tell(one(kind, Path(parent, kind.name), seed, number))


def _whole(folder: Path) -> Path:
    return folder.parent / "whole" / folder.name


def one(kind: Kind, folder: Path, seed: str, number: int) -> dict[str, Any]:
    """Damage a file of a folder, read the folder, and put the file back."""
    rng = random.Random(f"{seed} {number}")
    paths = sorted(path for path in folder.glob(kind.targets) if path.is_file())
    path, damage = rng.choice(paths), rng.choice(kind.damages)
    whole = path.read_bytes()
    data = damage(rng, whole)
    if rng.random() < 0.1:
        data = blind(rng, data)
    case = {"case": number, "kind": kind.name, "damage": damage.__qualname__.partition(".")[0]}
    tell(case | {"file": path.relative_to(folder).as_posix()})
    path.write_bytes(data)
    try:
        case |= outcome(kind, folder)
        if case["outcome"] == "BREACH" and "KEEP" in os.environ:
            shutil.copytree(folder, Path(os.environ["KEEP"], f"{seed}-{number}"), dirs_exist_ok=True)
    finally:
        if kind.targets.startswith("checkpoints"):  # a reader may move a part of it
            shutil.rmtree(folder)
            shutil.copytree(_whole(folder), folder)
        else:
            path.write_bytes(whole)
    return case


def outcome(kind: Kind, folder: Path) -> dict[str, Any]:
    """Read a folder, within the limits, and say what came of it."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    before = _status("VmRSS")
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    said = []
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = kind.read(folder)
    except BaseException as error:
        faulthandler.cancel_dump_traceback_later()
        if (wrong := wrong_with(error, folder)) or (wrong := _too_much(before)):
            return {"outcome": "BREACH", "why": wrong, "text": "".join(traceback.format_exception(error))[-3000:]}
        return {"outcome": "refused", "text": str(error)}
    faulthandler.cancel_dump_traceback_later()
    if wrong := _too_much(before):
        return {"outcome": "BREACH", "why": wrong}
    try:
        kind.check(folder, found)
    except BaseException as error:
        text = "".join(traceback.format_exception(error))[-3000:]
        return {"outcome": "BREACH", "why": "read other than the file holds it", "text": text}
    return {"outcome": "right, with a warning" if said else "right", "text": str(said[0].message) if said else ""}


def wrong_with(error: BaseException, folder: Path | str) -> str:
    """Say what is wrong with an error; nothing where it is one sentence that names the file."""
    if not isinstance(error, (ValueError, OSError)):
        return f"{type(error).__name__} is raised"
    text = str(error)
    if not text.isprintable():
        return "the text is not printable"
    if len(text) > CHARACTERS:
        return f"the text has {len(text)} characters"
    if str(folder) not in text:
        return "the text names no file"
    return ""


def _too_much(before: int) -> str:
    taken = _status("VmHWM") - before
    return f"{taken >> 20} MB were taken" if taken > BYTES else ""


def _status(name: str) -> int:
    """Read a size of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    return 0


def tell(case: dict[str, Any]) -> None:
    """Print a case as a line."""
    print(json.dumps(case), flush=True)


def run(seed: str, first: int, count: int, only: str = "") -> Iterator[dict[str, Any]]:
    """Give the outcome of every case, from processes of this file; one that ends before its time is a breach."""
    import subprocess

    command = [sys.executable, "-m", "tests.readers.worker", seed]
    end, begun = first + count, {}
    while first < end:
        with tempfile.TemporaryFile("w+") as complaints:
            child = subprocess.Popen(
                [*command, str(first), str(end - first), *([only] if only else [])],
                stdout=subprocess.PIPE,
                stderr=complaints,
                text=True,
            )
            assert child.stdout is not None
            for line in child.stdout:
                begun = json.loads(line)
                if "outcome" in begun:
                    yield begun
            status = child.wait()
            complaints.seek(0)
            text = complaints.read()[-3000:]
        if status == 0:
            return
        assert "outcome" not in begun and "case" in begun, text
        yield begun | {"outcome": "BREACH", "why": f"the process ended with {status}", "text": text}
        first = begun["case"] + 1


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
