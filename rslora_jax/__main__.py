"""`python -m rslora_jax` is the command `rslora`."""

import sys

from rslora_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
