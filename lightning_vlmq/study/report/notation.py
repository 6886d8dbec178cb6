"""How numbers are written in figures, tables and on the terminal."""

from __future__ import annotations

import math

import pandas as pd


def signed(value: float, digits: int, is_significant: bool = False) -> str:
    """A number with its sign, a real minus, and no sign where all digits shown are zero. NaN is a dash.

    Args:
        value: the number.
        digits: digits after the point.
        is_significant: whether it is known to differ from zero: then it gets the digits that show it (at most four more).
    """
    if math.isnan(value):
        return "–"
    while is_significant and value and float(f"{value:.{digits}f}") == 0 and digits < 6:
        digits += 1
    text = f"{value:+.{digits}f}"
    return (text[1:] if float(text) == 0 else text).replace("-", "−")


def percent_interval(estimate: float, low: float, high: float) -> tuple[str, str]:
    """A fraction and its interval, signed and in percent, with the digits that its uncertainty allows.

    Example:
        >>> percent_interval(0.0312, 0.021, 0.043)
        ('+3.1', '[+2.1, +4.3]')
    """
    half_width = 50 * (high - low)
    digits = 1 if math.isnan(half_width) or half_width >= 0.3 else 2
    while low * high > 0 and estimate and float(f"{100 * estimate:.{digits}f}") == 0 and digits < 6:
        digits += 1
    return signed(100 * estimate, digits), f"[{signed(100 * low, digits)}, {signed(100 * high, digits)}]"


def csv_text(table: pd.DataFrame) -> str:
    r"""A table as CSV that spreadsheets open as it is: a text that they would take for a formula gets an apostrophe before it.

    Example:
        >>> csv_text(pd.DataFrame({"model": ["=1+1"], "change": [-0.5]}))
        "model,change\n'=1+1,-0.5\n"
    """
    words = table.select_dtypes(exclude=["number", "bool"])
    inert = table.assign(**{name: column.map(_inert) for name, column in words.items()})
    return inert.rename(columns=_inert).to_csv(index=False)


def _inert(cell: object) -> object:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else cell
