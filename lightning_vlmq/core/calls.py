"""A name with options in one word, as configurations write it: ``"mcm(temperature=0.5)"``, ``"gptq(damping=0.1)"``."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from lightning_vlmq.core.errors import VLMQError


def parse_call(text: str, kind: str) -> tuple[str, dict[str, Any]]:
    """Take ``"name"`` or ``"name(option=value, ...)"`` apart; values are numbers, texts, ``True``, ``False`` or ``None``.

    Args:
        text: what was written.
        kind: the word for it in messages, e.g. ``"method"``.

    Raises:
        VLMQError: for anything else.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
        options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError):
        call, options = ast.Call(ast.Constant(None), [], []), {}
    plain = all(value is None or isinstance(value, bool | int | float | str) for value in options.values())
    if not isinstance(call.func, ast.Name) or call.args or None in options or not plain:
        raise VLMQError(f"cannot read the {kind} '{text}': write a name, or name(option=value)")
    return call.func.id, {str(name): value for name, value in options.items()}


def call_text(name: str, options: Mapping[str, Any]) -> str:
    """What :func:`parse_call` takes apart."""
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in options.items())})" if options else name
