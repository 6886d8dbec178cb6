"""Encoded images in Parquet files: reading them, and saying which one is bad."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data.images.pixels import as_shown

OnBadImage = Literal["error", "skip"]
log = logging.getLogger(__name__)


def read_parquet(path: Path, columns: list[str]) -> pa.Table:
    """Read the named columns. Raises :class:`VLMQError` for a missing or damaged file, or a missing column."""
    if not path.is_file():
        raise VLMQError(f"data file '{path}' does not exist; check the data path")
    try:
        names = pq.read_schema(path).names
        for name in columns:
            require_column(path, names, name)
        return pq.read_table(path, columns=list(dict.fromkeys(columns)), partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise VLMQError(f"data file '{path}' is damaged or no Parquet file; fetch or make it again") from error


def require_column(path: Path, names: list[str], column: str) -> None:
    """Raise :class:`VLMQError` unless a Parquet file's columns ``names`` hold ``column`` exactly once."""
    if column not in names:
        raise VLMQError(f"data file '{path}' lacks the column {column}; it has {', '.join(names)}")
    if names.count(column) > 1:
        raise VLMQError(f"data file '{path}' has {names.count(column)} columns {column}; rename all but one")


def decode_images(encoded: list[bytes], source: Path, mode: str, on_bad_image: OnBadImage) -> tuple[Tensor, Tensor]:
    """Decode PNG or JPEG bytes of equally large images.

    Args:
        encoded: the files' bytes, in row order.
        source: the file they come from, for messages.
        mode: Pillow's mode, ``"L"``, ``"RGB"`` or ``"RGBA"``.
        on_bad_image: ``"error"`` stops at unreadable images, ``"skip"`` leaves them out with a warning that names and counts them.

    Returns:
        Images, uint8 ``[n, channels, height, width]`` (no channel axis for ``"L"``), and the rows they stand in, int64 ``[n]``.

    Raises:
        VLMQError: unreadable images, named by row and counted, unless they are to be skipped; or nothing readable at all.
    """
    images, rows, bad = [], [], []
    for row, data in enumerate(encoded):
        try:
            with Image.open(io.BytesIO(data)) as image:
                images.append(np.asarray(as_shown(image).convert(mode)))
            rows.append(row)
        except (OSError, SyntaxError, ValueError, TypeError):
            bad.append(row)
    if bad:
        shown = ", ".join(map(str, bad[:5])) + (", …" if len(bad) > 5 else "")
        text = f"{len(bad)} of {len(encoded)} images in '{source}' cannot be read (row {shown})"
        if on_bad_image == "error":
            raise VLMQError(f"{text}; repair the file or set on_bad_image: skip")
        log.warning("%s; they are left out", text)
    if not images:
        raise VLMQError(f"'{source}' holds no readable image; repair the file")
    stacked = torch.from_numpy(np.stack(images))
    return (stacked if mode == "L" else stacked.permute(0, 3, 1, 2)).contiguous(), torch.tensor(rows)


def encode_png(image: Tensor) -> bytes:
    """PNG bytes of a uint8 image, ``[height, width]`` grey or ``[3, height, width]`` RGB."""
    buffer = io.BytesIO()
    array = image.permute(1, 2, 0).numpy() if image.ndim == 3 else image.numpy()
    Image.fromarray(array).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
