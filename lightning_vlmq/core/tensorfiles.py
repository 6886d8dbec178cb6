"""Reading safetensors files that may be missing, cut short or no such files at all."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.names import one_line

DAMAGED = (OSError, SafetensorError, RuntimeError, ValueError, KeyError, AttributeError, MemoryError)
"""What reading a damaged file raises; absurd headers raise more kinds than one would think."""


def read_tensor_file(path: Path, give: str, again: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors by name, on the CPU, and its metadata.

    Args:
        path: the file.
        give: what to give instead where there is no such file.
        again: what to do again where it is damaged.

    Raises:
        VLMQError: it is missing or damaged.
    """
    try:
        with safe_open(str(path), "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
            return tensors, file.metadata() or {}
    except FileNotFoundError as error:
        raise VLMQError(f"cannot read '{path}' (no such file); give {give}") from error
    except DAMAGED as error:
        reason = one_line(str(error))[:200] or type(error).__name__
        raise VLMQError(f"'{path}' is damaged ({reason}); {again}") from error
