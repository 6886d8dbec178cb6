"""What a thing is, as plain values that can be hashed: the one way in which runs and cache keys say what decides a number."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch

from lightning_vlmq.core.errors import VLMQError

LIBRARIES = (
    "lightning",
    "numpy",
    "open_clip_torch",
    "pillow",
    "scikit-image",
    "scikit-learn",
    "scipy",
    "timm",
    "torch",
    "torchao",
    "torchmetrics",
    "torchvision",
    "transformers",
)
"""The libraries whose version can decide a number; ``pyproject.toml``'s others move, store or draw numbers."""

PACKAGE = Path(__file__).resolve().parents[1]
FEATURES = ("core", "data", "lowbit", "models", "quant")
"""Subpackages whose code decides the features of an image or text."""
NUMBERS = (*FEATURES, "callbacks", "evaluation", "metrics", "modules", "results", "spectral", "statistics")
"""Subpackages whose code decides what a run stores. The others read what is stored, draw it, or take arguments."""


def describe(value: Any) -> Any:
    """A value as nested lists, dicts with text keys, texts, numbers, booleans and ``None``.

    Dataclasses are their class and fields (those with ``compare=False`` do not count), other objects what their method
    ``identity()`` returns.

    Raises:
        VLMQError: something in it does not say what it is. An object that would be described by its address or by its class
            alone is refused: two runs that differ in it would pass for one.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else repr(float(value))
    if isinstance(value, Enum):
        return [_name(type(value)), value.name]
    if isinstance(value, PurePath | torch.dtype | torch.device):
        return str(value)
    if hasattr(value, "identity") and not isinstance(value, type):
        return {"type": _name(type(value)), "is": describe(value.identity())}
    if is_dataclass(value) and not isinstance(value, type):
        own = {field.name: describe(getattr(value, field.name)) for field in fields(value) if field.compare}
        return {"type": _name(type(value)), **own}
    if isinstance(value, Mapping):
        strangers = [key for key in value if not isinstance(key, str)]
        if strangers:
            raise VLMQError(f"a key that is no text cannot be part of an identity: {strangers[0]!r}")
        return {key: describe(value[key]) for key in sorted(value)}
    if isinstance(value, Set):
        return sorted((describe(entry) for entry in value), key=lambda entry: json.dumps(entry, sort_keys=True))
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [describe(entry) for entry in value]
    raise VLMQError(
        f"a {_name(type(value))} cannot be part of a run's identity: make it a dataclass of its settings, "
        "or give it a method identity() that returns what decides its results"
    )


def digest(value: Any, length: int = 16) -> str:
    """Hash of :func:`describe`: ``length`` hexadecimal digits of SHA-256. Equal for equal descriptions only.

    Raises:
        VLMQError: as :func:`describe`.
    """
    text = json.dumps(describe(value), sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:length]


def first_difference(one: Any, other: Any, where: str = "") -> str | None:
    """Where two descriptions part first, in words: ``"quant.weight_bits was 4, is 8"``; ``None`` for equal ones."""
    if isinstance(one, dict) and isinstance(other, dict):
        nested = ((key, one.get(key), other.get(key)) for key in sorted(one.keys() | other.keys()))
        found = (first_difference(a, b, f"{where}.{key}" if where else key) for key, a, b in nested)
        return next((difference for difference in found if difference is not None), None)
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        found = (first_difference(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(one, other)))
        return next((difference for difference in found if difference is not None), None)
    if one == other and isinstance(one, bool) == isinstance(other, bool):
        return None
    return f"{where or 'identity'} was {_short(one)}, is {_short(other)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


@functools.cache
def library_versions() -> dict[str, str]:
    """Versions of those of :data:`LIBRARIES` that are installed; one that is not has decided nothing."""
    found = {}
    for name in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@functools.cache
def code_digest(packages: tuple[str, ...] = NUMBERS) -> str:
    """Hash of what these subpackages consist of: code, model configs and packaged data, but for weights, which count with the model.

    Comments, docstrings and the layout of lines decide no number: code that differs in these alone has one hash.
    """
    state = hashlib.sha256()
    for package in packages:
        for path in sorted((PACKAGE / package).rglob("*")):
            if path.suffix in (".py", ".json", ".parquet"):
                found = statements_digest(path) if path.suffix == ".py" else file_digest(path)
                state.update(f"{path.relative_to(PACKAGE).as_posix()}\0{found}\n".encode())
    return state.hexdigest()[:16]


@functools.cache
def statements_digest(path: Path) -> str:
    """Hash of what a module's code does, as this Python sees it: of its syntax tree without texts that stand alone.

    These are docstrings, and what is said below a constant. Raises ``OSError``.
    """
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            if isinstance(own := getattr(node, field, None), list):
                setattr(node, field, [part for part in own if not _is_text(part)])
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


def _is_text(node: ast.AST) -> bool:
    """Whether a statement is a text and nothing else."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def file_digest(path: str | os.PathLike[str], length: int = 16) -> str:
    """Hash of a file's bytes, or of a folder's files by name and content: hexadecimal digits of SHA-256. Raises ``OSError``."""
    if Path(path).is_dir():
        files = sorted(file for file in Path(path).rglob("*") if file.is_file())
        return digest([[file.relative_to(path).as_posix(), file_digest(file, 64)] for file in files], length)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:length]


def tensors_digest(tensors: Mapping[str, torch.Tensor], length: int = 16) -> str:
    """Hash of tensors' names, types, shapes and values, ``length`` hexadecimal digits of SHA-256, on whatever device they are."""
    state = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().cpu().contiguous()
        state.update(f"{name} {tuple(values.shape)} {values.dtype}\n".encode())
        state.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()[:length]
