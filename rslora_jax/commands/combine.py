"""`rslora combine`: make one adapter of several."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rslora_jax.commands.command import FOR_MODELS, Command
from rslora_jax.commands.export_peft import name_for_peft
from rslora_jax.commands.flags import add_flag, shared
from rslora_jax.commands.new_run import settings_of, write_run
from rslora_jax.commands.output import model_name, whether_written, writing
from rslora_jax.commands.tables import print_table
from rslora_jax.several.combine import METHODS, norm_of_sum


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="of runs, of their checkpoints, or of PEFT")
    shared(parser, "--out", required=True, text="folder to make")
    add_flag(parser, "--to", "run", "what to make: a run's folder, or one for PEFT", choices=("run", "peft"))
    weights = "a number for each folder, such as 0.7,-0.3 (default: an equal share of 1)"
    add_flag(parser, "--weights", None, weights, metavar="W,W", type=_numbers)
    how = parser.add_argument_group("method")
    what = "the way: cat is the sum of the updates, svd the nearest of a rank"
    add_flag(how, "--method", "svd", what, choices=METHODS, metavar="METHOD")
    rank = "of svd and what ends in it, the rank (default: the largest of all)"
    add_flag(how, "--rank", None, rank, metavar="R", type=int, least=1)
    density = "of ties, dare and magnitude_prune, the part of entries that each keeps"
    add_flag(how, "--density", None, density, metavar="X", type=float, above=0, most=1)
    sign = "of ties, whether a sign is elected by the sum, or by how many there are of each"
    add_flag(how, "--majority-sign", "total", sign, choices=("total", "frequency"))
    add_flag(how, "--seed", 0, "of dare, seed of what is dropped", metavar="N", least=0)
    base = parser.add_argument_group("base")
    shared(base, "--model")
    shared(base, "--step", text="which checkpoint of each run (default: the last)")
    name = "what a folder for PEFT is to call its base (default: the run's model)"
    add_flag(base, "--base-model", None, name, metavar="NAME")


def _numbers(text: str) -> list[float]:
    """Read numbers with commas between them.

    >>> _numbers("0.7,-0.3")
    [0.7, -0.3]
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise argparse.ArgumentTypeError(f"{text} are not numbers with commas between them")
    return found


def combine(a: argparse.Namespace) -> int:
    """Run `rslora combine`."""
    import jax

    from rslora_jax.interop.adapter_folder import attach_alone, load_base, open_adapters, parse_step, place_of_base
    from rslora_jax.interop.new_folder import check_free
    from rslora_jax.interop.same_base import check_same_base
    from rslora_jax.several import combine

    _check_flags(a)
    check_free(a.out)
    opened = [open_adapters(folder, step=parse_step(a.step)) for folder in a.folders]
    check_same_base(opened)
    tokenizer = _tokenizer_of(opened)
    # A run tells how the layers of its base lay.
    first = next((one for one in opened if one.peft is None), opened[0])
    model = place_of_base(first, a.model)
    print(f"reading {model_name(model)}", flush=True)
    base = load_base(first, a.model, text=False)
    pairs = [(one.lora, one.adapters) for one in (attach_alone(each, base) for each in opened)]
    weights = a.weights or [1 / len(pairs)] * len(pairs)
    how = {"rank": a.rank, "density": a.density, "majority_sign_method": a.majority_sign}
    key = jax.random.key(a.seed) if "dare" in a.method else None
    lora, adapters = combine(pairs, weights, a.method, params=base.variables, key=key, **how)
    _print_sizes(a.folders, [*pairs, (lora, adapters)], weights)
    if a.to == "run":
        more = {"combined": [str(Path(folder).absolute()) for folder in a.folders], "weights": weights}
        more |= {name: value for name, value in first.settings.items() if name == "template_option"}
        settings = settings_of(lora.config, model, first.settings.get("param_dtype", "float32"), **more)
        write_run(a.out, lora.config, base.variables, adapters, settings, tokenizer)
    else:
        _write_peft(a, lora, adapters, base.family.names, a.base_model or name_for_peft(model), tokenizer)
    print(f"wrote {a.out}: {lora.num_parameters:,} numbers in {len(lora.sites)} adapters, by {a.method}")
    return 0


def _check_flags(a: argparse.Namespace) -> None:
    """Raise a ValueError for flags that do not go together, before anything is read."""
    if a.weights and len(a.weights) != len(a.folders):
        raise ValueError(f"--weights has {len(a.weights)} numbers for {len(a.folders)} folders: give one for each")
    prunes = a.method not in ("linear", "cat", "svd")
    if prunes and a.density is None:
        raise ValueError(f"--method {a.method} prunes: say with --density which part is kept, such as 0.5")
    if a.density is not None and not prunes:
        raise ValueError(f"--method {a.method} prunes nothing: leave out --density")
    if a.rank is not None and not a.method.endswith("svd"):
        raise ValueError(f"--method {a.method} has a rank of its own: leave out --rank, or take a method with svd")
    if a.base_model and a.to != "peft":
        raise ValueError("--base-model is what a folder for PEFT calls its base: give --to peft too")


def _tokenizer_of(opened: Sequence[Any]) -> Path | None:
    """Return the tokenizer's folder that those adapters share that have one."""
    from rslora_jax.interop.own_tokenizer import same_tokenizer

    own = [one for one in opened if one.tokenizer is not None]
    for one in own[1:]:
        if not same_tokenizer(own[0].tokenizer, one.tokenizer):
            raise ValueError(
                f"{one.source} has another tokenizer than {own[0].source}: combine adapters that share one"
            )
    return own[0].tokenizer if own else None


def _print_sizes(folders: Sequence[str], pairs: Sequence[tuple[Any, Any]], weights: Sequence[float]) -> None:
    """Print how large each update is, and the combined one, the last of the pairs."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="", show_footer=False)
    table.add_column("adapter", no_wrap=True)
    for title in ("weight", "weights adapted", "rank", "‖γAB‖"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, (lora, adapters), weight in zip([*folders, "combined"], pairs, [*weights, None], strict=True):
        ranks = sorted({site.rank for site in lora.sites.values() if site.scaled})
        rank = " to ".join(map(str, dict.fromkeys([*ranks[:1], *ranks[-1:]])))
        shown = "" if weight is None else f"{weight:g}"
        count = sum(site.scaled for site in lora.sites.values())
        table.add_row(name, shown, str(count), rank, f"{norm_of_sum([(lora, adapters)], [1.0]):.3g}")
    print_table(table)
    if values := [path for path, site in pairs[-1][0].sites.items() if not site.scaled]:
        print(f"beside these, trained whole or by rows: {len(values)}, first {values[0]}")
    of_all = norm_of_sum(pairs[:-1], weights)
    off = norm_of_sum(pairs, [*(-weight for weight in weights), 1.0])
    said = f", from which the combined one differs by {off / of_all:.2g} of that" if of_all else ""
    print(f"the weighted sum of the updates has ‖ΣwγAB‖ {of_all:.3g}{said}")


def _write_peft(a: argparse.Namespace, lora: Any, adapters: Any, names: Any, base: str | None, tokenizer: Any) -> None:
    from rslora_jax.interop import peft

    with writing(a.out):
        peft.save_peft(a.out, lora, adapters, names, base_model=base, tokenizer=tokenizer)


COMMAND = Command(
    name="combine",
    summary="make one adapter of several of one base",
    description="Combine adapters of one base into one, each weight by its own scale gamma, and show how large each "
    "update is.",
    examples=(
        (
            "rslora combine my-run other-run --weights 0.7,0.3 --method svd --rank 16 --out both",
            "The nearest of rank 16 to 0.7 times one update and 0.3 times the other.",
        ),
        (
            "rslora combine my-run peft-adapter --weights 1,-0.5 --method cat --out both",
            "Exactly that sum; the ranks add up. A weight may be negative, and a folder PEFT's.",
        ),
        (
            "rslora combine one-run two-run three-run --method ties --density 0.3 --to peft --out for-peft",
            "By TIES, of each the largest 30 % of the entries; for PEFT.",
        ),
    ),
    note="linear, ties, dare_linear, dare_ties and magnitude_prune take A and B each for itself, as PEFT does, which "
    "is quick and rough; with _svd behind they take whole updates.",
    add_flags=_add_flags,
    run=combine,
    needs=FOR_MODELS,
    left=whether_written,
)
