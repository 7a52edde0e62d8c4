"""Flags of `rslora train` by the names that users of PEFT, TRL, axolotl, unsloth and torchtune know them by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# What means the same: another's name, and ours.
SAME: Mapping[str, str] = {
    **dict.fromkeys(("lr", "peak-lr"), "learning-rate"),
    **dict.fromkeys(("r", "lora-r", "lora-rank"), "rank"),
    "lora-alpha": "alpha",
    "lora-dropout": "dropout",
    **dict.fromkeys(("target-modules", "lora-target-modules"), "targets"),
    **dict.fromkeys(("exclude-modules",), "exclude"),
    **dict.fromkeys(("modules-to-save", "lora-modules-to-save"), "trained"),
    **dict.fromkeys(("model-name-or-path", "base-model", "model-name"), "model"),
    **dict.fromkeys(("dataset", "train-file", "data-path"), "data"),
    **dict.fromkeys(("eval-file", "validation-file", "eval-dataset", "val-data"), "eval-data"),
    **dict.fromkeys(("max-length", "max-seq-length", "max-seq-len", "sequence-len", "cutoff-len"), "max-len"),
    "max-steps": "steps",
    **dict.fromkeys(("num-train-epochs", "num-epochs", "epoch"), "epochs"),
    **dict.fromkeys(("output-dir", "output"), "out"),
    "warmup-ratio": "warmup",
    **dict.fromkeys(("lr-scheduler-type", "lr-scheduler"), "schedule"),
    **dict.fromkeys(("optim",), "optimizer"),
    **dict.fromkeys(("max-grad-norm", "gradient-clipping"), "clip"),
    "eval-steps": "eval-every",
    "save-steps": "save-every",
    "save-total-limit": "keep",
    "loraplus-lr-ratio": "lora-plus",
    "resume-from-checkpoint": "resume",
}

# What would be misread: another's name, and what is meant here.
OTHERWISE: Mapping[str, str] = {
    **dict.fromkeys(
        ("per-device-train-batch-size", "micro-batch-size"),
        "--batch-size counts the rows of a whole step, and --accumulate in how many parts it is taken: 2 rows with 4 "
        "steps of accumulation are --batch-size 8 --accumulate 4",
    ),
    "gradient-accumulation-steps": "--accumulate N takes the --batch-size rows of a step in N parts, and does not "
    "multiply them: 2 rows with 4 steps of accumulation are --batch-size 8 --accumulate 4",
    "warmup-steps": "--warmup is the part of the steps in which the rate rises: 10 of 100 steps are --warmup 0.1",
    "weight-decay": "it is an option of the optimiser: --optimizer-option weight_decay=0.01",
    "gradient-checkpointing": "--remat full computes activations again, and the default --remat products some of them",
    "load-in-4bit": "--quantize nf4 rounds the base to 4 bits as it is read",
    "load-in-8bit": "--quantize int8 rounds the base to 8 bits as it is read",
    "use-rslora": "alpha/sqrt(r) is what --scaling does by default; alpha/r is --scaling lora",
    "use-dora": "that is --method dora",
    "init-lora-weights": "--init uniform or gaussian says how A is drawn, and --start has pissa, olora, eva and loftq",
    "packing": "rows of --max-len tokens are always packed, and documents in them do not see each other",
    "fp16": "float16 is not trained in: --bf16 computes in bfloat16",
    "bias": 'give --trained "*/bias"',
    "report-to": "--tensorboard writes event files",
}


def in_our_words(argv: Sequence[str], flags: Sequence[str], is_train: bool = True) -> list[str]:
    """Write a command line with the names that its flags have here, with underscores or as others call them.

    Args:
      argv: the command line behind the command.
      flags: the command's own, which go first.
      is_train: whether it is `rslora train`, whose flags others have names for.

    Raises:
      ValueError: a flag of another program would be misread; says what is meant here.

    >>> in_our_words(["--lr", "3e-4", "--max_steps=7", "--rank", "8"], ["--learning-rate", "--steps", "--rank"])
    ['--learning-rate', '3e-4', '--steps=7', '--rank', '8']
    """
    found = []
    for argument in argv:
        flag, equals, value = argument.partition("=")
        if not flag.startswith("--") or flag in flags:
            found.append(argument)
            continue
        name = flag[2:].replace("_", "-")
        if is_train and f"--{name}" not in flags and name in OTHERWISE:
            raise ValueError(f"{flag} is not of `rslora train`: {OTHERWISE[name]}")
        ours = name if f"--{name}" in flags else SAME.get(name, name)
        found.append(f"--{ours}{equals}{value}" if f"--{ours}" in flags else argument)
    return found


def our_name(name: str) -> str:
    """Return what a key of a file of settings is called here.

    >>> our_name("lora_r"), our_name("rank")
    ('rank', 'rank')
    """
    name = name.lstrip("-").replace("_", "-")
    return SAME.get(name, name)
