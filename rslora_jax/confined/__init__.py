"""What the files of strangers make a program do, done by processes whose time and memory have a limit.

A chat template and a regular expression are programs, and a Parquet file says how much its unpacking takes. `process`
asks; `child` is the main program of the process that answers, with one of the files beside it.
"""

from rslora_jax.confined.process import Confined, Exceeded, ask

__all__ = ["Confined", "Exceeded", "ask"]
