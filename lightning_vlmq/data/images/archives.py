"""Images inside larger files: tar and Parquet."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data.images.encoded import require_column
from lightning_vlmq.data.images.sources import EncodedSource, file_status


class TarMembers(EncodedSource):
    """Images inside tar files, read in place.

    Args:
        members: tar file, member's name, and where in the tar file its bytes start and how many they are.
    """

    def __init__(self, members: Sequence[tuple[Path, str, int, int]]) -> None:
        self.members = members
        self._status = {path: file_status(path) for path in {path for path, _, _, _ in members}}

    def __len__(self) -> int:
        return len(self.members)

    def name(self, row: int) -> str:
        """Tar file and member."""
        path, member, _, _ = self.members[row]
        return f"{path}:{member}"

    def encoded(self, row: int) -> bytes:
        """The member's bytes."""
        path, _, offset, size = self.members[row]
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)

    def sizes(self) -> NDArray[np.float64]:
        """Bytes a member, ``[n]``."""
        return np.array([size for _, _, _, size in self.members], dtype=np.float64)

    def entry(self, row: int) -> bytes:
        """Tar file with its size and time of change, member, place."""
        path, member, offset, size = self.members[row]
        return f"{self._status[path]}\0{member}\0{offset}\0{size}".encode()


class ParquetRows(EncodedSource):
    """Encoded images in a column of Parquet files: bytes, or a struct with the field ``bytes`` (as Hugging Face writes them).

    One row group is held at a time, so reading in order reads every group once.

    Args:
        paths: the files, in order.
        column: the column.

    Raises:
        VLMQError: a file that is missing, damaged, or without such a column.
    """

    def __init__(self, paths: Sequence[Path], column: str) -> None:
        self.paths = list(paths)
        self.column = column
        self._status = []
        self._groups: list[
            tuple[int, int, int, int]
        ] = []  # file, row group, rows before the file, rows before the group
        n = 0
        for k, path in enumerate(self.paths):
            try:
                file = pq.ParquetFile(path)
            except (pa.ArrowInvalid, OSError) as error:
                raise VLMQError(
                    f"data file '{path}' is missing, damaged or no Parquet file; fetch or make it again"
                ) from error
            self._check_column(path, file.schema_arrow)
            self._status.append(file_status(path))
            file_start = n
            for g in range(file.metadata.num_row_groups):
                self._groups.append((k, g, file_start, n))
                n += file.metadata.row_group(g).num_rows
        self._n = n
        self._starts = np.array([start for _, _, _, start in self._groups])
        self._held: tuple[int, Any] = (-1, None)

    def _check_column(self, path: Path, schema: pa.Schema) -> None:
        require_column(path, schema.names, self.column)
        kind = schema.field(self.column).type
        kind = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise VLMQError(f"column {self.column} of '{path}' holds {kind}, not image files; name another column")

    def __len__(self) -> int:
        return self._n

    def name(self, row: int) -> str:
        """File and row."""
        k, _, file_start, _ = self._groups[self._group(row)]
        return f"{self.paths[k]}, row {row - file_start}"

    def encoded(self, row: int) -> bytes:
        """The cell's bytes; none for an empty cell."""
        group = self._group(row)
        if self._held[0] != group:
            self._held = (group, self._read(group))
        return self._held[1][row - self._groups[group][3]].as_py() or b""

    def sizes(self) -> NDArray[np.float64]:
        """Bytes a cell, ``[n]``; reads the whole column once."""
        return self._sizes

    @cached_property
    def _sizes(self) -> NDArray[np.float64]:
        lengths = [pc.binary_length(self._read(group)).fill_null(0) for group in range(len(self._groups))]
        return np.concatenate([part.to_numpy(zero_copy_only=False) for part in lengths]).astype(np.float64)

    def entry(self, row: int) -> bytes:
        """File with its size and time of change, column, row."""
        k, _, file_start, _ = self._groups[self._group(row)]
        return f"{self._status[k]}\0{self.column}\0{row - file_start}".encode()

    def _group(self, row: int) -> int:
        return int(np.searchsorted(self._starts, row, side="right")) - 1

    def _read(self, group: int) -> pa.Array:
        k, g, _, _ = self._groups[group]
        table = pq.ParquetFile(self.paths[k]).read_row_group(g, columns=[self.column], use_threads=False)
        cells = table[self.column].combine_chunks()
        return cells.field("bytes") if pa.types.is_struct(cells.type) else cells
