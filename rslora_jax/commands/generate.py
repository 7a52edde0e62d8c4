"""`rslora generate`: let a model, with or without adapters, answer prompts."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rslora_jax.commands.flags import add_flag

EXAMPLES = """\
examples:
  rslora generate my-run --prompt "What is the capital of France?"
      The run's last adapters on the model they were trained on; the answer appears as it comes.
  rslora generate --prompt "What is the capital of France?"
      The base model alone: SmolLM2, or --model other.gguf.
  rslora generate my-run --step best --prompts questions.txt --out answers.jsonl
      Many prompts, one a line, in batches. A .jsonl file has {"prompt"}, {"question"} or {"messages"} a line.
  rslora generate my-run --plain --prompt "Once upon a time" --temperature 0.8 --top-p 0.9 --seed 1
      No chat template, and tokens drawn at random.
  rslora generate my-run < questions.txt
      Without prompts, each line of the input is answered as it comes; on a terminal, each line you type.
"""


def add(commands: Any) -> None:
    """Add the command and its flags."""
    generate = commands.add_parser(
        "generate",
        help="let a model, with or without adapters, answer prompts",
        description="Answer prompts with a model and the adapters of a run, which are not merged into it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    generate.add_argument(
        "folder", nargs="?", metavar="FOLDER", help="of a run or of PEFT (default: the base model alone)"
    )
    what = generate.add_argument_group("model")
    add_flag(what, "--model", None, "the base, where it is not where the run found it", metavar="FILE")
    add_flag(what, "--step", None, "which checkpoint (default: the last)", metavar="last|best|N")
    merged = "add the adapters into the weights first: faster, at other rounding"
    what.add_argument("--merged", action="store_true", help=merged)
    dtype = "dtype to compute in (default: the run's, or float32)"
    add_flag(what, "--dtype", None, dtype, choices=("float32", "bfloat16"))
    prompts = generate.add_argument_group("prompts")
    add_flag(prompts, "--prompt", [], "a prompt, as often as you like", metavar="TEXT", action="append")
    add_flag(prompts, "--prompts", None, "a file of prompts, one a line, or a .jsonl file", metavar="FILE")
    prompts.add_argument("--plain", action="store_true", help="prompts as they stand, without the chat template")
    add_flag(prompts, "--batch-size", 8, "prompts that are answered together", metavar="N")
    how = generate.add_argument_group("answers")
    add_flag(how, "--max-new", 256, "most tokens of an answer", metavar="N")
    add_flag(how, "--temperature", 0.0, "0 takes the likeliest token; above, one is drawn", metavar="X")
    add_flag(how, "--top-p", 1.0, "draw among the likeliest tokens that hold so much of the probability", metavar="X")
    add_flag(how, "--seed", 0, "seed of what is drawn", metavar="N")
    add_flag(how, "--out", None, "write prompts and answers as JSON lines too", metavar="FILE")
    generate.set_defaults(run=run)


def run(arguments: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Run the command."""
    try:
        return generate(arguments)
    except KeyboardInterrupt:
        print("\nrslora: interrupted", file=sys.stderr)
        return 130


def generate(a: argparse.Namespace) -> int:
    """Run `rslora generate`."""
    from rslora_jax.commands import runs
    from rslora_jax.commands.prompts import prompt_ids, read_prompts

    for flag in ("batch_size", "max_new"):
        if not getattr(a, flag) > 0:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(a, flag)} is not above 0")
    if a.temperature < 0 or not 0 < a.top_p <= 1:
        raise ValueError(f"--temperature {a.temperature} --top-p {a.top_p}: give at least 0, and 0 < top-p <= 1")
    if a.merged and not a.folder:
        raise ValueError("--merged needs a run whose adapters are to be merged: name its folder")
    if a.out and not Path(a.out).absolute().parent.is_dir():
        raise ValueError(f"{Path(a.out).parent} is no folder: make it before --out {a.out}")
    prompts = [*a.prompt, *(read_prompts(a.prompts) if a.prompts else [])]
    tell("reading the model")
    loaded = runs.load([a.folder] if a.folder else [], model=a.model, step=a.step, dtype=a.dtype, to_write=True)
    ids = lambda prompt: prompt_ids(loaded.tokenizer, prompt, plain=a.plain)
    writer = Writer.of(loaded, a)
    # All are encoded first: a mistake in the last shows before the first is answered.
    answers = writer.many(prompts, [ids(p) for p in prompts]) if prompts else writer.lines(typed(), ids)
    records = []
    for prompt, answer in answers:
        records.append({"prompt": prompt, "completion": answer})
    if a.out:
        write_whole(a.out, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        tell(f"wrote {a.out}")
    return 0


@dataclasses.dataclass
class Writer:
    """Answer prompts, and show the answers."""

    apply: Callable[..., Any]
    variables: Any
    loaded: Any
    options: dict[str, Any]
    batch_size: int
    seed: int
    count: int = 0

    @classmethod
    def of(cls, loaded: Any, a: argparse.Namespace) -> Writer:
        """Make one for a model and the flags of the command."""
        from rslora_jax.commands.runs import program

        options = {"max_new": a.max_new, "temperature": a.temperature, "top_p": a.top_p}
        apply, variables = program(loaded, loaded.runs[0] if loaded.runs else None, merged=a.merged)
        return cls(apply, variables, loaded, options, a.batch_size, a.seed)

    def start(self, prompts: Sequence[list[int]], bucket: int = 64) -> Any:
        """Lay out a batch and compile its programs; each batch draws for itself."""
        import jax

        from rslora_jax.models import generation

        key = jax.random.fold_in(jax.random.key(self.seed), self.count)
        self.count += 1
        going = generation.start(
            self.apply,
            self.variables,
            prompts,
            self.loaded.config,
            eos_id=self.loaded.tokenizer.stop_ids,
            key=key,
            bucket=bucket,
            **self.options,
        )
        going.compile()
        return going

    def many(self, prompts: Sequence[Any], ids: Sequence[list[int]]) -> Iterator[tuple[Any, str]]:
        """Answer prompts in batches; one alone is shown as it comes."""
        from rslora_jax.commands.prompts import batches
        from rslora_jax.train.report import progress_line

        if len(prompts) == 1:
            yield prompts[0], self.shown_as_it_comes(ids[0])
            return
        speed, done = Speed(), 0
        progress = progress_line("answering", after=2.0)
        # One length for all batches, so that they share what is compiled.
        bucket = -(-max(map(len, ids)) // 64) * 64
        for batch, real in batches(ids, self.batch_size):
            begun = time.perf_counter()
            going = self.start(batch, bucket)
            speed.compiling += time.perf_counter() - begun
            rows: list[list[int]] = [[] for _ in batch]
            for piece in speed.of(going, batch[:real], self.options["max_new"]):
                rows = [row + new for row, new in zip(rows, piece, strict=True)]
            done += real
            progress(done, len(prompts))
            for prompt, row in zip(prompts[done - real : done], rows, strict=False):
                answer = self.loaded.tokenizer.decode(row, skip_special=True).strip()
                print(f"> {text_of(prompt)}\n{answer}\n", flush=True)
                yield prompt, answer
        tell(str(speed))

    def lines(self, lines: Iterator[str], ids: Callable[[str], list[int]]) -> Iterator[tuple[str, str]]:
        """Answer each line as it comes."""
        for line in lines:
            yield line, self.shown_as_it_comes(ids(line))

    def shown_as_it_comes(self, ids: list[int]) -> str:
        """Answer one prompt, and print each piece as soon as later tokens cannot change it."""
        speed = Speed()
        begun = time.perf_counter()
        going = self.start([ids])
        speed.compiling = time.perf_counter() - begun
        decode = lambda row: self.loaded.tokenizer.decode(row, skip_special=True)
        text = ""
        for part in unfolding((new for (new,) in speed.of(going, [ids], chunk=4)), decode):
            print(part, end="", flush=True)
            text += part
        print(flush=True)
        tell(str(speed))
        return text.strip()


@dataclasses.dataclass
class Speed:
    """Count tokens and seconds, those of compiling apart."""

    compiling: float = 0.0
    reading: float = 0.0
    writing: float = 0.0
    read: int = 0
    new: int = 0

    def of(self, going: Any, prompts: Sequence[list[int]], chunk: int) -> Iterator[list[list[int]]]:
        """Give the pieces of a compiled batch, whose first rows are for `prompts`, and count tokens and seconds."""
        import jax

        from rslora_jax.models.generation import pieces

        begun = time.perf_counter()
        state = jax.block_until_ready(going.read())
        self.reading += time.perf_counter() - begun
        self.read += sum(map(len, prompts))
        begun = time.perf_counter()
        for piece in pieces(going, state, chunk):
            self.writing += time.perf_counter() - begun
            self.new += sum(map(len, piece[: len(prompts)]))
            yield piece
            begun = time.perf_counter()

    def __str__(self) -> str:
        rate = lambda count, seconds: f"{count} ({count / max(seconds, 1e-9):.0f}/s)"
        return (
            f"prompt tokens {rate(self.read, self.reading)}, new tokens {rate(self.new, self.writing)}, "
            f"after {self.compiling:.1f} s to compile"
        )


def unfolding(pieces: Iterable[Sequence[int]], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """Give a text part by part as its tokens come; the parts, joined, are the text of all tokens.

    What more tokens may change is held back: half a character at the end, which decodes to U+FFFD.

    >>> halves = [[0x63, 0xC3], [0xA9], [0xC3]]
    >>> list(unfolding(halves, lambda row: bytes(row).decode(errors="replace")))
    ['c', 'é', '\ufffd']
    """
    row: list[int] = []
    shown = ""
    for piece in pieces:
        row += piece
        text = decode(row).rstrip("\ufffd")
        if len(text) > len(shown) and text.startswith(shown):
            yield text[len(shown) :]
            shown = text
    whole = decode(row)
    if whole.removeprefix(shown):
        yield whole.removeprefix(shown)


def text_of(prompt: Any) -> str:
    """Give a prompt as it is shown: of a chat, its last turn."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def typed() -> Iterator[str]:
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


def tell(text: str) -> None:
    """Say what is no answer, beside the output."""
    print(text, file=sys.stderr, flush=True)


def write_whole(path: str, text: str) -> None:
    """Write a file that is never there by half."""
    draft = Path(f"{path}.tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
