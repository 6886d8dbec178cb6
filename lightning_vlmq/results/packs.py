"""Runs packed into few Parquet files: what a store of thousands of runs is read from.

A pack is three files in ``<root>/packs``, ``<id>.results.parquet``, ``<id>.samples.parquet`` and ``<id>.curves.parquet``, in which each
run has rows of its own, and ``<id>.index.parquet`` with one line per run: where its rows are, and what was said of it when it was filed.
The index is written last, and holds hashes of the other three: **a pack without its index does not exist**.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.identity import file_digest
from lightning_vlmq.core.names import one_line
from lightning_vlmq.results.parts import PARTS, read_part
from lightning_vlmq.results.schema import ROW_SCHEMA

INDEX_SCHEMA = pa.schema(
    [
        ("run_id", pa.string()),
        ("said", pa.string()),
        *((f"{kind}_{edge}", pa.int64()) for kind in PARTS for edge in ("start", "stop")),
        ("sample_columns", pa.string()),
    ]
)
"""A line a packed run: its metadata as JSON, the rows it has in each file (-1 where nothing was kept), its samples' columns."""
FILES = b"lightning_vlmq.files"
INDEX = ".index.parquet"
_NAME = re.compile(rf"([0-9a-f]+-[0-9a-f]+)\.(?:index|{'|'.join(PARTS)})\.parquet")


@dataclass(frozen=True)
class Packed:
    """A packed run.

    Attributes:
        pack: the pack's id.
        said: metadata of its results part, as it was filed.
        spans: first row and the row after the last, by kind of part; a kind that was not kept is missing.
        sample_columns: columns of its samples.
    """

    pack: str
    said: Mapping[bytes, bytes]
    spans: Mapping[str, tuple[int, int]]
    sample_columns: tuple[str, ...]


def pack_of(name: str) -> str | None:
    """The id of the pack that a file of this name is part of; ``None`` for a foreign file, a copy of a pack's too."""
    found = _NAME.fullmatch(name)
    return found[1] if found else None


class Packs:
    """The packs of a store.

    Args:
        root: the store's folder.
    """

    def __init__(self, root: Path) -> None:
        self.folder = root / "packs"
        self._seen: tuple[str, ...] | None = None
        self._files: dict[str, dict[str, str]] = {}
        self._runs: dict[str, Packed] = {}
        self._bad: dict[str, str] = {}
        self._checked: dict[tuple[str, int, int], str] = {}
        self._last: tuple[tuple[object, ...], pa.Table] = ((), ROW_SCHEMA.empty_table())

    def runs(self) -> Mapping[str, Packed]:
        """Every packed run by its id, whatever became of the files that its rows are in; a pack of a later date wins."""
        names: tuple[str, ...] = ()
        with suppress(OSError):  # no folder: no packs
            names = tuple(sorted(n for n in os.listdir(self.folder) if n.endswith(INDEX) and pack_of(n)))
        if names != self._seen:  # a pack never changes: it comes and goes under a name of its own
            self._seen, self._runs, self._bad = names, {}, {}
            for name in names:
                try:
                    self._runs |= self._read_index(self.folder / name)
                except VLMQError as error:
                    if (self.folder / name).exists():  # else it was packed into another meanwhile
                        self._bad[name] = str(error)
        return self._runs

    def problems(self) -> list[str]:
        """One line for each pack that is damaged and each foreign file. The runs of a damaged one do not count."""
        self.runs()
        ids = {name.removesuffix(INDEX) for name in self._seen or ()}
        bad = list(self._bad.values()) + [why for pack in sorted(ids) if (why := self.problem_of(pack))]
        for path in sorted(self.folder.glob("[!.]*")):
            if pack_of(path.name) not in ids:
                bad.append(f"{one_line(str(path))} belongs to no pack; delete it")
        return bad

    def problem_of(self, pack: str) -> str:
        """Why a pack's files do not hold what was written, empty where they do; each is read once a process."""
        if f"{pack}{INDEX}" in self._bad:
            return ""  # said already
        for kind, wanted in self._files.get(pack, {}).items():
            path = self.folder / f"{pack}.{kind}.parquet"
            status = _status(path)
            key = (path.name, *(status.st_size, status.st_mtime_ns)) if status else (path.name, -1, -1)
            if key not in self._checked:
                self._checked[key] = file_digest(path) if status else "missing"
            if self._checked[key] != wanted:
                what = "is missing" if status is None else "does not hold what was written"
                return f"{path} {what}; delete the files packs/{pack}.* and run the study again"
        return ""

    def read(self, kind: str, run_id: str) -> pa.Table:
        """One packed run's rows. Raises :class:`VLMQError` where its pack is damaged or this kind was not kept."""
        packed = self.runs()[run_id]
        if why := self.problem_of(packed.pack):
            if not (self.folder / f"{packed.pack}{INDEX}").exists():
                return self.read(kind, run_id)  # it was packed into another meanwhile
            raise VLMQError(why)
        if kind not in packed.spans:
            raise VLMQError(
                f"the {kind} of run '{run_id}' were not kept when it was packed; its study files them again with {kind}=true, "
                f"vlmq with its command and --results.run_id {run_id}"
            )
        start, stop = packed.spans[kind]
        metadata = dict(packed.said) if kind == "results" else None
        file = pq.ParquetFile(self.folder / f"{packed.pack}.{kind}.parquet", page_checksum_verification=True)
        edges, groups = [0], []
        for group in range(file.num_row_groups):
            edges.append(edges[-1] + file.metadata.row_group(group).num_rows)
            if edges[-2] < stop and edges[-1] > start:
                groups.append(group)
        columns = list(packed.sample_columns) if kind == "samples" else None
        key = (packed.pack, kind, *groups)
        if self._last[0] != key:  # runs side by side share row groups
            self._last = (key, file.read_row_groups(groups))
        table = self._last[1].slice(start - (edges[groups[0]] if groups else 0), stop - start)
        return (table.select(columns) if columns else table).replace_schema_metadata(metadata)

    def batches(
        self, run_ids: Sequence[str], columns: Sequence[str], keep: pc.Expression | None = None
    ) -> Iterator[pa.Table]:
        """Results rows of packed runs, some at a time.

        Args:
            run_ids: of which runs; others of the same packs are left out.
            columns: which columns.
            keep: which rows, an expression over the columns; all if not given.
        """
        wanted: dict[str, list[str]] = {}
        for run_id in run_ids:
            wanted.setdefault(self.runs()[run_id].pack, []).append(run_id)
        for pack, own in wanted.items():
            if why := self.problem_of(pack):
                raise VLMQError(why)
            file = pq.ParquetFile(
                self.folder / f"{pack}.results.parquet",
                page_checksum_verification=True,
                read_dictionary=[name for name in ROW_SCHEMA.names if pa.types.is_string(ROW_SCHEMA.field(name).type)],
            )
            spans = [self.runs()[run_id].spans["results"] for run_id in own]
            whole = (
                sum(stop - start for start, stop in spans) == file.metadata.num_rows
            )  # also none that a later pack has
            chosen = keep
            if not whole:
                mine = pc.field("run_id").isin(own)
                chosen = mine if keep is None else keep & mine
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                yield (table if chosen is None else table.filter(chosen)).select(list(columns))

    def _read_index(self, path: Path) -> dict[str, Packed]:
        table = read_part(path, INDEX_SCHEMA, "delete the pack and run the study again")
        pack = path.name.removesuffix(INDEX)
        self._files[pack] = json.loads((table.schema.metadata or {}).get(FILES, b"{}"))
        found = {}
        for line in table.to_pylist():
            spans = {k: (line[f"{k}_start"], line[f"{k}_stop"]) for k in PARTS if line[f"{k}_start"] >= 0}
            said = {key.encode(): value.encode() for key, value in json.loads(line["said"]).items()}
            found[line["run_id"]] = Packed(pack, said, spans, tuple(json.loads(line["sample_columns"])))
        return found


def _status(path: Path) -> os.stat_result | None:
    with suppress(OSError):
        return path.stat()
    return None
