"""The commands of `rslora`, a file each: `add(commands)` gives its flags, `run(arguments)` does it."""
