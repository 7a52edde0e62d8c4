"""Chat templates: how one is run, what it asks for, and which token ends a turn."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rslora_jax.confined import Exceeded, ask

# What every chat is rendered with, and no option may take the place of.
_GIVEN = ("messages", "add_generation_prompt", "tools", "documents")
_MARK = "\ue000"  # of the private use area: in no template, and no white space that one would trim
_WORDS = {"true": True, "false": False, "none": None}


def render(source: str, variables: Mapping[str, Any], file: str = "") -> str:
    """Run a template; it comes with a file, hence from a stranger, so it runs in a sandbox that can be stopped.

    Args:
      source: the template.
      variables: what it is given.
      file: where it came from, for errors.

    Raises:
      Exceeded: a ValueError: it takes more time or memory than a chat may, or calls itself without end.
      ValueError: the template is none, or refuses what it is given.
      ImportError: Jinja is not installed.

    >>> render("{% generation %}{{ a }}{% endgeneration %}!", {"a": 1})
    '1!'
    """
    return _asked(source, variables, "does not take these messages", file)


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """Read a template's options as a command line gives them, NAME=VALUE: true, false, none, JSON or a word.

    Raises:
      ValueError: one is not of that form.

    >>> parse_options(["enable_thinking=false", "today=1 May 2026", "depth=3"])
    {'enable_thinking': False, 'today': '1 May 2026', 'depth': 3}
    """
    options = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not (name.isidentifier() and equals and value):
            raise ValueError(f"--template-option {text} is not of the form NAME=VALUE, such as enable_thinking=false")
        options[name] = _value(value)
    return options


def check_options(source: str | None, options: Mapping[str, Any]) -> None:
    """Raise a ValueError for an option that the template never looks at: it would change nothing.

    >>> check_options("{{ enable_thinking }}", {"enable_thinkin": False})
    Traceback (most recent call last):
    ValueError: the chat template has no option enable_thinkin: did you mean enable_thinking?
    """
    if options and source is None:
        raise ValueError(
            f"the model has no chat template, so none takes the option {next(iter(options))}: leave it out"
        )
    for name in options:
        if name in _GIVEN:
            raise ValueError(f"the template option {name} is given by the chat itself: leave it out")
        known = _asked_for(source or "")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1) or [*known]
            hint = f"did you mean {near[0]}?" if near else "it has none"
            raise ValueError(f"the chat template has no option {name}: {hint}")


def turn_end(chat: Callable[..., str], added: Sequence[str], ends: Sequence[str]) -> str | None:
    """Return the token that a template writes at the end of the assistant's turn; None where it writes none.

    Args:
      chat: renders messages, as `Tokenizer.chat`.
      added: the texts of the tokens that are not found by merging.
      ends: of these, the texts of those at which writing is known to stop.

    >>> turn_end(lambda messages, **_: f"{messages[-1]['content']} <end>\\n<eos>", ["<end>", "<eos>"], ["<eos>"])
    '<end>'
    """
    try:
        text = chat(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}], add_generation_prompt=False
        )
    except Exceeded:
        raise
    except ValueError:  # it does not take such a chat; what it takes instead is not known
        return None
    _, found, rest = text.rpartition(_MARK)
    rest, run = rest.lstrip() if found else "", list[str]()
    by_length = sorted(filter(None, added), key=len, reverse=True)
    # Tokens that follow each other without white space end the turn together: <|END_RESPONSE|><|END_OF_TURN|>.
    while (token := next((one for one in by_length if rest.startswith(one)), None)) is not None:
        run.append(token)
        rest = rest[len(token) :]
    return next((token for token in run if token in ends), run[-1] if run else None)


@functools.cache
def _asked_for(source: str) -> tuple[str, ...]:
    """Return the names that a template takes from outside, but for those that are always given."""
    found = set(_asked(source, None, "cannot be read"))
    tokens = {name for name in found if name.endswith("_token")}
    return tuple(sorted(found - set(_GIVEN) - tokens))


def _asked(source: str, variables: Mapping[str, Any] | None, fault: str, file: str = "") -> Any:
    """Let a template be run; say what it was that could not be."""
    where = f" (that of {file})" if file else ""
    try:
        return ask("templates", (source, variables))
    except Exceeded as error:
        raise Exceeded(f"the chat template {error}: use another template{where}") from error
    except ValueError as error:
        raise ValueError(f"the chat template {fault}: {error}{where}") from error
    except ImportError as error:
        raise ImportError(f"chat templates need jinja2 ({error}): pip install 'rslora_jax[train]'") from error


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return text
