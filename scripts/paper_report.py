"""Write docs/paper/README.md from the measured numbers: each claim of the rsLoRA paper, and whether it holds here.

    python scripts/paper_report.py                          # from what is in docs/paper
    python scripts/paper_report.py --from runs/gsm8k        # take a sweep's trials into docs/paper first

The numbers are those of scripts/stability.py (stability_fits.csv), scripts/activation_moments.py (activations.csv) and
scripts/rank_sweep.py (sweep-*.jsonl, from which the sweep's CSVs and pictures are made here). What has no numbers is
said to be unmeasured.
"""

import argparse
import csv
import shutil
import sys
from pathlib import Path
from typing import Any

from paper import claims, figures, maps, store, transfer
from paper.plan import Grid

DOCS = Path(__file__).parent.parent / "docs" / "paper"
TITLES = {"all": "All linear layers", "attention": "Attention only", "docstrings": "Docstrings of Python"}
ORDER = ("rslora", "lora", "quarter", "square", "constant", "init-only")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="taken", type=Path, action="append", default=[], help="a sweep's --out folder")
    parser.add_argument("--rule", type=Path, help="the --out folder of trials at the rates of rslora_jax.train.rates")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder of CSVs, pictures and README.md")
    a = parser.parse_args(argv)
    try:
        for folder in a.taken:
            take(folder / "trials.jsonl", a.docs)
        if a.rule:
            take(a.rule / "trials.jsonl", a.docs, "rule")
        text = report(a.docs)
    except (OSError, ValueError) as error:
        print(f"paper_report: error: {error}", file=sys.stderr)
        return 1
    (a.docs / "README.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def take(file: Path, docs: Path, name: str | None = None) -> None:
    """Copy a sweep's trials, named after its data if they are the built-in ones, else after what has adapters."""
    if not file.is_file():
        raise ValueError(f"{file} is no file: run scripts/rank_sweep.py --out {file.parent}")
    settings = store.read_settings(file)
    name = name or ("docstrings" if settings["data"] == "docstrings" else settings["layers"])
    shutil.copyfile(file, docs / f"sweep-{name}.jsonl")


def report(docs: Path) -> str:
    """Return the report on what a folder holds; make the CSVs and pictures that it refers to."""
    fits = list(csv.DictReader((docs / "stability_fits.csv").open(encoding="utf-8")))
    files = {name: docs / f"sweep-{name}.jsonl" for name in (*TITLES, "rule")}
    sweeps = {name: store.load(file) if file.is_file() else {} for name, file in files.items()}
    activations = docs / "activations.csv"
    moments = list(csv.DictReader(activations.open(encoding="utf-8"))) if activations.is_file() else []
    rows = claims.all_claims(fits, sweeps, moments)
    lines = [
        "# The paper, measured here",
        "",
        "Made by `python scripts/paper_report.py` from the numbers beside it. Claims: those of arXiv 2312.03732.",
        "The model here is small (SmolLM2-135M) and the runs are short: a claim may hold there and not here. Seeds are",
        "compared in pairs (of the same batches); of several, a difference is one beyond two standard errors. Of three",
        "seeds that is a confidence of 82 %; 95 % would take 4.3 of them (Student's t, two degrees of freedom). Ranks",
        "coincide where the perplexities that they end training with are within 1 %.",
        "",
        "| claim | measured here | holds here |",
        "|---|---|---|",
        *(f"| {row.claim} | {row.measured} | {row.verdict} |" for row in rows),
        "",
    ]
    for name in TITLES:
        if sweeps[name]:
            lines += section(docs, name, sweeps[name], sweeps["rule"])
    if moments:
        lines += ["## Moments of the adapters' outputs", "", "![activations](activations.png)", ""]
    lines += ["How the sweep works and what its files hold: [sweep.md](sweep.md).", ""]
    return "\n".join(lines)


def section(docs: Path, name: str, done: Any, rule: Any) -> list[str]:
    """Return the part on one sweep: its settings, tables and pictures, which are drawn."""
    settings = store.read_settings(docs / f"sweep-{name}.jsonl")
    grid = grid_of(done)
    store.write_csv(docs / f"sweep-{name}.csv", done)
    pictures = maps.draw_all(f"{docs}/sweep-{name}-", grid, done)
    about = (
        f"{settings['steps']} steps of {settings['batch_size']} rows of at most {settings['max_len']} tokens, constant "
        f"learning rate, alpha {settings['alpha']:g}, {settings['heldout']} held-out examples, {len(done)} trials "
        f"so far: [numbers](sweep-{name}.csv), [with curves](sweep-{name}.jsonl)."
    )
    return [
        f"## {TITLES[name]}",
        "",
        about,
        "",
        figures.table(grid, done),
        *best_rates(grid, done),
        *(transfer.transfer_table(done, rule) if name == "all" else []),
        *(f"![{picture.stem}]({picture.name})\n" for picture in pictures),
    ]


def best_rates(grid: Grid, done: Any) -> list[str]:
    """Return the table of best rates, where more than two were tried."""
    if all(len(rates) < 3 for rates in grid.rates.values()):
        return []
    said = (
        "Best rate by rank, between the rates tried (*: at an edge of them), and its exponent, of three ranks or more "
        "with a 95 % interval. A rate whose neighbour blew up is that of the grid itself, known to a step of it alone "
        "(with SGD a factor of two), and the interval knows nothing of that:"
    )
    return [said, "", maps.rate_table(grid, done)]


def grid_of(done: Any) -> Grid:
    """Return the grid that trials are part of."""

    def of(name):
        return sorted({getattr(spec, name) for spec in done})

    optimizers = of("optimizer")
    rates = {o: sorted({s.rate for s in done if s.optimizer == o and s.seed == 0}) for o in optimizers}
    scalings = [name for name in ORDER if name in of("scaling")]
    return Grid(optimizers, of("rank"), scalings, rates, 1 + max(of("seed")))


if __name__ == "__main__":
    sys.exit(main())
