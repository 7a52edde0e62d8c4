"""Write docs/adapted/README.md: what is adapted, what is not, and how you see it, from the list that the tests run.

    python scripts/adapted_table.py            # writes the page
    python scripts/adapted_table.py --check    # says whether it is up to date

Every row is a program of tests/accounted.py; what it says became of it is what wrapping it gives on this machine.
"""

import argparse
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import rslora_jax as rslora
from tests.accounted import ENTRIES, PARAMS, Entry

PAGE = Path(__file__).parent.parent / "docs/adapted/README.md"
HEAD = """# What is adapted, what is not, and how you see it

A weight is found by how the program uses it, not by its name. Every parameter on which the outputs depend is in one of
two places, and what no output depends on is in a third:

| place | what is in it |
|---|---|
| `lora.sites` | the adapted weights: axes, rank, gamma, and in `fallbacks` where the sum W + γ A B is formed |
| `lora.left_out` | every other parameter, with the reason |
| `lora.unused` | the parameters on which no output depends |

`print(lora)` shows all three; `rslora train` prints it before a run. An `RsloraWarning` says what costs memory (a sum
that is formed), and what the default targets would have taken and could not; it holds the line to write, such as
`LoraConfig(axes={"w": ("in", "out")})`. Stated axes are taken as they are: the weight is then adapted wherever it is
used, and where that has no low-rank form, the sum is formed. `on_fallback="error"` refuses that.

What follows is made by `python scripts/adapted_table.py` from the programs that the tests run (`tests/accounted.py`),
with the default targets and rank 3. `x` is the data, (5, 12); the rest are parameters, unless the row says otherwise:
"""


def outcome(entry: Entry) -> tuple[str, str]:
    """Return what became of a program's parameters, and what was said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        config = rslora.LoraConfig(rank=3, alpha=7)
        lora = rslora.wrap(entry.fn, entry.params, *entry.args, config=config)
    parts = []
    for name, site in lora.sites.items():
        formed = f", the sum formed in {' and '.join(f'`{f}`' for f in site.fallbacks)}" if site.fallbacks else ""
        cut = " of rank 1, its own" if site.rank == 1 else ""
        parts.append(f"`{name}` adapted{cut}{formed}")
    parts += [f"`{name}` left out: {why}" for name, why in lora.left_out.items()]
    return "; ".join(parts), "yes" if any(w.category is rslora.RsloraWarning for w in said) else ""


def page() -> str:
    shapes = ", ".join(f"`{name}` {shape}" for name, shape in PARAMS.items())
    lines = [HEAD + shapes + ".\n"]
    for group in dict.fromkeys(entry.group for entry in ENTRIES):
        lines += [f"\n## {group}\n\n| program | what becomes of it | warning |\n|---|---|---|\n"]
        for entry in (e for e in ENTRIES if e.group == group):
            became, said = outcome(entry)
            code = entry.code.replace("|", "\\|")
            given = f" ({', '.join(f'`{name}`' for name in entry.data)} an argument)" if entry.data else ""
            lines.append(f"| `{code}`{given} | {became} | {said} |\n")
    return "".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the page that is there, and write nothing")
    check = parser.parse_args().check
    text = page()
    if check:
        current = PAGE.read_text() == text
        print(f"{PAGE.name} is {'up to date' if current else 'out of date: run scripts/adapted_table.py'}")
        return 0 if current else 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text)
    print(f"wrote {PAGE} ({len(ENTRIES)} programs)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
