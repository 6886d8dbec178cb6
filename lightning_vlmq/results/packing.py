"""Writing a pack: one process at a time, its index last, and earlier packs joined to it where there are many."""

from __future__ import annotations

import fcntl
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_vlmq.core.atomic import remove_leftovers, replacing
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.identity import file_digest
from lightning_vlmq.results.packs import FILES, INDEX, INDEX_SCHEMA, Packs, pack_of
from lightning_vlmq.results.parts import PARTS, PREFIX, SHARED_COLUMNS, write_part

MOST = 8
"""So many packs are packed into one."""
ROW_GROUP = 2**19
"""Rows that are written, and read, at a time."""


@contextmanager
def packing(packs: Packs) -> Iterator[Packer]:
    """Write a pack, nobody else doing so meanwhile. Raises :class:`VLMQError` where somebody does."""
    packs.folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(packs.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise VLMQError(f"'{packs.folder}' is being packed by another process; wait for it") from None
        except OSError:  # a file system without locks
            pass
        remove_leftovers(packs.folder)
        for path in packs.folder.glob("*.parquet"):  # of a pack that was killed before its index was written
            pack = pack_of(path.name)
            if pack is not None and not (packs.folder / f"{pack}{INDEX}").exists():
                path.unlink(missing_ok=True)
        yield Packer(packs)
    finally:
        os.close(descriptor)


class Packer:
    """Writes a pack.

    Args:
        packs: the packs it joins.
    """

    def __init__(self, packs: Packs) -> None:
        self.packs = packs

    def pack(self, run_ids: Sequence[str], read: Callable[[str, str], pa.Table], keeps_samples: bool) -> None:
        """Pack runs, and all earlier packs with them where there are many; one that is damaged stays as it is.

        Args:
            run_ids: the runs.
            read: a run's part by kind and id.
            keeps_samples: whether their samples are packed too.

        Raises:
            VLMQError: the disk does not take it.
        """
        known = self.packs.runs()
        old = [pack for pack in sorted({packed.pack for packed in known.values()}) if not self.packs.problem_of(pack)]
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
        write_part(self.packs.folder / f"{pack}{INDEX}", index, {FILES: json.dumps(files).encode()})
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
    numbers = [field.name for field in schema if pa.types.is_floating(field.type)]
    with pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        write_page_checksum=True,
        use_dictionary=[name for name in schema.names if name not in numbers],
        column_encoding=dict.fromkeys(numbers, "BYTE_STREAM_SPLIT"),  # a fifth smaller than as they stand
    ) as writer:
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
