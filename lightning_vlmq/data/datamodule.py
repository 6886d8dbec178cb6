"""What every data source of this package offers: evaluation sets tagged with roles, prompts, and caption pairs."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader, Subset

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.preprocessing import Framing
from lightning_vlmq.data.loaders import SetLoader, Share, TrainLoader, TrainOrder, set_loaders, with_rows
from lightning_vlmq.data.overlap import require_disjoint
from lightning_vlmq.data.sets import Batch, EvalSet, TensorImages, as_is, in_distribution, spurious_pairs

log = logging.getLogger(__name__)

EvalLoader = DataLoader[Batch] | SetLoader


class ReliabilityDataModule(LightningDataModule):
    """Base of all data modules: evaluation sets by role for validation and test, caption pairs for training and calibration.

    A subclass fills ``eval_sets``, ``class_names``, ``templates`` and ``pairs`` in ``setup``. No image of the pairs may be in an
    evaluation set; that is checked before the pairs are used, or earlier by calling :meth:`require_disjoint_pairs`.

    Args:
        batch_size: images per batch when evaluating.
        train_batch_size: image-caption pairs per batch when training or calibrating.
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
        self.allow_zero_length_dataloader_with_multiple_devices = (
            True  # a set may have fewer images than there are processes
        )
        for name, value in (("batch_size", batch_size), ("train_batch_size", train_batch_size)):
            if value < 1:
                raise VLMQError(f"{name} must be at least 1, got {value}")
        if num_workers < 0:
            raise VLMQError(f"num_workers must be at least 0, got {num_workers}")
        self.batch_size = batch_size
        self.train_batch_size = train_batch_size
        self.num_workers = num_workers

    def identity(self) -> dict[str, Any]:
        """What decides the numbers of a run on these data, once they are set up: each set's content and classes, the pairs' content.

        ``train_batch_size`` counts because it is what training and calibration see at once; ``batch_size`` does not, as every
        sample is evaluated by itself, except by methods that say otherwise (``sees_batches``), of whose runs it is a part.
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

    def val_dataloader(self) -> list[EvalLoader]:
        """One loader per evaluation set, in the order of ``eval_sets``; under DDP each sample is seen by exactly one process.

        Batches hold ``rows`` beside what the images bring, see :func:`~.loaders.with_rows`.

        Raises:
            VLMQError: no in-distribution set, a spurious set without its pair, or more processes than images.
        """
        return self._eval_loaders(self.num_workers > 0)

    def _eval_loaders(self, share_workers: bool) -> list[EvalLoader]:
        in_distribution(self.eval_sets)
        spurious_pairs(s.name for s in self.eval_sets if s.role == "spurious")  # before hours are spent on the others
        world, rank = self._processes
        if max(len(s.images) for s in self.eval_sets) < world:
            raise VLMQError(f"{world} processes have no image each to evaluate, no set has as many; use fewer devices")
        samplers = [Share(s.images, rank, world) for s in self.eval_sets]
        images, pin = [s.images for s in self.eval_sets], self._pins
        if share_workers:
            return list(set_loaders(images, samplers, self.batch_size, self.num_workers, pin))
        return [
            DataLoader(
                data,  # type: ignore[arg-type]
                batch_size=self.batch_size,  # by name: Lightning rebuilds loaders for prediction from the names
                sampler=sampler,
                num_workers=self.num_workers,
                pin_memory=pin,
                collate_fn=with_rows,
            )
            for data, sampler in zip(images, samplers)
        ]

    def test_dataloader(self) -> list[EvalLoader]:
        """The same sets as :meth:`val_dataloader`."""
        return self.val_dataloader()

    def predict_dataloader(self) -> list[EvalLoader]:
        """The same sets as :meth:`val_dataloader`, each with processes of its own: Lightning asks these loaders for their rows."""
        return self._eval_loaders(share_workers=False)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled image-caption pairs; batches hold ``image``, ``index`` and ``caption`` (a list of strings).

        Several processes share an epoch as one would see it: batch k of all of them together has the pairs of one process's
        batch k, were its batches as large as theirs together. An epoch that was broken off goes on where it was.

        Raises:
            VLMQError: no pairs, some that are evaluated too, or more processes than pairs.
        """
        pairs: Any = self.require_disjoint_pairs()
        if self.held_out:
            pairs = Subset(pairs, [row for row in range(len(pairs)) if row not in self.held_out])
        world, rank = self._processes
        each, size = len(pairs) // world, self.train_batch_size
        if each == 0:
            raise VLMQError(
                f"{world} processes cannot share {len(pairs)} caption pairs; add pairs or use fewer devices"
            )
        if each < size and len(pairs) % world:
            log.warning(
                "%d of %d caption pairs sit out each epoch, as %d processes share evenly",
                *(len(pairs) % world, len(pairs), world),
            )
        return TrainLoader(
            pairs,
            batch_size=size,
            sampler=TrainOrder(pairs, world, rank, seed=int(os.environ.get("PL_GLOBAL_SEED", 0))),  # seed_everything's
            num_workers=self.num_workers,
            pin_memory=self._pins,
            persistent_workers=self.num_workers > 0,
            drop_last=each >= size,
            collate_fn=as_is,
            done=self._batches_done,
        )

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

    @property
    def _processes(self) -> tuple[int, int]:
        """How many processes share the data, and which one this is."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    @property
    def _pins(self) -> bool:
        """Whether batches are to lie in memory that a GPU copies from by itself: where the run is on one."""
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _batches_done(self) -> int:
        """Batches of the epoch under way that were trained on already: before the checkpoint that a fit goes on from, else none."""
        return 0 if self.trainer is None else int(self.trainer.fit_loop.epoch_loop.batch_progress.current.ready)
