"""A base model and the adapters of runs that were trained on it, as the commands take them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rslora_jax.config import LoraConfig
from rslora_jax.interop.adapter_folder import attach, load_base, open_adapters, parse_step, place_of_base
from rslora_jax.interop.chat_template import parse_options
from rslora_jax.interop.family import Family
from rslora_jax.interop.load import folder_of, load_model
from rslora_jax.interop.model import Model, apply_of
from rslora_jax.interop.own_tokenizer import same_tokenizer
from rslora_jax.interop.same_base import check_same_base
from rslora_jax.interop.untied import merge_model
from rslora_jax.methods.method import rescaled as with_update_times
from rslora_jax.models.layout import unstack_adapters, unstack_layers
from rslora_jax.wrap import Adapters, Lora, wrap


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """The adapters of one run, and the function that takes them."""

    name: str
    step: int | None  # of PEFT's folders there is none
    config: LoraConfig
    lora: Lora
    variables: Any  # the base, with what the folder has in place of some of its weights
    adapters: Adapters
    settings: Mapping[str, Any]  # what it was started with


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedRuns:
    """A base, and runs on it. Runs whose adapters have the same shapes share one `Lora`, hence what is compiled."""

    family: Family
    config: Any  # of the family's class
    variables: dict[str, Any]
    tokenizer: Any
    runs: tuple[Run, ...]
    settings: Mapping[str, Any]  # what the first run was started with
    folder: Path | None = None  # of the base, where that is a Hugging Face one


def load_runs(
    runs: Sequence[str],
    *,
    model: str | None = None,
    step: str | None = None,
    dtype: str | None = None,
    to_write: bool = False,
    template_options: Sequence[str] = (),
    together: bool = False,
) -> LoadedRuns:
    """Load the base of some runs, and their adapters.

    Args:
      runs: their folders, of ours or of PEFT; none for the base alone.
      model: where the base is; by default where the runs say they found it, SmolLM2 where there are none.
      step: "last", "best" or a number; by default the last.
      dtype: what to compute in; by default what the first run was trained in.
      to_write: the model is to write text, for which a looped one is faster on a CPU.
      template_options: of the chat template, NAME=VALUE, after those that the first run was trained with.
      together: the adapters are to go into one program, and their folders may not name different bases.

    Raises:
      ValueError: a folder has no such checkpoint, it is damaged or another base's, or there is no such model.
    """
    looped = to_write and jax.default_backend() == "cpu"
    opened = [open_adapters(folder, step=parse_step(step)) for folder in runs]
    if together:
        check_same_base(opened)
    first = opened[0].settings if opened else {}
    others = [one.source for one in opened if model is None and one.settings.get("model") != first.get("model")]
    if others:
        raise ValueError(f"{others[0]} was trained on another model than {runs[0]}: say with --model where theirs is")
    if opened:
        base = load_base(opened[0], model, dtype=dtype or first.get("dtype", "float32"))
    else:
        its = dtype or "float32"
        base = load_model(model, scan_layers=not looped, param_dtype=its, dtype=its)
    kept = [one.tokenizer for one in opened]
    for one in opened[1:]:
        if not same_tokenizer(kept[0], one.tokenizer):
            raise ValueError(f"{one.source} has another tokenizer than {runs[0]}: take them one at a time")
    base = base.with_template_options(parse_options([*first.get("template_option", []), *template_options]))
    loras, loaded = list[Lora](), []
    attached = [attach(one, base) for one in opened]
    if untied := [one.model for one in attached if one.model is not base]:
        base = untied[0]  # a head of its own, of which all are then to know
        attached = [attach(one, base) for one in opened]
    for folder, one, (lora, variables, adapters, *_) in zip(runs, opened, attached, strict=True):
        known = next((other for other in loras if _same_shapes(other, lora)), lora)
        loras.append(known)
        its_step = int(one.source.name) if one.source.parent.name == "checkpoints" else None
        loaded.append(
            Run(folder, its_step, lora.config, known, variables, _rescaled(adapters, lora, known), one.settings)
        )
    at = folder_of(place_of_base(opened[0], model) if opened else model)
    found = LoadedRuns(base.family, base.config, base.variables, base.tokenizer, tuple(loaded), first, at)
    return unrolled(found) if looped and getattr(base.config, "scan_layers", False) else found


def unrolled(loaded: LoadedRuns) -> LoadedRuns:
    """Give the same with a program for each layer in place of a scan."""
    config = dataclasses.replace(loaded.config, scan_layers=False)
    variables = unstack_layers(loaded.variables)
    apply, tokens = loaded.family.build(config).apply, jax.ShapeDtypeStruct((1, 8), "int32")
    loras: dict[int, Lora] = {}

    def one(run: Run) -> Run:
        its, adapters = unstack_adapters(run.lora, run.adapters)
        own = variables if run.variables is loaded.variables else unstack_layers(run.variables)
        if id(run.lora) not in loras:
            loras[id(run.lora)] = wrap(apply, own, tokens, config=its)
        return dataclasses.replace(run, lora=loras[id(run.lora)], variables=own, adapters=adapters)

    runs = tuple(map(one, loaded.runs))
    return dataclasses.replace(loaded, config=config, variables=variables, runs=runs)


def program(loaded: LoadedRuns, run: Run | None, *, merged: bool = False) -> tuple[Callable[..., Any], Any]:
    """Give (apply, variables) of a run, or of the base: `apply(variables, tokens, ...)` is the model.

    With adapters the variables are (base, adapters). The base beside runs goes by the first one's program, with
    adapters as they start, which change nothing: nothing more is compiled.
    """
    if merged and run:
        model = merge_model(
            Model(loaded.config, run.variables, loaded.tokenizer, loaded.family), run.lora, run.adapters
        )
        return model.apply, model.variables
    if run:
        return _adapted(run.lora), (run.variables, run.adapters)
    if loaded.runs:
        first = loaded.runs[0]
        return _adapted(first.lora), (loaded.variables, first.lora.init(jax.random.key(0), loaded.variables))
    return apply_of(loaded.family.build(loaded.config), loaded.variables), loaded.variables


@functools.lru_cache(maxsize=8)
def _adapted(lora: Lora) -> Callable[..., Any]:
    """Give `lora.apply` as a function of ((base, adapters), ...), the same one for the same `Lora`."""

    def apply(both: Any, *args: Any, **kwargs: Any) -> Any:
        return lora.apply(*both, *args, **kwargs)

    return apply


def _same_shapes(one: Lora, other: Lora) -> bool:
    """Say whether two have the same adapters, but for what their factors are."""

    def unscaled(lora: Lora) -> list[Any]:
        layers = {path: tuple(layer.rank for layer in site.layers) for path, site in lora.sites.items()}
        return [layers, *(dataclasses.replace(s, alpha=1.0, gamma=1.0, layers=()) for s in lora.sites.values())]

    return unscaled(one) == unscaled(other) and one.config.dtype == other.config.dtype


def _rescaled(adapters: Mapping[str, Any], lora: Lora, other: Lora) -> Adapters:
    """Give adapters that do in another `Lora` what these do in theirs: gamma is in the program.

    The same numbers where the gammas are the same.
    """
    gammas = {path: [of.sites[path].by_layer(lambda layer: layer.gamma) for of in (lora, other)] for path in lora.sites}
    ratio = {path: np.asarray(one / another, np.float32) for path, (one, another) in gammas.items()}
    return {
        path: dict(own) if (ratio[path] == 1).all() else with_update_times(lora.sites[path], own, ratio[path])
        for path, own in adapters.items()
    }
