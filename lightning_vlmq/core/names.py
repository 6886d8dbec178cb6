"""Names that people give to models, data sets and classes, where a file system or a line of text takes less than they may hold."""

from __future__ import annotations

import hashlib
import re

_LONGEST = 100


def file_name(text: str) -> str:
    """A name as a file's, without suffix: letters, digits, ``.``, ``_`` and ``-`` as they are, ``_`` for anything else.

    One that had to be changed ends in a hash of what it was, so that two names never share a file.

    Example:
        >>> file_name("concepts"), file_name("a/b").startswith("a_b-")
        ('concepts', True)
    """
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", text)[:_LONGEST]
    if plain == text and not text.startswith((".", "-")) and text:
        return text
    return f"{plain.lstrip('.-') or '_'}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def one_line(text: str) -> str:
    """A text without line breaks and other control characters, which a terminal would obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def bits_text(weight_bits: int, act_bits: int) -> str:
    """Bit-widths of weights and activations the way they are written in papers, e.g. ``"W4A8"``."""
    return f"W{weight_bits}A{act_bits}"
