"""Whether folders of adapters belong to one base, before it is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rslora_jax.interop.adapter_folder import SMOLLM2, Opened
from rslora_jax.store.checksum import same_form


def check_same_base(opened: Sequence[Opened]) -> None:
    """Raise a ValueError that names the first folder whose base is another than that of one before it.

    Runs tell their base by checksums. What names a model on Hugging Face, as PEFT's folders and most runs do, is told
    by the name. Whether they fit the base that is read in the end, `attach` says.
    """
    runs = [one for one in opened if one.base]
    for one in runs[1:]:
        for path in {**runs[0].base, **one.base}:
            there, here = (of.base.get(path, "missing") for of in (runs[0], one))
            if there != here:
                other = f"is {here} and not {there}" if not same_form(here, there) else "has other values"
                raise ValueError(
                    f"{one.source} is of another base than {runs[0].source} ({path} {other}): take adapters of one base"
                )
    named = [(one, name) for one in opened if (name := _name(one)) is not None]
    for one, name in named[1:]:
        first, known = named[0]
        if not _same(name, known):
            raise ValueError(
                f"{one.source} is of another base than {first.source} ({name}, and {known}): take adapters of one, or "
                "let their files call it by one name"
            )


def _name(opened: Opened) -> str | None:
    """Return what adapters call their base; None where that is a place, or they do not say."""
    if opened.peft is not None:
        return opened.named
    model = opened.settings.get("model", "")
    if model in (None, "smollm2"):
        return SMOLLM2
    return None if not model or model.endswith(".gguf") or Path(model).exists() else str(model)


def _same(one: str, other: str) -> bool:
    """Say whether two names are of one model; a revision counts where both tell it.

    >>> _same("a/b", "a/b@1"), _same("a/b@2", "a/b@1"), _same("a/b", "a/c")
    (True, False, False)
    """
    (name, _, revision), (known, _, its) = (text.partition("@") for text in (one, other))
    return name == known and (not revision or not its or revision == its)
