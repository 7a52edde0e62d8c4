"""`rslora train`: fine-tune a model with adapters."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rslora_jax.commands import run_data, settings
from rslora_jax.commands.answers import answerer, show_answers
from rslora_jax.commands.command import FOR_MODELS, Command, check_installed, default_arguments
from rslora_jax.commands.devices import Placement, base_shardings, check_attention, join_processes, place, placed_apply
from rslora_jax.commands.flags import Number, pairs
from rslora_jax.commands.memory import check_memory
from rslora_jax.commands.new_tokens import keep_new_tokens, placed, with_new_tokens
from rslora_jax.commands.output import model_name
from rslora_jax.commands.plan import settle_parts, show_plan
from rslora_jax.commands.start import Begun, begin, check_start, read_dense, share_ranks
from rslora_jax.commands.train_end import outcome, peak_memory, sizes
from rslora_jax.commands.train_flags import add_flags
from rslora_jax.terminal import one_line

# What is said of new adapters, by flags of the names that `LoraConfig` has.
_OF_NEW = (
    *("rank", "alpha", "scaling", "targets", "exclude", "rank_pattern", "alpha_pattern", "trained", "method"),
    *("init", "allow_large_rank"),
)


def train(a: argparse.Namespace) -> int:
    """Run `rslora train`."""
    begun = time.monotonic()
    if a.distributed:
        join_processes(a.distributed)

    import jax

    from rslora_jax.train import NonFiniteLoss

    if a.bf16:
        a.dtype = a.param_dtype = "bfloat16"
    _check_flags(a)
    placement = place(a.mesh, a.batch_size)
    _make_optimizer(a), _config_of(a)  # refused before all else
    start = _open_start(a)
    chosen = run_data.choose(a)
    base, rows = with_new_tokens(a, _read_base(a, start, placement), placement)
    lora, found = _wrap(a, base, start, placement, rows)
    data = run_data.prepare(a, base, chosen, placement)
    settings.settle_steps(a, data.steps_an_epoch)
    lora = share_ranks(a, lora, base.variables, data, placement)
    optimizer = _make_optimizer(a, lora)
    if a.plan:
        return show_plan(a, lora, begin(a, lora, base, found, data, placement, rows), data, optimizer, placement)
    print(lora, flush=True)
    _keep_tokens(a, base, start, rows)
    # Of several processes none holds the whole of what the model writes.
    shown = data.shown if jax.process_count() == 1 else []
    answers = answerer(base, shown, max_len=a.max_len)
    before = answers(base)
    show_answers(shown, {"base model": before})
    first = begin(a, lora, base, found, data, placement, rows)
    base = first.base  # which a start may have changed
    try:
        result = _fit(a, lora, first, data, optimizer, placement, chosen.record)
    except NonFiniteLoss as error:
        print(f"rslora: error: {one_line(str(error))}", file=sys.stderr)
        return 1
    print(f"wrote {a.out}/checkpoints, {a.out}/metrics.jsonl and {a.out}/loss.png")
    if result.saved:
        print(sizes(Path(a.out), result.adapters, base.variables))
    if result.signal:
        print(f"stopped before step {a.steps}; {_what_is_left(a)}")
        return 128 + result.signal
    after = answers(base, lora, result.adapters)
    show_answers(shown, {"before": before, "after": after})
    return _conclude(a, result, time.monotonic() - begun)


def _check_flags(a: argparse.Namespace) -> None:
    """Raise a ValueError for flags that cannot be, before anything is read."""
    import jax

    from rslora_jax.interop.held import check_held
    from rslora_jax.parallel import processes

    if a.accumulate != "auto" and a.batch_size % a.accumulate:
        raise ValueError(f"--batch-size {a.batch_size} is not a multiple of --accumulate {a.accumulate}")
    if jax.process_count() > 1 and not a.mesh:
        raise ValueError("several processes need a mesh that says how they share the work: give --mesh data=-1")
    if not a.resume:  # of which one is the run's own, and the other is told from it below
        check_held(a.dequantize, a.quantize)
    settings.check_length(a)
    check_start(a)
    check_attention(a.attention)
    check_memory(a)
    if a.tensorboard:
        check_installed("--tensorboard", ("tensorboardX",), extra="tensorboard")
    processes.first_decides(lambda: _check_out(a))
    if a.resume or a.override:
        processes.first_decides(lambda: settings.check_course(a))


def _check_out(a: argparse.Namespace) -> None:
    """Raise a ValueError where a run cannot be written."""
    from rslora_jax.store.folder import check_folder, check_writable

    check_folder(Path(a.out), resume=a.resume)
    for folder in filter(None, (a.out, a.cache)):
        check_writable(folder)


def _make_optimizer(a: argparse.Namespace, lora: Any = None) -> Any:
    """Make the optimiser that the flags describe."""
    import optax

    from rslora_jax.train import frozen, lora_plus, low_moments, optimizers

    how: dict[str, Any] = {"schedule": _make_schedule(a), "clip": a.clip, "lora": lora}
    made = optimizers.make_optimizer(a.optimizer, options=optimizers.parse_options(a.optimizer_option), **how)
    if lora is None:
        return made
    made = frozen(lora, made, *a.freeze) if a.freeze else made
    made = optax.chain(made, lora_plus(lora, a.lora_plus)) if a.lora_plus != 1 else made
    return low_moments(made, a.moments)


def _make_schedule(a: argparse.Namespace) -> Callable[[Any], Any]:
    """Make the learning rate of each step that the flags describe."""
    from rslora_jax.train import optimizers

    return optimizers.make_schedule(a.schedule, peak=a.learning_rate, steps=a.steps, warmup=a.warmup)


def _open_start(a: argparse.Namespace) -> Any:
    """Open the adapters to start from; None where they are new."""
    from rslora_jax.interop.adapter_folder import open_adapters

    if not a.adapters:
        return None
    # A run that is resumed has the adapters' own config.
    start = open_adapters(a.out if a.resume else a.adapters)
    if not a.resume:
        defaults = default_arguments(COMMAND)
        for name in (*_OF_NEW, "new_tokens", "start"):
            if (value := getattr(a, name)) != getattr(defaults, name):
                raise ValueError(
                    f"--{name.replace('_', '-')} {value} is for new adapters, and --adapters has its own: leave it out"
                )
    return start


def _read_base(a: argparse.Namespace, start: Any, placement: Placement) -> Any:
    """Read the base, onto the devices that hold it, with the tokenizer of the adapters to start from."""
    from rslora_jax.commands.progress import progress_line
    from rslora_jax.interop.adapter_folder import place_of_trained
    from rslora_jax.interop.chat_template import parse_options
    from rslora_jax.interop.enlarged import with_rows_of
    from rslora_jax.interop.kept_tokenizer import is_whole
    from rslora_jax.interop.load import find_family, held_by, load_model
    from rslora_jax.interop.own_tokenizer import with_own_tokenizer

    options = parse_options(a.template_option)
    own = start.tokenizer if start else None
    a.model = place_of_trained(start, a.model)
    if start and not (a.quantize or a.dequantize):
        held = held_by(start.base, a.model)
        a.quantize, a.dequantize = held["quantize"], held["dequantize"]
    print(f"reading {model_name(a.model)}", flush=True)
    base = load_model(
        a.model,
        remat=a.remat,
        attention=a.attention,
        param_dtype=a.param_dtype,
        dtype=a.dtype,
        shardings=base_shardings(placement, find_family(a.model)) if placement.mesh else None,
        progress=progress_line("reading"),
        text=own is None or not is_whole(own),
        dequantize=a.dequantize or read_dense(a),
        quantize=None if read_dense(a) else a.quantize,
    )
    base = placed(with_rows_of(base, start.config, start.rows), placement) if start else base
    return with_own_tokenizer(base, own).with_template_options(options)


def _config_of(a: argparse.Namespace, rows: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """Return the config of new adapters that the flags describe."""
    import rslora_jax as rslora

    own = {name: getattr(a, name) for name in (*_OF_NEW, "dropout")}
    own["rank_pattern"] = pairs("--rank-pattern", a.rank_pattern, Number(int, least=1))
    own["alpha_pattern"] = pairs("--alpha-pattern", a.alpha_pattern, Number(float, above=0))
    return rslora.LoraConfig(**own, trained_rows=rows)


def _wrap(
    a: argparse.Namespace, base: Any, start: Any, placement: Placement, rows: Mapping[str, Any]
) -> tuple[Any, Any]:
    """Wrap the base by the flags; or by the adapters to start from, which are given back on their base."""
    import jax

    import rslora_jax as rslora
    from rslora_jax.interop.adapter_folder import attach_alone

    found = attach_alone(start, base) if start else None
    config = _config_of(a, rows)
    if found:  # dropout is a matter of training: their own, unless another is asked for
        config = dataclasses.replace(found.lora.config, dropout=a.dropout or found.lora.config.dropout)
    apply, tokens = placed_apply(base, placement), jax.ShapeDtypeStruct((1, 8), "int32")
    return rslora.wrap(apply, base.variables, tokens, config=config), found


def _keep_tokens(a: argparse.Namespace, base: Any, start: Any, rows: Mapping[str, Any]) -> None:
    """Keep in a new run's folder the tokenizer that its adapters have, and the new tokens."""
    from rslora_jax.interop.kept_tokenizer import keep_tokenizer
    from rslora_jax.parallel import processes

    if not a.resume:
        processes.first_decides(lambda: keep_tokenizer(start.tokenizer if start else None, Path(a.out)))
    if rows and not a.resume:
        processes.first_decides(lambda: keep_new_tokens(a, base))


def _fit(
    a: argparse.Namespace,
    lora: Any,
    first: Begun,
    data: run_data.Data,
    optimizer: Any,
    placement: Placement,
    of_examples: Mapping[str, Any],
) -> Any:
    """Train."""
    import jax

    from rslora_jax.interop.enlarged import of_file
    from rslora_jax.train import fit

    settle_parts(a, lora, first, data, optimizer, placement)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="step .* could not be saved")  # said at the end, in our own words
        return fit(
            lora,
            first.base.variables,
            first.adapters,
            base=of_file(first.base),
            batches=data.batches,
            loss=data.loss,
            optimizer=optimizer,
            steps=a.steps,
            folder=Path(a.out),
            heldout=data.heldout,
            batch_sharding=placement.batch,
            accumulate=a.accumulate,
            dropout_key=jax.random.key(a.seed),
            on_nonfinite=a.on_nonfinite,
            eval_every=a.eval_every or None,
            patience=a.patience or None,
            save_every=a.save_every or None,
            keep=a.keep,
            tensorboard=a.tensorboard,
            settings={**settings.settings_to_save(a, lora.config), "examples": of_examples},
            schedule=_make_schedule(a),
            steps_an_epoch=data.steps_an_epoch,
            resume=a.resume,
            override=settings.of_fit(a),
            start=first.start,
        )


def _conclude(a: argparse.Namespace, result: Any, seconds: float) -> int:
    """Say what came of a run that is over, and return the exit status."""
    from rslora_jax.train.report import clock

    if len(result.heldout) > 1:
        print(outcome(result))
    print(f"took {clock(seconds)}{peak_memory()}")
    if result.saved != result.step:
        said = one_line(f"step {result.step} could not be saved; {_what_is_left(a)}")
        print(f"rslora: error: {said}", file=sys.stderr)
        return 1
    return 0


def _what_is_left(a: argparse.Namespace) -> str:
    """Say what a run that was cut short has saved."""
    from rslora_jax.store import checkpoint

    steps = checkpoint.steps_in(Path(a.out))
    if not steps:
        return "nothing was saved yet"
    return f"step {steps[-1]} is saved; to go on: rslora train --resume --out {shlex.quote(a.out)}"


COMMAND = Command(
    name="train",
    summary="fine-tune a model with adapters",
    description="Fine-tune a model with rank-stabilised LoRA adapters, and save only the adapters.",
    examples=(
        (
            "rslora train",
            "Fine-tune SmolLM2-135M on docstrings of the Python standard library: no download, some minutes on two "
            "cores.",
        ),
        (
            "rslora train --data mine.jsonl --out my-run --rank 64 --steps 200",
            'Your own data, one JSON object a line: {"prompt", "completion"}, {"question", "answer"}, {"messages"} or '
            '{"text"}, or as Alpaca and ShareGPT have it. The loss is on the completion only. Every tenth line is held '
            "out and scored. Also .csv, .parquet, and .txt as one text.",
        ),
        (
            "rslora train --data mine.csv --columns prompt=question,completion=answer --eval-data test.csv",
            "Columns by their names, and another file to score: all of the data are learnt from.",
        ),
        (
            "rslora train --data chats.jsonl=0.7 books.jsonl=0.3 --skip-bad",
            "Two files, mixed by weight; bad lines are left out, and listed in the run's folder.",
        ),
        (
            "rslora train --data mine.jsonl --batch-size 32 --accumulate auto --plan",
            "What that run would be: the data as the model sees them, memory, FLOPs and time; nothing is written.",
        ),
        ("rslora train --resume --out my-run", "Go on from the last checkpoint, with the settings of the run."),
        (
            "rslora train --resume --out my-run --learning-rate 3e-4 --override learning-rate",
            "Go on with another learning rate. Without --override, what decides what is learnt must be as it was.",
        ),
        (
            "rslora train --adapters my-run --data more.jsonl --out second-run",
            "Start from the adapters of another run, or of a folder that PEFT saved.",
        ),
        (
            "rslora train --model Qwen/Qwen2.5-0.5B --targets q_proj,v_proj --epochs 3",
            "A model of the Hugging Face hub (a folder or a .gguf file will do), and adapters on two of each layer's "
            "weights, three times through the data.",
        ),
        ("rslora train --start pissa:16", "Start at the principal part of each weight, in place of A at random."),
        (
            'rslora train --model my-llama --trained "*/norm*/scale" --trained "*/bias"',
            "Norms and biases trained whole, beside the adapters.",
        ),
        (
            'rslora train --data calls.jsonl --new-tokens "<tool>,</tool>"',
            "Two tokens that the model does not have yet.",
        ),
        (
            "rslora train --batch-size 32 --accumulate 8 --dtype bfloat16 --remat full",
            "Large batches in little memory.",
        ),
        (
            "rslora train --optimizer lion --optimizer-option b1=0.95 --schedule constant --patience 3",
            "Any optimiser of optax; stop when the held-out loss has not fallen for three evaluations.",
        ),
        (
            "rslora train --mesh data=2,fsdp=4 --batch-size 8",
            "Eight devices. On several hosts, the same command on each with --distributed.",
        ),
    ),
    add_flags=add_flags,
    run=train,
    needs=(*FOR_MODELS, "grain", "matplotlib"),
    settings=(settings.file_settings, settings.resumed_settings),
    left=_what_is_left,
)
