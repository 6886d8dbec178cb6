"""Tensors of torch's zip archives, TorchScript ones included, read as data: nothing in the file is run or imported.

``torch.load(weights_only=True)`` refuses TorchScript, and checkpoints that hold anything beside tensors; ``torch.jit.load`` hands the
file's code to the interpreter. Here every class but those of tensors is replaced by an inert stand-in.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError, first_line

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Inert:
    """Stands in for an object of any class: takes what it is built from and does nothing.

    Attributes:
        state: what it was restored with; of a TorchScript module, its attributes by name.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.state: Any = {}

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, value: object) -> None:
        """Take an entry of a list, and drop it."""

    def extend(self, values: object) -> None:
        """Take entries of a list, and drop them."""

    add = append
    update = extend


def read_archive(path: Path) -> Any:
    """What a zip archive of ``torch.save`` or ``torch.jit.save`` holds: containers, numbers, tensors, and :class:`Inert` for the rest.

    Raises:
        VLMQError: the archive is damaged or of another kind.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
            if len(pickled) != 1:
                raise VLMQError(f"checkpoint '{path}' is a zip file, but none that torch wrote; give a file of weights")
            folder = pickled[0].rpartition("/")[0]
            if f"{folder}/byteorder" in archive.namelist() and archive.read(f"{folder}/byteorder") != b"little":
                raise VLMQError(
                    f"checkpoint '{path}' was written on a big-endian machine; save it again as safetensors"
                )
            with archive.open(pickled[0]) as file:
                return _Unpickler(file, archive, folder).load()
    except VLMQError:
        raise
    except Exception as error:  # a damaged pickle makes nearly anything be raised
        reason = first_line(error)
        raise VLMQError(f"checkpoint '{path}' is damaged ({reason}); fetch it again") from error


def script_tensors(module: Inert) -> dict[str, Tensor]:
    """Parameters, buffers and other tensor attributes of a TorchScript module that :func:`read_archive` found, by qualified name."""
    return dict(_walk(module, ""))


def _walk(module: Inert, prefix: str) -> Iterator[tuple[str, Tensor]]:
    state = module.state if isinstance(module.state, Mapping) else {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Inert):
            yield from _walk(value, f"{prefix}{name}.")


class _Unpickler(pickle.Unpickler):
    """Knows tensors and ordered dictionaries; every other class becomes :class:`Inert`."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file, encoding="utf-8")
        self._archive, self._folder = archive, folder
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The few that are known, by name."""
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_tensor"): _tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
        }
        return known.get((module, name), Inert)

    def persistent_load(self, pid: Any) -> Tensor:
        """A storage, as a flat tensor."""
        kind, dtype, key, _, _ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise ValueError(f"a storage of an unknown type ({kind})")
        if key not in self._storages:
            content = bytearray(self._archive.read(f"{self._folder}/data/{key}"))
            self._storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return self._storages[key]


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _parameter(data: Tensor, *_: object) -> Tensor:
    return data
