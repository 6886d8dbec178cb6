"""What every data source of this package offers: evaluation sets tagged with roles, prompts, and caption pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from lightning import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler, SequentialSampler

from lightning_vlmq.data.overlap import Fingerprints, require_disjoint, shown
from lightning_vlmq.errors import VLMQError

ROLES = ("id", "near_ood", "far_ood", "corruption", "shift", "spurious")
OOD_ROLES = ("near_ood", "far_ood")
Batch = dict[str, Any]


class ImageSet(Protocol):
    """Images of a data set, in memory (:class:`TensorImages`) or decoded when asked for (``data.files.FileImages``)."""

    def __len__(self) -> int: ...

    def __getitems__(self, rows: list[int]) -> Batch:
        """A batch: ``image`` uint8 ``[b, 3, height, width]``, ``index`` int64 ``[b]``, and each further column's ``b`` values."""
        ...

    def digest(self) -> str:
        """A short hash of what decides the batches; equal only for equal sets."""
        ...

    def fingerprints(self) -> Mapping[str, Fingerprints]:
        """How to recognise the images, by level of :data:`~lightning_vlmq.data.overlap.LEVELS`; ``shown`` is always there."""
        ...


class TensorImages(Dataset[Batch]):
    """Images held in memory, with one value of each further column an image.

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
        state = hashlib.sha256(self.images.numpy().tobytes())
        for name, column in sorted(self.columns.items()):
            state.update(
                name.encode() + (column.numpy().tobytes() if isinstance(column, Tensor) else "\0".join(column).encode())
            )
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
        severity: 1..5, or 0.
        class_names: the set's own classes, where they are not the data module's.
        templates: the prompts that go with them; the data module's if not given.
        classes: the classes that can be predicted, as indices into the class names, where they are not all of them.
            ``target`` counts along this tuple.
    """

    name: str
    role: str
    images: ImageSet
    corruption: str = ""
    severity: int = 0
    class_names: tuple[str, ...] | None = None
    templates: tuple[str, ...] | None = None
    classes: tuple[int, ...] | None = None
    digest: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise VLMQError(f"data set '{self.name}' has the role '{self.role}'; use one of {', '.join(ROLES)}")
        if len(self.images) == 0:
            raise VLMQError(f"data set '{self.name}' ({self.role}) is empty; check its path or leave it out")
        object.__setattr__(self, "digest", self.images.digest())


class ReliabilityDataModule(LightningDataModule):
    """Base of all data modules: evaluation sets by role for validation and test, caption pairs for training and calibration.

    A subclass fills ``eval_sets``, ``class_names``, ``templates`` and ``pairs`` in ``setup``. No image of the pairs may be in an
    evaluation set; that is checked before the pairs are used, or earlier by calling :meth:`require_disjoint_pairs`.

    Args:
        batch_size: images a batch when evaluating.
        train_batch_size: image-caption pairs a batch when training or calibrating.
        num_workers: loader processes.
    """

    eval_sets: list[EvalSet]
    class_names: Sequence[str]
    templates: Sequence[str]
    pairs: TensorImages | None = None

    def __init__(self, batch_size: int, train_batch_size: int, num_workers: int) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("train_batch_size", train_batch_size)):
            if value < 1:
                raise VLMQError(f"{name} must be at least 1, got {value}")
        self.batch_size = batch_size
        self.train_batch_size = train_batch_size
        self.num_workers = num_workers

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """One loader an evaluation set, in the order of ``eval_sets``; under DDP each sample is seen by exactly one process."""
        if not any(s.role == "id" for s in self.eval_sets):
            raise VLMQError(
                "no in-distribution data: add a data set with the role id, every other role is measured against it"
            )
        return [self._loader(s.images, self.batch_size, train=False) for s in self.eval_sets]

    def test_dataloader(self) -> list[DataLoader[Batch]]:
        """The same sets as :meth:`val_dataloader`."""
        return self.val_dataloader()

    def predict_dataloader(self) -> list[DataLoader[Batch]]:
        """The same sets as :meth:`val_dataloader`."""
        return self.val_dataloader()

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled image-caption pairs; batches hold ``image``, ``index`` and ``caption`` (a list of strings)."""
        return self._loader(self.require_disjoint_pairs(), self.train_batch_size, train=True)

    def calibration_batches(self) -> list[Batch]:
        """All caption pairs, unshuffled and on every process alike: what post-training quantization calibrates on."""
        return list(DataLoader(self.require_disjoint_pairs(), self.train_batch_size, collate_fn=as_is))

    def require_disjoint_pairs(self) -> TensorImages:
        """The caption pairs, none of whose images is in an evaluation set.

        Raises:
            VLMQError: there are no pairs, or some of them are evaluated too.
        """
        if self.pairs is None:
            raise VLMQError(
                "the data has no caption pairs to calibrate, train or tune on; add some, e.g. --config configs/data/cc3m.yaml"
            )
        require_disjoint(self.pairs, self.eval_sets)
        return self.pairs

    def _loader(self, data: Any, batch_size: int, train: bool) -> DataLoader[Batch]:
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        sampler: Any
        if train:
            sampler = DistributedSampler(data, world, rank) if world > 1 else RandomSampler(data)
        else:
            sampler = (
                UnrepeatedDistributedSampler(data, world, rank, shuffle=False) if world > 1 else SequentialSampler(data)
            )
        return DataLoader(
            data,
            batch_size=batch_size,  # by name: Lightning rebuilds loaders for prediction from the names
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=train and self.num_workers > 0,  # evaluation has a loader a set: theirs must not pile up
            drop_last=train and len(data) // world >= batch_size,
            collate_fn=as_is,
        )


def as_is(batch: Any) -> Any:
    """A loader's collation where ``__getitems__`` has collated already."""
    return batch
