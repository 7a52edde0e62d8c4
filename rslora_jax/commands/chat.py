"""`rslora chat`: talk with a model and the adapters of runs."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rslora_jax.commands.choice import BASE, Asked, Choice, folders_by_name
from rslora_jax.commands.command import FOR_MODELS, Command
from rslora_jax.commands.flags import add_flag, shared
from rslora_jax.commands.output import tell, write_text_whole
from rslora_jax.commands.prompts import prompt_ids
from rslora_jax.commands.writing import Speed, add_answer_flags, answer_options, unfolding, until_stop

_HELP = """\
/reset          begin anew; what /system says stays
/system TEXT    what the model is told before all else; without a text, nothing
/adapter NAME   who answers from now on: {names}
/retry          answer the last message again
/save FILE      write the conversation as a line of JSON, as `rslora train --data` reads it
/help, /quit    this; the end. Ctrl-C stops an answer"""


def _add_flags(parser: argparse.ArgumentParser) -> None:
    shared(parser, "folder", nargs="?", text="of a run or of PEFT (default: the base model alone)")
    what = parser.add_argument_group("model")
    shared(what, "--model")
    shared(what, "--step")
    several = "several folders in place of one, among which /adapter NAME chooses; the first begins"
    add_flag(what, "--adapters", None, several, metavar="[NAME=]FOLDER,...")
    shared(what, "--dtype")
    add_flag(what, "--system", None, "what the model is told before all else", metavar="TEXT")
    shared(what, "--template-option")
    add_answer_flags(parser.add_argument_group("answers"))


@dataclasses.dataclass
class _Chat:
    """A conversation, and who answers.

    Attributes:
      write: gives the answer to turns by an adapter's name, and prints it as it comes.
      choice: the adapters there are.
      adapter: the name of the one that answers.
      system: what the model is told first; "" for nothing.
      turns: what was said.
    """

    write: Callable[[list[dict[str, str]], str], str]
    choice: Choice
    adapter: str
    system: str = ""
    turns: list[dict[str, str]] = dataclasses.field(default_factory=list)

    def messages(self) -> list[dict[str, str]]:
        """Return all that the model is told."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *self.turns]

    def say(self, text: str) -> None:
        """Say something to the model, and keep what it answers; what cannot be answered is taken back."""
        self.turns.append({"role": "user", "content": text})
        try:
            answer = self.write(self.messages(), self.adapter)
        except ValueError as error:
            self.turns.pop()
            tell(str(error))
            return
        if not answer:
            self.turns.pop()
            tell("nothing was answered, so your message is taken back")
            return
        self.turns.append({"role": "assistant", "content": answer})

    def obey(self, line: str) -> bool:
        """Do what a line that begins with a slash asks for; say whether the conversation goes on."""
        word, _, text = line[1:].strip().partition(" ")
        does: Mapping[str, Callable[[str], Any]] = {
            "reset": lambda _: self.turns.clear(),
            "system": self._tell_first,
            "adapter": self._take,
            "retry": self._retry,
            "save": self._save,
            "help": lambda _: tell(_HELP.format(names=", ".join([*self.choice.folders, BASE]))),
        }
        if word in ("quit", "exit"):
            return False
        try:
            does.get(word, self._unknown(word))(text.strip())
        except (ValueError, OSError) as error:
            tell(str(error))
        return True

    def _unknown(self, word: str) -> Callable[[str], None]:
        return lambda _: tell(f"there is no /{word}: /help says what there is")

    def _tell_first(self, text: str) -> None:
        self.system = text

    def _take(self, name: str) -> None:
        self.choice.number(Asked("", name, "/adapter"))
        self.adapter = name
        tell(f"{name} answers")

    def _retry(self, _: str) -> None:
        if not self.turns:
            raise ValueError("nothing was said yet")
        before = list(self.turns)
        del self.turns[-1]
        self.say(self.turns.pop()["content"])
        if len(self.turns) < len(before):  # nothing came of it
            self.turns = before

    def _save(self, text: str) -> None:
        path = str(Path(text).expanduser()) if text else ""
        if not path or not self.turns:
            raise ValueError("nothing was said yet" if path else "say where: /save FILE")
        here = Path(path)
        before = here.read_text(encoding="utf-8") if here.exists() else ""
        before += "\n" if before and not before.endswith("\n") else ""
        write_text_whole(path, before + json.dumps({"messages": self.messages()}, ensure_ascii=False) + "\n")
        tell(f"added to {path}")


def chat(a: argparse.Namespace) -> int:
    """Run `rslora chat`."""
    from rslora_jax.commands import runs

    if a.folder and a.adapters is not None:
        raise ValueError(f"--adapters is in place of a folder: leave out {a.folder}, or put it into --adapters")
    folders = folders_by_name(a.adapters if a.adapters is not None else a.folder) if a.adapters or a.folder else {}
    if a.adapters is not None and not folders:
        raise ValueError("--adapters names none: give FOLDER or NAME=FOLDER, with commas between them")
    choice = Choice(folders, next(iter(folders), BASE))
    tell("reading the model")
    how: dict[str, Any] = dict(model=a.model, step=a.step, dtype=a.dtype, template_options=a.template_option)
    loaded = runs.load_runs([*folders.values()], to_write=True, **how)
    if loaded.tokenizer.chat_template is None:
        raise ValueError("this model has no chat template, so it cannot be talked with: use `rslora generate`")
    answers = Answers(loaded, [*folders], answer_options(a, loaded.folder), a.seed, a.stop)
    talk = _Chat(answers, choice, choice.default, a.system or "")
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (what was typed comes back by the arrow keys)
        tell(f"{choice.default} answers; /help says what else there is")
    while (line := _typed()) is not None:
        if line.startswith("/"):
            if not talk.obey(line):
                break
        elif line.strip():
            talk.say(line)
    return 0


@dataclasses.dataclass
class Answers:
    """Answers of a model by the adapters of runs, printed as they come."""

    loaded: Any
    names: list[str]
    options: dict[str, Any]
    seed: int
    stops: list[str]
    count: int = 0

    def __call__(self, messages: list[dict[str, str]], adapter: str) -> str:
        """Answer turns; Ctrl-C ends the answer, which is kept as far as it came."""
        import jax

        from rslora_jax.commands import runs
        from rslora_jax.models import generation

        run = self.loaded.runs[self.names.index(adapter)] if adapter in self.names else None
        apply, variables = runs.program(self.loaded, run)
        ids, config = self._that_fit(messages), self.loaded.config
        key = jax.random.fold_in(jax.random.key(self.seed), self.count)
        self.count += 1
        # Lengths in powers of two: a conversation grows, and each length is a program.
        bucket = 256 << max(0, (len(ids) - 1).bit_length() - 8)
        how = dict(eos_id=self.loaded.tokenizer.stop_ids, key=key, bucket=bucket, **self.options)
        going = generation.start(apply, variables, [ids], config, **how)
        decode = functools.partial(self.loaded.tokenizer.decode, skip_special=True)
        pieces = (new for (new,) in Speed().of(going, [ids], chunk=4))
        text = ""
        try:
            for part in until_stop(unfolding(pieces, decode), self.stops):
                print(part, end="", flush=True)
                text += part
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        print(flush=True)
        return text.strip()

    def _that_fit(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the tokens of turns, without the oldest ones where all are too many."""
        room, left_out = self.loaded.config.max_len - self.options["max_new"], 0
        first, turns = messages[: messages[0]["role"] == "system"], messages[messages[0]["role"] == "system" :]
        while len(ids := prompt_ids(self.loaded.tokenizer, (*first, *turns[left_out:]), plain=False)) > room:
            left_out += 2  # a question and its answer
            if left_out >= len(turns):
                raise ValueError(f"{len(ids):,} tokens are more than the {room:,} that this model takes: say less")
        if left_out:
            tell(f"the first {left_out} of {len(turns)} messages no longer fit, and are left out")
        return ids


def _typed() -> str | None:
    """Return the next line of the standard input; None at its end. Ctrl-C there ends the command."""
    if sys.stdin.isatty():
        try:
            return input("> ")
        except EOFError:
            return None
    line = sys.stdin.readline()
    # A byte that is not UTF-8 comes as half a surrogate pair, which no tokenizer takes.
    return line.encode(errors="replace").decode().rstrip("\r\n") if line else None


COMMAND = Command(
    name="chat",
    summary="talk with a model and the adapters of runs",
    description="Talk with a model: it is told all that was said before. Lines that begin with / are commands; /help.",
    examples=(
        ("rslora chat my-run", "The run's last adapters; /adapter base lets the model answer without them."),
        (
            "rslora chat --adapters polite=run-1,terse=run-2 --temperature 0.8",
            "Two of them, by /adapter polite, terse.",
        ),
        ('rslora chat my-run --system "Answer in one line." < questions.txt', "Each line is a message."),
    ),
    add_flags=_add_flags,
    run=chat,
    needs=FOR_MODELS,
)
