"""Evaluation sets: images, columns, and the role that each set plays."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_vlmq.core.errors import VLMQError, unknown
from lightning_vlmq.core.roles import ROLES
from lightning_vlmq.data.images.fingerprints import Fingerprints, shown

Batch = dict[str, Any]


class ImageSet(Protocol):
    """Images of a data set, in memory (:class:`TensorImages`) or decoded when asked for (``data.images.FileImages``)."""

    def __len__(self) -> int: ...

    def __getitems__(self, rows: list[int]) -> Batch:
        """A batch: ``image`` uint8 ``[b, 3, height, width]``, ``index`` int64 ``[b]``, and each further column's ``b`` values."""
        ...

    def digest(self) -> str:
        """A short hash of what decides the batches; equal only for equal sets."""
        ...

    def fingerprints(self) -> Mapping[str, Fingerprints]:
        """How to recognise the images, by level of :data:`~lightning_vlmq.data.images.fingerprints.LEVELS`; ``shown`` is always there."""
        ...


class TensorImages(Dataset[Batch]):
    """Images held in memory, with one value of each further column per image.

    Args:
        images: uint8 ``[n, 3, height, width]``.
        columns: tensors ``[n, ...]`` or lists of ``n`` strings.
    """

    def __init__(self, images: Tensor, **columns: Tensor | list[str]) -> None:
        self.images = images
        self.columns = columns

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Batch:
        return {"image": self.images[i], "index": i, **{k: v[i] for k, v in self.columns.items()}}

    def __getitems__(self, rows: list[int]) -> Batch:
        """A whole batch by one indexing operation, which DataLoader prefers over ``n`` calls of ``__getitem__``."""
        index = torch.tensor(rows)
        batch: Batch = {"image": self.images[index], "index": index}
        for name, column in self.columns.items():
            batch[name] = column[index] if isinstance(column, Tensor) else [column[i] for i in rows]
        return batch

    def digest(self) -> str:
        """A hash of the pixels and columns."""
        state = hashlib.sha256(f"{tuple(self.images.shape)}\n".encode() + self.images.numpy().tobytes())
        for name, column in sorted(self.columns.items()):
            values = column.numpy().tobytes() if isinstance(column, Tensor) else "\0".join(column).encode()
            state.update(f"{name} {len(values)}\n".encode() + values)
        return state.hexdigest()[:16]

    def fingerprints(self) -> Mapping[str, Fingerprints]:
        """How to recognise the images: by their pixels."""
        return {"shown": shown(self.images)}


@dataclass(frozen=True)
class EvalSet:
    """One evaluation data set.

    Attributes:
        name: unique within a data module; for the ``spurious`` role ``<x>_common`` and ``<x>_counter`` make a pair.
        role: one of :data:`ROLES`.
        images: the samples; batches hold ``image``, ``index`` and ``target`` (class index, -1 in OOD sets).
        corruption: name of the corruption or rendition, empty where there is none.
        severity: 1..5; 0 of images as they are.
        class_names: the set's own classes, where they are not the data module's.
        templates: the prompts that go with them; the data module's if not given.
        classes: the classes that can be predicted, as indices into the class names, where they are not all of them.
            ``target`` counts along this tuple.
        group: sets with the same group show the same scenes in the same order, sample i of one is sample i of the other: corruptions
            of the same images, drawings on two backgrounds. They are resampled together, all others independently. Of a group
            of corrupted sets, the one of severity 0 holds the originals: ``corruption`` role and name ``<suite>_clean``, or the id set.
    """

    name: str
    role: str
    images: ImageSet
    corruption: str = ""
    severity: int = 0
    class_names: tuple[str, ...] | None = None
    templates: tuple[str, ...] | None = None
    classes: tuple[int, ...] | None = None
    group: str = ""
    digest: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise unknown("role", self.role, ROLES)
        if len(self.images) == 0:
            raise VLMQError(f"data set '{self.name}' ({self.role}) is empty; check its path or leave it out")
        object.__setattr__(self, "digest", self.images.digest())

    def identity(self) -> dict[str, Any]:
        """Every field, the images by their digest."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "images"}
        return {**own, "digest": self.digest}


def in_distribution(sets: Iterable[EvalSet]) -> EvalSet:
    """The set that every other one is measured against, the first of the role ``id``.

    Raises:
        VLMQError: there is none.
    """
    for s in sets:
        if s.role == "id":
            return s
    raise VLMQError("no in-distribution data: add a data set with the role id, every other role is measured against it")


def as_is(batch: Any) -> Any:
    """A loader's collation where ``__getitems__`` has collated already."""
    return batch


def spurious_pairs(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Names of the sets ``<pair>_common`` and ``<pair>_counter`` by pair: where the cue goes with the class, and where against it.

    Raises:
        VLMQError: a set is without its counterpart.
    """
    names = set(names)
    pairs = sorted(name.removesuffix("_common") for name in names if name.endswith("_common"))
    found = {pair: (f"{pair}_common", f"{pair}_counter") for pair in pairs}
    lonely = names.symmetric_difference(name for both in found.values() for name in both)
    if lonely:
        raise VLMQError(
            f"spurious sets come in pairs <x>_common and <x>_counter; one of a pair is missing: {', '.join(sorted(lonely))}"
        )
    return found
