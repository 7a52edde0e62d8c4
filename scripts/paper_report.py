"""Write docs/paper/README.md from the measured numbers: each claim of the rsLoRA paper, and whether it holds here.

    python scripts/paper_report.py                          # from docs/paper/*.csv
    python scripts/paper_report.py --from runs/gsm8k        # take a sweep's results and pictures into docs/paper first

The CSVs are written by scripts/stability.py and scripts/rank_sweep.py. What has no numbers is said to be unmeasured.
"""

import argparse
import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from paper import claims, figures, maps
from paper.plan import Grid
from paper.store import read_csv

DOCS = Path(__file__).parent.parent / "docs" / "paper"
ORDER = ("rslora", "lora", "quarter", "square", "constant", "init-only")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="taken", type=Path, action="append", default=[], help="a sweep's --out folder")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder of CSVs, pictures and README.md")
    a = parser.parse_args(argv)
    for folder in a.taken:
        if not (folder / "results.csv").is_file():
            print(f"paper_report: error: {folder} has no results.csv: run scripts/rank_sweep.py there", file=sys.stderr)
            return 1
        take(folder, a.docs)
    text = report(a.docs)
    (a.docs / "README.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def take(folder: Path, docs: Path) -> None:
    """Copy a sweep's settings, results and pictures, named after what has adapters in it."""
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    name = f"sweep-{settings['layers']}"
    for source, target in (("results.csv", f"{name}.csv"), ("settings.json", f"{name}.json")):
        shutil.copyfile(folder / source, docs / target)
    for picture in folder.glob("*.png"):
        shutil.copyfile(picture, docs / f"{name}-{picture.name}")


def report(docs: Path) -> str:
    """Return the report on what a folder of CSVs holds."""
    fits = list(csv.DictReader((docs / "stability_fits.csv").open(encoding="utf-8")))
    sweeps = {name: read_csv(docs / f"sweep-{name}.csv") for name in ("all", "attention")}
    rows = claims.all_claims(fits, sweeps)
    lines = [
        "# The paper, measured here",
        "",
        "Made by `python scripts/paper_report.py` from the CSVs beside it. The claims are those of arXiv 2312.03732.",
        "The model here is small (SmolLM2-135M) and the runs are short: a claim may hold there and not here.",
        "",
        "| claim | measured here | holds here |",
        "|---|---|---|",
        *(f"| {row.claim} | {row.measured} | {row.verdict} |" for row in rows),
        "",
    ]
    for name, done in sweeps.items():
        if done:
            lines += section(docs, name, done)
    lines += ["How the sweep works and what its files hold: [sweep.md](sweep.md).", ""]
    return "\n".join(lines)


def section(docs: Path, name: str, done: Any) -> list[str]:
    """Return the part on one sweep: its settings, tables and pictures."""
    settings = json.loads((docs / f"sweep-{name}.json").read_text(encoding="utf-8"))
    grid = grid_of(done)
    about = (
        f"{settings['steps']} steps of {settings['batch_size']} rows of at most {settings['max_len']} tokens, constant "
        f"learning rate, alpha {settings['alpha']:g}, {settings['heldout']} held-out examples, {len(done)} trials "
        "so far."
    )
    title = {"all": "All linear layers", "attention": "Attention only"}[name]
    pictures = sorted(docs.glob(f"sweep-{name}-*.png"))
    return [
        f"## {title}",
        "",
        about,
        "",
        figures.table(grid, done),
        *best_rates(grid, done),
        *(f"![{picture.stem}]({picture.name})\n" for picture in pictures),
    ]


def best_rates(grid: Grid, done: Any) -> list[str]:
    """Return the table of best rates, where more than two were tried."""
    if all(len(rates) < 3 for rates in grid.rates.values()):
        return []
    said = "Best rate by rank, between the rates tried (*: at an edge of them), and its exponent with a 95 % interval:"
    return [said, "", maps.rate_table(grid, done)]


def grid_of(done: Any) -> Grid:
    """Return the grid that trials are part of."""
    of = lambda name: sorted({getattr(spec, name) for spec in done})
    optimizers = of("optimizer")
    rates = {o: sorted({s.rate for s in done if s.optimizer == o and s.seed == 0}) for o in optimizers}
    scalings = [name for name in ORDER if name in of("scaling")]
    return Grid(optimizers, of("rank"), scalings, rates, 1 + max(of("seed")))


if __name__ == "__main__":
    sys.exit(main())
