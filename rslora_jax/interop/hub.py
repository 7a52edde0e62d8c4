"""Names on the Hugging Face hub, told from paths, and what is fetched of a model there."""

from __future__ import annotations

import difflib
import functools
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rslora_jax.interop.json_files import read_json
from rslora_jax.interop.shards import INDEX, WHOLE

_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# What is read of a model beside its weights. Those are named one by one, as the same numbers lie there in other formats
# too (consolidated.safetensors, *.bin, *.gguf), and in folders (original/, onnx/).
_BESIDE = ("*.json", "*.jinja")


def is_hub_name(where: str) -> bool:
    """Say whether a text names a model on the hub, as owner/name or owner/name@revision, and is not meant as a path.

    A path is what has more than one slash or begins with a dot or ~, and without a revision what lies in a folder that
    is there.

    >>> is_hub_name("HuggingFaceTB/SmolLM2-135M"), is_hub_name("me/model@v1.0")
    (True, True)
    >>> is_hub_name("./models/llama"), is_hub_name("runs/2026/llama"), is_hub_name("llama")
    (False, False, False)
    """
    found = _NAME.fullmatch(where)
    return found is not None and (found[2] is not None or not Path(found[1]).parent.is_dir())


def split_revision(where: str) -> tuple[str, str | None]:
    """Split what `load_model` takes into a name and its revision; None where it has none, or is a path.

    >>> split_revision("me/model@v1.0"), split_revision("./model@v1.0")
    (('me/model', 'v1.0'), ('./model@v1.0', None))
    """
    found = _NAME.fullmatch(where)
    return (found[1], found[2]) if found and is_hub_name(where) and not Path(where).exists() else (where, None)


def with_revision(name: str, revision: str | None) -> str:
    """Write a name on the hub with the revision that is meant, unless it has one or is a path.

    >>> with_revision("me/model", "v1.0"), with_revision("me/model@v2.0", "v1.0"), with_revision("./model", "v1.0")
    ('me/model@v1.0', 'me/model@v2.0', './model')
    """
    return f"{name}@{revision}" if revision and "@" not in name and is_hub_name(name) else name


def not_there(where: str | Path) -> ValueError:
    """Make the error for a model that is neither a file nor a folder nor meant as a name on the hub."""
    said, near = str(where), _near(Path(os.path.expanduser(where)))
    if isinstance(where, str) and _NAME.fullmatch(where):
        said += f" is no folder and no file; as {Path(where).parent} is here it is taken for a path"
        said += f", and {where}@main for the name on the hub"
    else:
        said += " is no folder, no file, and no name on the Hugging Face hub such as owner/name"
    return ValueError(said + (f": did you mean {near}?" if near else ""))


def _near(path: Path) -> str | None:
    """Return what is there and comes closest to a path: itself where ~ stood for a part of it."""
    if path.exists():
        return str(path)
    there, missing = path.parent, path.name
    while not there.is_dir() and there != there.parent:
        there, missing = there.parent, there.name
    try:
        names = [one.name for one in there.iterdir()]
    except OSError:
        return None
    # The rest of the path, behind what is corrected, is left as it is: it may be right.
    close = difflib.get_close_matches(missing, names, n=1, cutoff=0.6)
    rest = path.relative_to(there / missing)
    if not close or not (there / close[0] / rest).exists():
        return str(there / close[0]) if close else None
    return str(there / close[0] / rest)


@functools.cache
def fetch(name: str) -> Path:
    """Give the folder of a model of the hub, fetched where it is not yet on this machine, which is said.

    Args:
      name: owner/name, or owner/name@revision.

    Raises:
      ValueError: huggingface_hub is not installed, or refuses.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise not_there(name)
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(
            f"there is no folder {name}; to fetch a model of that name from the Hugging Face hub, run "
            "`pip install huggingface_hub`"
        ) from error
    print(f"{name} is no folder here: asking the Hugging Face hub for it", file=sys.stderr, flush=True)
    try:
        return _fetch(huggingface_hub.snapshot_download, found[1], found[2])
    except Exception as error:  # by version of the library: of requests, of httpx, of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{name} is no folder here, and could not be fetched from the Hugging Face hub ({reason}): check the name "
            "and the network, log in with `hf auth login` if the model is gated, or give the path of a folder"
        ) from error


def _fetch(download: Callable[..., Any], name: str, revision: str | None) -> Path:
    folder = Path(download(name, revision=revision, allow_patterns=list(_BESIDE), ignore_patterns=["*/*"]))
    # Of the same commit, whatever the branch has come to be meanwhile.
    revision = folder.name if _COMMIT.fullmatch(folder.name) else revision
    return Path(
        download(name, revision=revision, allow_patterns=[*_BESIDE, *_weights(folder)], ignore_patterns=["*/*"])
    )


def _weights(folder: Path) -> Sequence[str]:
    """Return the files of weights that are read: those that the index names, or the one without an index."""
    if not (folder / INDEX).is_file():
        return [WHOLE]
    named = read_json(folder / INDEX).get("weight_map")
    # What is no map of names is refused when the folder is read.
    return sorted({one for one in named.values() if isinstance(one, str)}) if isinstance(named, dict) else [WHOLE]
