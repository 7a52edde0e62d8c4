"""Chat templates, run by Jinja in its sandbox, which limits neither time nor memory."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


def answer(question: tuple[str, Mapping[str, Any] | None]) -> str | tuple[str, ...]:
    """Return what a template writes, or without variables the names that it takes from outside.

    >>> answer(("{% generation %}{{ a }}{% endgeneration %}!", {"a": 1})), answer(("{{ a }}", None))
    ('1!', ('a',))
    """
    source, variables = question
    return _names(source) if variables is None else _template(source).render(**variables)


class _Generation(Extension):
    """Take `{% generation %}`, by which templates mark for transformers what an assistant wrote; it changes no text."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own attribute)

    def parse(self, parser: Parser) -> nodes.CallBlock:
        """Return the marked part as a block of its own, as transformers does: what is set in it stays in it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = nodes.CallBlock(self.call_method("_unchanged"), [], [], body)
        block.set_lineno(line)
        return block

    def _unchanged(self, caller: Callable[[], str]) -> str:
        return caller()


def _environment() -> ImmutableSandboxedEnvironment:
    # The options and names here, and the names given when rendering, are what templates written for Hugging Face
    # rely on.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json  # jinja's own writes for HTML
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    return environment


@functools.lru_cache(maxsize=32)  # a data set renders one template thousands of times
def _template(source: str) -> jinja2.Template:
    return _environment().from_string(source)


def _names(source: str) -> tuple[str, ...]:
    environment = _environment()
    return tuple(sorted(meta.find_undeclared_variables(environment.parse(source)) - set(environment.globals)))


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
