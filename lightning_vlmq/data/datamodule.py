"""What every data source of this package offers: evaluation sets tagged with roles, prompts, and caption pairs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from lightning import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler, Subset

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.preprocessing import Framing
from lightning_vlmq.data.overlap import require_disjoint
from lightning_vlmq.data.sets import Batch, EvalSet, TensorImages, as_is, spurious_pairs


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
    held_out: frozenset[int] = frozenset()
    """Rows of the pairs that are not trained on; whoever trains says which, and counts them among what decides its numbers."""

    def __init__(self, batch_size: int, train_batch_size: int, num_workers: int) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("train_batch_size", train_batch_size)):
            if value < 1:
                raise VLMQError(f"{name} must be at least 1, got {value}")
        self.batch_size = batch_size
        self.train_batch_size = train_batch_size
        self.num_workers = num_workers

    def identity(self) -> dict[str, Any]:
        """What decides the numbers of a run on these data, once they are set up: each set's content and classes, the pairs' content.

        ``train_batch_size`` counts because it is what training and calibration see at once; ``batch_size`` does not, as every
        sample is evaluated by itself.
        """
        return {
            "sets": [{f.name: getattr(s, f.name) for f in fields(s) if f.name != "images"} for s in self.eval_sets],
            "class_names": list(self.class_names),
            "templates": list(self.templates),
            "pairs": None if self.pairs is None else self.pairs.digest(),
            "train_batch_size": self.train_batch_size,
        }

    @property
    def framing(self) -> Framing | None:
        """How the run's model wants images framed; ``None`` outside of a run."""
        vlm = getattr(getattr(self.trainer, "lightning_module", None), "vlm", None)
        return None if vlm is None else vlm.preprocessing.framing

    def follow(self, framing: Framing | None) -> None:
        """Decode images as a model wants them framed. Images in memory stay as they are: the model frames them on its device."""

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """One loader an evaluation set, in the order of ``eval_sets``; under DDP each sample is seen by exactly one process."""
        if not any(s.role == "id" for s in self.eval_sets):
            raise VLMQError(
                "no in-distribution data: add a data set with the role id, every other role is measured against it"
            )
        spurious_pairs(s.name for s in self.eval_sets if s.role == "spurious")  # before hours are spent on the others
        return [self._loader(s.images, self.batch_size, train=False) for s in self.eval_sets]

    def test_dataloader(self) -> list[DataLoader[Batch]]:
        """The same sets as :meth:`val_dataloader`."""
        return self.val_dataloader()

    def predict_dataloader(self) -> list[DataLoader[Batch]]:
        """The same sets as :meth:`val_dataloader`."""
        return self.val_dataloader()

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled image-caption pairs; batches hold ``image``, ``index`` and ``caption`` (a list of strings)."""
        pairs: Any = self.require_disjoint_pairs()
        if self.held_out:
            pairs = Subset(pairs, [row for row in range(len(pairs)) if row not in self.held_out])
        return self._loader(pairs, self.train_batch_size, train=True)

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
                "the data has no caption pairs to calibrate, train or tune on; add some, e.g. --config data/cc3m"
            )
        require_disjoint(self.pairs, self.eval_sets)
        return self.pairs

    def _loader(self, data: Any, batch_size: int, train: bool) -> DataLoader[Batch]:
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        sampler: Any
        if (
            train
        ):  # an epoch's order is a matter of the seed and its number, so that a resumed run goes on as it would have
            seed = int(os.environ.get("PL_GLOBAL_SEED", 0))  # where Lightning keeps seed_everything's
            sampler = DistributedSampler(data, world, rank, seed=seed)
        else:
            sampler = (
                UnrepeatedDistributedSampler(data, world, rank, shuffle=False) if world > 1 else SequentialSampler(data)
            )
        return DataLoader(
            data,
            batch_size=batch_size,  # by name: Lightning rebuilds loaders for prediction from the names
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=train and self.num_workers > 0,  # evaluation has a loader a set: theirs must not pile up
            drop_last=train and len(data) // world >= batch_size,
            collate_fn=as_is,
        )
