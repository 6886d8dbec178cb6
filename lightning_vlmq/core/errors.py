"""Errors a user can act on: one clear line, exit code 2, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VLMQError(ValueError):
    """Bad input. The message is one line that says what is wrong and what to do about it.

    The command-line entry points print it and exit with code 2; library callers get an ordinary ``ValueError``.
    """


def unknown(kind: str, name: str, known: Iterable[str]) -> VLMQError:
    """Build the error for a name that no registry holds, with the nearest names that one does.

    Args:
        kind: what was looked up, e.g. ``"method"``.
        name: the name that was asked for.
        known: every name that would have worked.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names) or 'none'}"
    return VLMQError(f"unknown {kind} '{name}'; {hint}")
