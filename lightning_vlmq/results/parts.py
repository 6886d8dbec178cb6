"""One Parquet part of a run: written whole, with checksums of its pages and a digest of its content, and read back as what was written."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lightning_vlmq.core.atomic import replacing
from lightning_vlmq.core.errors import VLMQError, first_line
from lightning_vlmq.core.names import one_line
from lightning_vlmq.results.schema import CURVE_SCHEMA, ROW_SCHEMA, SAMPLE_SCHEMA, RunKey

PARTS = {"results": ROW_SCHEMA, "samples": SAMPLE_SCHEMA, "curves": CURVE_SCHEMA}
"""Folders below a store's root, each with a file for each run, and the columns that these have at least."""
PREFIX = b"lightning_vlmq."
DIGEST = b"lightning_vlmq.digest"
SHARED_COLUMNS = frozenset(SAMPLE_SCHEMA.names)
"""Columns that samples always have; the others are OOD scores."""
_MAY_BE_UNDEFINED = {"value", "stderr", "confidence", "nll", "brier", "kl", "x", "y", "y_reference"}


def read_part(path: Path, schema: pa.Schema, advice: str) -> pa.Table:
    """A part's table, what is said about it in its schema's metadata.

    Args:
        path: the file.
        schema: columns that it has at least.
        advice: what to do where it cannot be read, the end of the message.

    Raises:
        VLMQError: it does not hold what was written.
    """
    try:
        # ParquetFile, not read_table: a folder name like "seed=1" above must not become a column.
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
        kept = (table.schema.metadata or {}).get(DIGEST)
        if kept is None or kept.decode("ascii", "replace") != content_digest(table):
            raise OSError("its content is not what a results store wrote")
    except (pa.ArrowException, OSError, ValueError, MemoryError, TypeError, OverflowError, LookupError) as error:
        reason = one_line(first_line(error))
        raise VLMQError(f"{path} cannot be read ({reason}); {advice}") from error
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise VLMQError(f"{path} lacks the columns {', '.join(missing)}; {advice}")
    return table


def write_part(path: Path, table: pa.Table, metadata: dict[bytes, bytes]) -> str:
    """Write a part; returns the digest of its content.

    Raises:
        VLMQError: the disk does not take it.
    """
    table = table.replace_schema_metadata(metadata)
    found = content_digest(table)
    try:
        with replacing(path) as partial:
            pq.write_table(
                table.replace_schema_metadata({**metadata, DIGEST: found.encode()}),
                partial,
                compression="zstd",
                write_page_checksum=True,
            )
    except OSError as error:
        raise VLMQError(f"'{path}' cannot be written ({error.strerror or error}); nothing of it is kept") from error
    return found


def content_digest(table: pa.Table) -> str:
    """Hash of a table's columns and of what is said about it, whatever pieces it is stored in."""
    state = hashlib.sha256()
    for key, value in sorted((table.schema.metadata or {}).items()):
        if key.startswith(PREFIX) and key != DIGEST:
            state.update(key + b"\0" + value + b"\n")
    for field, column in zip(table.schema, table.columns):
        state.update(f"{field.name}\0{field.type}\0{len(column)}\n".encode())
        missing = column.is_null().to_numpy()
        state.update(np.packbits(missing).tobytes())
        if pa.types.is_string(field.type):
            whole = pa.chunked_array([column.combine_chunks()], field.type).dictionary_encode().combine_chunks()
            whole = whole.chunk(0) if isinstance(whole, pa.ChunkedArray) else whole
            state.update(whole.indices.fill_null(-1).to_numpy(zero_copy_only=False).tobytes())
            state.update("\0".join(whole.dictionary.to_pylist()).encode("utf-8", "surrogatepass"))
        else:
            empty = False if pa.types.is_boolean(field.type) else 0
            state.update(column.fill_null(empty).to_numpy().tobytes())
    return state.hexdigest()[:32]


def as_table(frame: pd.DataFrame, schema: pa.Schema, what: str) -> pa.Table:
    """Convert to the schema's columns, order and types; an empty frame needs no columns."""
    if frame.empty:
        return schema.empty_table()
    missing = [name for name in schema.names if name not in frame.columns]
    if missing:
        raise VLMQError(f"the {what} lack the columns {', '.join(missing)}")
    extra = [str(name) for name in frame.columns if name not in schema.names]
    if extra:
        raise VLMQError(f"the {what} have unknown columns {', '.join(extra)}; known: {', '.join(schema.names)}")
    try:
        table = pa.Table.from_pandas(frame[schema.names], schema=schema, preserve_index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise VLMQError(f"the {what} do not fit their columns' types: {first_line(error)}") from error
    for name in schema.names:
        optional = name in _MAY_BE_UNDEFINED or (what == "samples" and name not in SAMPLE_SCHEMA.names)
        if table[name].null_count and not optional:
            raise VLMQError(f"column {name} of the {what} has {table[name].null_count} empty cells; fill them")
    return table


def check_rows(run_id: str, rows: pd.DataFrame) -> None:
    """Refuse rows of another run, of several runs, or the same evaluation twice."""
    strangers = set(rows["run_id"]) - {run_id}
    if strangers:
        raise VLMQError(f"rows of run '{sorted(map(str, strangers))[0]}' cannot be stored as run '{run_id}'")
    key_columns = [field.name for field in fields(RunKey)]
    if len(rows[key_columns].drop_duplicates()) > 1:
        raise VLMQError(f"the rows of run '{run_id}' differ in {', '.join(key_columns)}; store one run at a time")
    evaluation = ["dataset", "role", "corruption", "severity", "score", "metric"]
    twice = rows[rows.duplicated(evaluation)]
    if len(twice):
        cell = " ".join(str(value) for value in twice.iloc[0][evaluation] if value != "")
        raise VLMQError(f"run '{run_id}' has two rows for {cell}; keep one")
