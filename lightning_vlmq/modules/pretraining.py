"""Pre-training of the embedded zoo: contrastive learning of image and caption."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from open_clip import CoCa
from open_clip.loss import ClipLoss, CoCaLoss, SigLipLoss
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassAccuracy

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data.datamodule import ReliabilityDataModule
from lightning_vlmq.models import zoo

MAX_LOG_SCALE = math.log(100)  # Radford et al. 2021, section 2.5: the scale is clipped at 100
CAPTION_WEIGHT = 2.0  # as Yu et al. 2022 and open_clip train CoCa: captioning counts twice as much as contrast


class PretrainingModule(LightningModule):
    """Trains a zoo model from scratch with the loss of its family, see :func:`family_loss`.

    Logs ``train/loss`` and, an epoch, ``val/<data set>/top1`` for every labelled evaluation set.

    Args:
        vlm: name of a zoo model.
        lr: peak learning rate of AdamW; linear warm-up, then cosine decay to zero, a step each.
        weight_decay: applied to matrix weights only.
        warmup: share of all steps that warm up.
        flip: probability of mirroring a training image.
    """

    def __init__(
        self, vlm: str, lr: float = 2e-3, weight_decay: float = 0.1, warmup: float = 0.1, flip: float = 0.5
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if not 0 < warmup < 1:
            raise VLMQError(f"warmup is a share of all steps and must lie between 0 and 1, got {warmup}")
        self.vlm = zoo.build(vlm)
        self.vlm.model.output_dict = True  # features by name, as open_clip's losses take them
        self.reference = None
        self.lr, self.weight_decay, self.warmup, self.flip = lr, weight_decay, warmup, flip

    def setup(self, stage: str) -> None:
        """Create the loss, which gathers features across processes, and one accuracy an evaluation set."""
        data = self.data
        self.loss = family_loss(self.vlm.model, self.global_rank, self.trainer.world_size)
        n_classes = len(data.class_names)
        self.accuracy = {s.name: MulticlassAccuracy(n_classes, average="micro").to(self.device) for s in data.eval_sets}

    @property
    def data(self) -> ReliabilityDataModule:
        """The data module of this run."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """One step on a batch of ``image`` uint8 ``[b, 3, h, w]`` and ``caption`` (``b`` strings); returns the scalar loss."""
        images = batch["image"]
        mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < self.flip
        images = torch.where(mirrored, images.flip(-1), images)
        tokens = self.vlm.tokenize(batch["caption"]).to(self.device)
        parts = self.loss(**self.vlm.model(self.vlm.preprocess(images), tokens), output_dict=True)
        loss = torch.stack(list(parts.values())).sum()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def on_train_batch_end(self, *args: object) -> None:
        """Clip the logit scale."""
        with torch.no_grad():
            self.vlm.model.logit_scale.clamp_(max=MAX_LOG_SCALE)

    def on_validation_epoch_start(self) -> None:
        """Build the zero-shot classifier of the current weights."""
        with torch.no_grad():
            self.classifier = self.vlm.class_features(self.data.class_names, self.data.templates)

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count correct zero-shot predictions."""
        logits = self.vlm.zero_shot_logits(self.vlm.encode_image(batch["image"]), self.classifier)
        self.accuracy[self.data.eval_sets[dataloader_idx].name].update(logits, batch["target"])

    def on_validation_epoch_end(self) -> None:
        """Log top-1 an evaluation set."""
        for name, accuracy in self.accuracy.items():
            self.log(f"val/{name}/top1", accuracy.compute(), prog_bar=True)
            accuracy.reset()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW (Loshchilov & Hutter 2019) with warm-up and cosine decay."""
        parameters = list(self.vlm.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.98))
        total = int(self.trainer.estimated_stepping_batches)
        warm = max(int(self.warmup * total), 1)

        def factor(step: int) -> float:
            return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(step - warm, 0) / max(total - warm, 1))))

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


def family_loss(model: nn.Module, rank: int = 0, world_size: int = 1) -> nn.Module:
    """The loss that a model's family is trained with, over the features of all processes.

    CoCa: contrast and captioning (Yu et al. 2022, equation 4). A model with a bias on its logits: SigLIP's sigmoid loss of every
    pair (Zhai et al. 2023, section 3.2). Others: CLIP's symmetric cross-entropy (Radford et al. 2021, figure 3).

    Args:
        model: an open_clip model.
        rank: this process.
        world_size: number of processes.

    Returns:
        A module that takes the model's outputs by name and, with ``output_dict=True``, gives the scalar parts of the loss by name.
    """
    if isinstance(model, CoCa):
        return CoCaLoss(CAPTION_WEIGHT, 1.0, gather_with_grad=True, rank=rank, world_size=world_size)
    if getattr(model, "logit_bias", None) is not None:
        return SigLipLoss(rank=rank, world_size=world_size)
    return ClipLoss(gather_with_grad=True, rank=rank, world_size=world_size)
