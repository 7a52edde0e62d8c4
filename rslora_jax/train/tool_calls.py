"""The calls of tools that a turn of the assistant makes, as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rslora_jax.shown import quoted


def calls_of(turn: Mapping[str, Any], is_call: bool, where: str) -> list[dict[str, Any]]:
    """Return a turn's calls: its `tool_calls`, its one `function_call`, or what it says where all of it is calls.

    Templates take arguments as an object (transformers' documentation of `apply_chat_template`), so those that are
    written as JSON, as OpenAI's API has them, are read. All else is handed on as it is.

    Raises:
      ValueError: one is no call; the message goes after the place of the example.

    >>> calls_of({"tool_calls": [{"function": {"name": "add", "arguments": '{"x": 1}'}}]}, False, "message 1")
    [{'function': {'name': 'add', 'arguments': {'x': 1}}}]
    """
    found = _json(turn.get("value", turn.get("content"))) if is_call else _json(turn.get("tool_calls"))
    if not found and "function_call" in turn:
        found = turn["function_call"]
    if found in (None, "", []):
        return []
    listed = found if isinstance(found, list) else [found]
    return [_call(call, where) for call in listed]


def name_of(call: Mapping[str, Any]) -> str:
    """Return the name of the function that is called."""
    return str(_function(call)["name"])


def with_arguments(call: Mapping[str, Any], arguments: Any) -> dict[str, Any]:
    """Return a call with other arguments.

    >>> with_arguments({"function": {"name": "add", "arguments": {}}}, {"x": 2})
    {'function': {'name': 'add', 'arguments': {'x': 2}}}
    """
    own = {**_function(call), "arguments": arguments}
    return {**call, "function": own} if "function" in call else own


def _function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = call.get("function", call)
    return inner if isinstance(inner, Mapping) else {}


def _call(call: Any, where: str) -> dict[str, Any]:
    own = _function(call) if isinstance(call, dict) else {}
    if not isinstance(own.get("name"), str) or not own["name"]:
        raise ValueError(
            f"has in {where} the call {quoted(call, 60)}; write it as "
            '{"type": "function", "function": {"name", "arguments"}}'
        )
    # A bare call is given the form that all templates know.
    call = call if "function" in call else {"type": "function", "function": call}
    return with_arguments(call, _json(own.get("arguments", {})))


def _json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, (dict, list)) else value
