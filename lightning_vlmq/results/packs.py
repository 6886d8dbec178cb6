"""Runs packed into few Parquet files: what a store of thousands of runs is read from.

A pack is three files in ``<root>/packs``, ``<id>.results.parquet``, ``<id>.samples.parquet`` and ``<id>.curves.parquet``, in which each
run has rows of its own, and ``<id>.index.parquet`` with a line a run: where its rows are, and what was said of it when it was filed. The
index is written last, and holds hashes of the other three: **a pack without its index does not exist**.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lightning_vlmq.core.atomic import remove_leftovers, replacing
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.identity import file_digest
from lightning_vlmq.results.parts import PARTS, PREFIX, SHARED_COLUMNS, read_part, write_part
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
MOST = 8
"""More packs than this are packed into one."""
ROW_GROUP = 2**19
_FILES = b"lightning_vlmq.files"
_INDEX = ".index.parquet"


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
            names = tuple(sorted(n for n in os.listdir(self.folder) if n.endswith(_INDEX) and not n.startswith(".")))
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
        ids = {name.removesuffix(_INDEX) for name in self._seen or ()}
        bad = list(self._bad.values()) + [why for pack in sorted(ids) if (why := self.problem_of(pack))]
        for path in sorted(self.folder.glob("[!.]*")):
            if path.name.partition(".")[0] not in ids:
                bad.append(f"{path} belongs to no pack; delete it")
        return bad

    def problem_of(self, pack: str) -> str:
        """Why a pack's files do not hold what was written, empty where they do; each is read once a process."""
        if f"{pack}{_INDEX}" in self._bad:
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
            if not (self.folder / f"{packed.pack}{_INDEX}").exists():
                return self.read(kind, run_id)  # it was packed into another meanwhile
            raise VLMQError(why)
        if kind not in packed.spans:
            raise VLMQError(f"the {kind} of run '{run_id}' were not kept when it was packed; run it again")
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
            whole = sum(packed.pack == pack for packed in self.runs().values()) == len(own)
            chosen = keep
            if not whole:
                mine = pc.field("run_id").isin(own)
                chosen = mine if keep is None else keep & mine
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                yield (table if chosen is None else table.filter(chosen)).select(list(columns))

    @contextmanager
    def packing(self) -> Iterator[Packer]:
        """Write a pack, nobody else doing so meanwhile. Raises :class:`VLMQError` where somebody does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise VLMQError(f"'{self.folder}' is being packed by another process; wait for it") from None
            except OSError:  # a file system without locks
                pass
            remove_leftovers(self.folder)
            for path in self.folder.glob("[!.]*.parquet"):  # of a pack that was killed before its index was written
                pack, _, kind = path.name.removesuffix(".parquet").partition(".")
                if kind in PARTS and not (self.folder / f"{pack}.index.parquet").exists():
                    path.unlink(missing_ok=True)
            yield Packer(self)
        finally:
            os.close(descriptor)

    def _read_index(self, path: Path) -> dict[str, Packed]:
        table = read_part(path, INDEX_SCHEMA, "delete the pack and run the study again")
        pack = path.name.removesuffix(_INDEX)
        self._files[pack] = json.loads((table.schema.metadata or {}).get(_FILES, b"{}"))
        found = {}
        for line in table.to_pylist():
            spans = {k: (line[f"{k}_start"], line[f"{k}_stop"]) for k in PARTS if line[f"{k}_start"] >= 0}
            said = {key.encode(): value.encode() for key, value in json.loads(line["said"]).items()}
            found[line["run_id"]] = Packed(pack, said, spans, tuple(json.loads(line["sample_columns"])))
        return found


class Packer:
    """Writes a pack.

    Args:
        packs: the packs it joins.
    """

    def __init__(self, packs: Packs) -> None:
        self.packs = packs

    def pack(self, run_ids: Sequence[str], read: Callable[[str, str], pa.Table], keeps_samples: bool) -> None:
        """Pack runs, and all earlier packs with them where there are many.

        Args:
            run_ids: the runs.
            read: a run's part by kind and id.
            keeps_samples: whether their samples are packed too.

        Raises:
            VLMQError: the disk does not take it.
        """
        known = self.packs.runs()
        old = sorted({packed.pack for packed in known.values()})
        merged = [] if len(old) < MOST else old
        fresh = set(run_ids)
        sources = {run_id: None for run_id, packed in known.items() if packed.pack in merged and run_id not in fresh}
        every = [*sources, *run_ids]
        if not every:
            return

        def part(kind: str, run_id: str) -> pa.Table:
            return self.packs.read(kind, run_id) if run_id in sources else read(kind, run_id)

        lines: dict[str, dict[str, object]] = {run_id: {"run_id": run_id, "sample_columns": "[]"} for run_id in every}
        pack = f"{time.time_ns():x}-{uuid.uuid4().hex[:6]}"  # in the order of time
        files = {}
        for kind in PARTS:
            kept = [
                run_id
                for run_id in every
                if kind != "samples" or (kind in known[run_id].spans if run_id in sources else keeps_samples)
            ]
            path = self.packs.folder / f"{pack}.{kind}.parquet"
            try:
                with replacing(path) as partial:
                    _write(partial, kind, kept, part, lines)
            except OSError as error:
                raise VLMQError(
                    f"'{path}' cannot be written ({error.strerror or error}); nothing was packed"
                ) from error
            files[kind] = file_digest(path)
        index = pa.Table.from_pylist(list(lines.values()), schema=INDEX_SCHEMA)
        write_part(self.packs.folder / f"{pack}.index.parquet", index, {_FILES: json.dumps(files).encode()})
        for name in merged:
            for kind in ("index", *PARTS):  # the index first: without it the others do not count
                (self.packs.folder / f"{name}.{kind}.parquet").unlink(missing_ok=True)


def _write(
    path: Path,
    kind: str,
    run_ids: Sequence[str],
    part: Callable[[str, str], pa.Table],
    lines: Mapping[str, dict[str, object]],
) -> None:
    """Stream the runs' parts into one file, and note in ``lines`` where each lies and what was said of it."""
    schema = PARTS[kind]
    if kind == "samples":
        names: dict[str, None] = {}
        for run_id in run_ids:
            columns = part(kind, run_id).column_names
            lines[run_id]["sample_columns"] = json.dumps(columns)
            names |= dict.fromkeys(name for name in columns if name not in SHARED_COLUMNS)
        schema = pa.schema([*schema, *(pa.field(name, pa.float32()) for name in names)])
    for line in lines.values():
        line[f"{kind}_start"] = line[f"{kind}_stop"] = -1
    start, waiting, n_waiting = 0, list[pa.Table](), 0
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        for run_id in run_ids:
            table = part(kind, run_id)
            if kind == "results":
                said = {
                    k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items() if k.startswith(PREFIX)
                }
                lines[run_id]["said"] = json.dumps(said)
            lines[run_id][f"{kind}_start"], lines[run_id][f"{kind}_stop"] = start, start + len(table)
            start += len(table)
            waiting.append(_fitted(table, schema))
            n_waiting += len(table)
            if n_waiting >= ROW_GROUP:
                writer.write_table(pa.concat_tables(waiting), row_group_size=ROW_GROUP)
                waiting, n_waiting = [], 0
        if waiting:
            writer.write_table(pa.concat_tables(waiting), row_group_size=ROW_GROUP)


def _fitted(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table with the columns of a schema, those that it lacks empty."""
    columns = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _status(path: Path) -> os.stat_result | None:
    with suppress(OSError):
        return path.stat()
    return None
