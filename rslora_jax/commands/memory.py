"""Flags of `rslora train` that say what is held in memory, checked before anything is read."""

from __future__ import annotations

import argparse
import sys


def check_memory(a: argparse.Namespace) -> None:
    """Refuse what is no policy of remat; say where "offload" can save nothing.

    Raises:
      ValueError: `--remat` is unknown; says what comes close.
    """
    import jax

    from rslora_jax.models.remat import check_remat

    check_remat(a.remat)
    if a.remat == "offload" and jax.default_backend() == "cpu":
        print(
            "rslora: warning: --remat offload keeps activations in the host's memory, which is a CPU's own: it takes "
            "what --remat full takes",
            file=sys.stderr,
        )
