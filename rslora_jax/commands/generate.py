"""`rslora generate`: let a model, with or without adapters, answer prompts."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rslora_jax.commands.choice import Asked, Choice, program_of
from rslora_jax.commands.command import FOR_MODELS, Command
from rslora_jax.commands.flags import add_flag, check_new_file, shared
from rslora_jax.commands.output import tell, write_text_whole
from rslora_jax.commands.writing import Speed, add_answer_flags, answer_options, unfolding, until_stop


def _add_flags(parser: argparse.ArgumentParser) -> None:
    shared(parser, "folder", nargs="?", text="of a run or of PEFT (default: the base model alone)")
    what = parser.add_argument_group("model")
    shared(what, "--model")
    shared(what, "--step")
    merged = "add the adapters into the weights first: faster, at other rounding"
    what.add_argument("--merged", action="store_true", help=merged)
    several = "several folders in place of one, among which each prompt of a .jsonl file names its own, "
    several += '"adapter": "NAME", or null for none'
    add_flag(what, "--adapters", None, several, metavar="[NAME=]FOLDER,...")
    one = "of --adapters, that of prompts that name none; base for no adapter (default: the first)"
    add_flag(what, "--adapter", None, one, metavar="NAME")
    shared(what, "--dtype")
    prompts = parser.add_argument_group("prompts")
    add_flag(prompts, "--prompt", [], "a prompt, as often as you like", metavar="TEXT", action="append")
    add_flag(prompts, "--prompts", None, "a file of prompts, one a line, or a .jsonl file", metavar="FILE")
    prompts.add_argument("--plain", action="store_true", help="prompts as they stand, without the chat template")
    shared(prompts, "--template-option")
    shared(prompts, "--batch-size", text="prompts that are answered together")
    how = parser.add_argument_group("answers")
    add_answer_flags(how)
    shared(how, "--out", text="write prompts and answers as JSON lines too", metavar="FILE")


def generate(a: argparse.Namespace) -> int:
    """Run `rslora generate`."""
    from rslora_jax.commands import runs
    from rslora_jax.commands.prompts import prompt_ids, read_prompts

    choice = _check_flags(a)
    asked = [*map(Asked, a.prompt), *(read_prompts(a.prompts) if a.prompts else [])]
    if choice:
        _ = [choice.number(one) for one in asked]  # a name that is none shows before the model is read
    elif any(one.adapter for one in asked):
        tell("the prompts name adapters, which are not looked at without --adapters")
    tell("reading the model")
    loaded = runs.load_runs(
        [*choice.folders.values()] if choice else [a.folder] if a.folder else [],
        model=a.model,
        step=a.step,
        dtype=a.dtype,
        to_write=True,
        template_options=a.template_option,
        together=choice is not None,
    )
    options = answer_options(a, loaded.folder)
    ids = functools.partial(prompt_ids, loaded.tokenizer, plain=a.plain)
    writer = _Writer.of(loaded, a, options, choice)
    # All are encoded first: a mistake in the last shows before the first is answered.
    answers = writer.many(asked, [ids(one.prompt) for one in asked]) if asked else writer.lines(_typed(), ids)
    records = []
    for one, answer in answers:
        named = {"adapter": choice.name(one)} if choice else {}
        records.append({"prompt": one.prompt, "completion": answer, **named})
    if a.out:
        write_text_whole(a.out, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        tell(f"wrote {a.out}")
    return 0


def _check_flags(a: argparse.Namespace) -> Choice | None:
    """Return the adapters to choose among; raise a ValueError for flags that cannot be, before the model is read."""
    several = a.adapters is not None
    if several and a.folder:
        raise ValueError(f"--adapters is in place of a folder: leave out {a.folder}, or put it into --adapters")
    if several and a.merged:
        raise ValueError("--merged makes one model, and with --adapters each prompt has its own: leave one of them out")
    if a.adapter is not None and not several:
        raise ValueError("--adapter names one of --adapters: give these too, or the folder alone")
    if a.merged and not a.folder:
        raise ValueError("--merged needs a run whose adapters are to be merged: name its folder")
    check_new_file("--out", a.out)
    return Choice.of(a.adapters, a.adapter) if several else None


@dataclasses.dataclass
class _Writer:
    """Answer prompts, and show the answers."""

    apply: Callable[..., Any]
    variables: Callable[[Sequence[int]], Any]  # those of a batch, by the numbers of its rows' adapters
    loaded: Any
    options: dict[str, Any]
    batch_size: int
    seed: int
    choice: Choice | None = None
    stops: Sequence[str] = ()
    count: int = 0

    @classmethod
    def of(cls, loaded: Any, a: argparse.Namespace, options: dict[str, Any], choice: Choice | None) -> _Writer:
        """Make one for a model, the flags of the command, how tokens are chosen, and adapters to choose among."""
        from rslora_jax.commands.runs import program

        if choice:
            return cls(*program_of(loaded), loaded, options, a.batch_size, a.seed, choice, a.stop)
        apply, variables = program(loaded, loaded.runs[0] if loaded.runs else None, merged=a.merged)
        return cls(apply, lambda numbers: variables, loaded, options, a.batch_size, a.seed, stops=a.stop)

    def number(self, asked: Asked) -> int:
        """Return the number of the adapter that a prompt has; 0 where there are none to choose among."""
        return self.choice.number(asked) if self.choice else 0

    def start(self, prompts: Sequence[list[int]], numbers: Sequence[int], bucket: int = 64) -> Any:
        """Lay out a batch and compile its programs; each batch draws for itself."""
        import jax

        from rslora_jax.models import generation

        key = jax.random.fold_in(jax.random.key(self.seed), self.count)
        self.count += 1
        going = generation.start(
            self.apply,
            self.variables(numbers),
            prompts,
            self.loaded.config,
            eos_id=self.loaded.tokenizer.stop_ids,
            key=key,
            bucket=bucket,
            **self.options,
        )
        going.compile()
        return going

    def many(self, prompts: Sequence[Asked], ids: Sequence[list[int]]) -> Iterator[tuple[Asked, str]]:
        """Answer prompts in batches; one alone is shown as it comes."""
        from rslora_jax.commands.progress import progress_line
        from rslora_jax.commands.prompts import batches

        if len(prompts) == 1:
            yield prompts[0], self.shown_as_it_comes(prompts[0], ids[0])
            return
        numbers = [self.number(one) for one in prompts]
        speed, done = Speed(), 0
        progress = progress_line("answering")
        # One length for all batches, so that they share what is compiled.
        bucket = -(-max(map(len, ids)) // 64) * 64
        for (batch, real), (its, _) in zip(
            batches(ids, self.batch_size), batches(numbers, self.batch_size), strict=True
        ):
            begun = time.perf_counter()
            going = self.start(batch, its, bucket)
            speed.compiling += time.perf_counter() - begun
            rows: list[list[int]] = [[] for _ in batch]
            for piece in speed.of(going, batch[:real], self.options["max_new"]):
                rows = [row + new for row, new in zip(rows, piece, strict=True)]
            done += real
            progress(done, len(prompts))
            for prompt, row in zip(prompts[done - real : done], rows, strict=False):
                answer = self.loaded.tokenizer.decode(row, skip_special=True)
                answer = "".join(until_stop([answer], self.stops)).strip()
                by = f"[{self.choice.name(prompt)}] " if self.choice else ""
                print(f"> {by}{_text_of(prompt.prompt)}\n{answer}\n", flush=True)
                yield prompt, answer
        tell(str(speed))

    def lines(self, lines: Iterator[str], ids: Callable[[str], list[int]]) -> Iterator[tuple[Asked, str]]:
        """Answer each line as it comes."""
        for line in lines:
            yield Asked(line), self.shown_as_it_comes(Asked(line), ids(line))

    def shown_as_it_comes(self, asked: Asked, ids: list[int]) -> str:
        """Answer one prompt, and print each piece as soon as later tokens cannot change it."""
        speed = Speed()
        begun = time.perf_counter()
        going = self.start([ids], [self.number(asked)])
        speed.compiling = time.perf_counter() - begun
        decode = functools.partial(self.loaded.tokenizer.decode, skip_special=True)
        text = ""
        for part in until_stop(unfolding((new for (new,) in speed.of(going, [ids], chunk=4)), decode), self.stops):
            print(part, end="", flush=True)
            text += part
        print(flush=True)
        tell(str(speed))
        return text.strip()


def _text_of(prompt: Any) -> str:
    """Give a prompt as it is shown: of a chat, its last turn."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _typed() -> Iterator[str]:
    """Give the lines of the standard input that are not blank, each as it comes."""
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\r\n")


COMMAND = Command(
    name="generate",
    summary="let a model, with or without adapters, answer prompts",
    description="Answer prompts with a model and the adapters of a run, which are not merged into it.",
    examples=(
        (
            'rslora generate my-run --prompt "What is the capital of France?"',
            "The run's last adapters on the model they were trained on; the answer appears as it comes.",
        ),
        (
            'rslora generate --prompt "What is the capital of France?"',
            "The base model alone: SmolLM2, or --model other.gguf.",
        ),
        (
            'rslora generate peft-adapter --model HuggingFaceTB/SmolLM2-135M --prompt "Once upon a time"',
            "A folder that PEFT saved, with the tokenizer beside it if there is one, on the base that you name.",
        ),
        (
            "rslora generate my-run --step best --prompts questions.txt --out answers.jsonl",
            'Many prompts, one a line, in batches. A .jsonl file has {"prompt"}, {"question"} or {"messages"} a line.',
        ),
        (
            'rslora generate my-run --plain --prompt "Once upon a time" --temperature 0.8 --top-p 0.9 --seed 1',
            "No chat template, and tokens drawn at random.",
        ),
        (
            "rslora generate my-run --prompts questions.txt --temperature 0",
            "The likeliest answers, also of a model whose generation_config.json asks for drawing. What that says of "
            "temperature, top-k, top-p, min-p, repetition penalty and length is obeyed where no flag says otherwise.",
        ),
        (
            "rslora generate --adapters sql=run-1,python=run-2,peft-adapter --prompts questions.jsonl",
            'Each prompt by its own adapter, {"prompt": "...", "adapter": "sql"}, in one program, also within a batch. '
            "Without a name a folder has its own.",
        ),
        (
            "rslora generate my-run < questions.txt",
            "Without prompts, each line of the input is answered as it comes; on a terminal, each line you type.",
        ),
    ),
    add_flags=_add_flags,
    run=generate,
    needs=FOR_MODELS,
)
