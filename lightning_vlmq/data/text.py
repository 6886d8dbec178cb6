"""Text files that people write: lists, names, captions, tables. Read as what they are, or refused by file and line."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_vlmq.core.errors import VLMQError

_BOM = "\ufeff"
_WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,17})")  # 18 digits fit int64


def decode_text(content: bytes, where: str) -> str:
    """Text of UTF-8 bytes, all line ends as Unix has them, without byte order marks (at the start, or of lines where files were joined).

    Args:
        content: the bytes.
        where: what a message calls them.

    Raises:
        VLMQError: not UTF-8; names the line.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        kind = "UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "another encoding"
        raise VLMQError(
            f"line {line} of '{where}' is not UTF-8 (byte 0x{content[error.start]:02x}, perhaps {kind}); save the file as UTF-8"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise VLMQError(f"line {line} of '{where}' holds a zero byte, which no text does; save the file as UTF-8")
    text = text.replace("\r\n", "\n").replace("\r", "\n").removeprefix(_BOM)
    return text.replace(f"\n{_BOM}", "\n")


def read_text(path: Path) -> str:
    """A file's text, see :func:`decode_text`. Raises :class:`VLMQError` where it cannot be read or is not UTF-8."""
    try:
        return decode_text(path.read_bytes(), str(path))
    except OSError as error:
        raise VLMQError(f"'{path}' cannot be read ({error.strerror}); check the path and its rights") from error


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not blank, without white space around them, with their numbers from 1."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield number, line.strip()


def whole_number(word: str) -> int | None:
    """The whole number that a word is as one writes it (no sign but -, no leading zeros), else ``None``."""
    return int(word) if _WHOLE.fullmatch(word) else None


@dataclass(frozen=True)
class Table:
    """Columns of a delimited text file.

    Attributes:
        columns: by name, a text a row.
        lines: the line that each row ends on.
    """

    columns: dict[str, list[str]]
    lines: list[int]

    def __len__(self) -> int:
        return len(self.lines)


def read_table(path: Path, columns: Sequence[str], separator: str) -> Table:
    """Columns of a CSV (``separator`` ``,``) or TSV (tab) file with a header; fields that hold the separator are quoted.

    Raises:
        VLMQError: a column that is missing or there twice, a row with another number of fields than the header (as an unquoted
            separator makes it), or a quote that does not close; names the line.
    """
    rows = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=separator, strict=True)
    kind = "TSV" if separator == "\t" else "CSV"
    try:
        header = [name.strip() for name in next(rows, [])]
        for name in columns:
            if header.count(name) != 1:
                raise VLMQError(
                    f"'{path}' has {header.count(name) or 'no'} columns {name}, its header is {', '.join(header)[:120]}; "
                    f"it takes one each of {', '.join(columns)}: name its columns"
                )
        places = [header.index(name) for name in columns]
        found: list[list[str]] = [[] for _ in columns]
        lines = []
        for row in rows:
            if len(row) < 2 and not "".join(row).strip():
                continue  # a blank line
            if len(row) != len(header):
                raise VLMQError(
                    f"line {rows.line_num} of '{path}' has {len(row)} fields, the header {len(header)}; "
                    f"put fields that hold a {'tab' if separator == chr(9) else 'comma'} in double quotes"
                )
            for values, place in zip(found, places):
                values.append(row[place])
            lines.append(rows.line_num)
    except csv.Error as error:
        raise VLMQError(f"line {rows.line_num} of '{path}' is no {kind} ({error}); repair its quotes") from error
    return Table(dict(zip(columns, found)), lines)
