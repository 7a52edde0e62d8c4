"""The commands of `rslora`, a file each, which holds its flags and what it does, as a `Command`.

To add one, write such a file and enter it in `COMMANDS` of `rslora_jax.cli`.
"""
