"""What `rslora train` says of a run that is over."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def outcome(result: Any) -> str:
    """Say what became of the held-out perplexity, and which checkpoint has the least."""
    (_, first), *_, (step, final) = result.heldout.items()
    text = f"held-out perplexity {first:.2f} before, {final:.2f} after {step} steps"
    if result.early:
        text += ", where it had stopped falling"
    best = min(result.heldout, key=result.heldout.__getitem__)
    return text if best == step else f"{text}; the least was {result.heldout[best]:.2f}, at step {best}, which is kept"


def sizes(out: Path, adapters: Any, variables: Any) -> str:
    """Say how large the last checkpoint is beside the base."""
    import jax

    from rslora_jax.store import checkpoint

    last = out / "checkpoints" / str(checkpoint.steps_in(out)[-1])
    whole, alone = (checkpoint.size_of(path) / 1e6 for path in (last, last / "adapters"))
    base = sum(leaf.nbytes for leaf in jax.tree.leaves(variables)) / 1e6
    return f"a checkpoint takes {whole:.1f} MB (adapters {alone:.1f} MB); the base model, not in it, {base:.1f} MB"


def peak_memory() -> str:
    """Say how much memory the process held at most, where the system tells."""
    try:
        import resource
    except ImportError:
        return ""
    unit = 1 if sys.platform == "darwin" else 1024
    return f", at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.1f} GB of memory"
