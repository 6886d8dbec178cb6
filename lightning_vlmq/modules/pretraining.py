"""Pre-training of the embedded zoo: contrastive learning of image and caption."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from open_clip import CoCa
from open_clip.loss import ClipLoss, CoCaLoss, SigLipLoss
from open_clip.transformer import PatchDropout
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassAccuracy

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data.datamodule import ReliabilityDataModule
from lightning_vlmq.models import load_vlm, zoo
from lightning_vlmq.models.vlm import VLM

MAX_LOG_SCALE = math.log(100)  # Radford et al. 2021, section 2.5: the scale is clipped at 100
CAPTION_WEIGHT = 2.0  # as Yu et al. 2022 and open_clip train CoCa: captioning counts twice as much as contrast


class PretrainingModule(LightningModule):
    """Trains a zoo model from scratch with the loss of its family, see :func:`family_loss`.

    Logs ``train/loss`` and, a validation, ``val/<data set>/top1`` (and ``top5`` of the in-distribution set) for every labelled
    evaluation set, each among its own class names.

    Args:
        vlm: name of a zoo model.
        lr: peak learning rate of AdamW; linear warm-up, then cosine decay to zero, a step each.
        weight_decay: applied to matrix weights only.
        warmup: share of all steps that warm up.
        flip: probability of mirroring a training image.
        sizes: progressive resizing (Touvron et al. 2019; Tan & Le 2021): pairs of a share of the training and the pixels that images
            are shrunk to (by areas) from there on; a convolutional tower learns several times faster from small images. Full
            size before the first share.
        dropped_patches: likewise, pairs of a share and the share of patches that a vision transformer of open_clip does not look at
            from there on (Li et al. 2023, FLIP).
        text_from: name of a zoo model whose trained text tower (and logit scale) this one starts from; every tensor must fit.
        teacher: name of a zoo model whose image and text features this one's are drawn to as well, on every second image and
            caption of a batch, so that both live in one space (Wu et al. 2023, TinyCLIP; Vasu et al. 2024, MobileCLIP).
        teacher_weight: of that loss, a tower's mean of one less the cosine.
        prototype_weight: of a second loss, cross-entropy of image and text features over learned prototypes, one per concept, which
            are not kept (Yang et al. 2022, UniCL, brings labels into contrast likewise). Both towers have a common goal from the
            first step, which saves most of the time that small towers take to find each other. Needs ``concept`` in the batches.
        n_prototypes: how many concepts there are.
        prototype_scale: factor of the cosines in that cross-entropy (Wang et al. 2017, NormFace). At the scale that contrast learns,
            about 40, a small margin is enough and sixty dimensions hold a thousand concepts; a small factor asks for right angles.
            None takes the scale that contrast learns.
        fixed_dims: how many of a prototype's dimensions stay as drawn at random (Hoffer et al. 2018, Fix your classifier), with their
            share of its length. Learned prototypes settle in few dimensions and features follow them, so that high ranks hold
            nothing (Papyan et al. 2020, neural collapse); fixed ones tell every concept from every other in dimensions of their own.
    """

    def __init__(
        self,
        vlm: str,
        lr: float = 2e-3,
        weight_decay: float = 0.1,
        warmup: float = 0.1,
        flip: float = 0.5,
        sizes: Sequence[tuple[float, int]] = (),
        dropped_patches: Sequence[tuple[float, float]] = (),
        text_from: str | None = None,
        teacher: str | None = None,
        teacher_weight: float = 10.0,
        prototype_weight: float = 0.0,
        n_prototypes: int = 0,
        prototype_scale: float | None = None,
        fixed_dims: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.sizes, self.dropped_patches = sizes, dropped_patches
        self.text_from, self.teacher_name, self.teacher_weight = text_from, teacher, teacher_weight
        if not 0 < warmup < 1:
            raise VLMQError(f"warmup is a share of all steps and must lie between 0 and 1, got {warmup}")
        self.vlm = zoo.build(vlm)
        self.vlm.model.output_dict = True  # features by name, as open_clip's losses take them
        self.prototype_weight, self.prototype_scale = prototype_weight, prototype_scale
        self.prototypes = None
        if prototype_weight:
            dim = self.vlm.encode_text(self.vlm.tokenize([""])).shape[-1]
            if not 0 <= fixed_dims < dim:
                raise VLMQError(f"fixed_dims must lie in [0, {dim}), the width of '{vlm}', got {fixed_dims}")
            self.prototypes = nn.Parameter(torch.randn(n_prototypes, dim - fixed_dims) * dim**-0.5)
            code = torch.randn(
                n_prototypes, fixed_dims, generator=torch.Generator().manual_seed(0)
            )  # a student's is its teacher's
            self.register_buffer("fixed_code", F.normalize(code, dim=-1) * (fixed_dims / dim) ** 0.5)
        self.lr, self.weight_decay, self.warmup, self.flip = lr, weight_decay, warmup, flip

    def setup(self, stage: str) -> None:
        """Create the loss, which gathers features across processes, and one accuracy an evaluation set."""
        data = self.data
        self.loss = family_loss(self.vlm.model, self.global_rank, self.trainer.world_size)
        self.vlm.model.visual.to(memory_format=torch.channels_last)  # faster on CPUs, the same numbers up to rounding
        if stage == "fit" and self.text_from is not None:
            copy_text_tower(load_vlm(self.text_from), self.vlm)
        self.teachers = (
            [] if self.teacher_name is None else [load_vlm(self.teacher_name).requires_grad_(False)]
        )  # not saved
        self.accuracy = {}
        for s in data.eval_sets:
            n_classes = len(s.class_names or data.class_names)
            for k in (1, 5) if s.role == "id" and n_classes > 5 else (1,):
                metric = MulticlassAccuracy(n_classes, top_k=k, average="micro").to(self.device)
                self.accuracy[s.name, f"top{k}"] = metric

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
        seen = self._shrunk(images)
        outputs = self.vlm.model(seen, tokens)
        parts = self.loss(**outputs, output_dict=True)
        if self.prototypes is not None:
            parts["prototypes"] = self.prototype_weight * self._to_prototypes(outputs, batch["concept"])
        for teacher in self.teachers:
            distance = self._to_teacher(teacher, outputs, images, batch["caption"])
            self.log("train/teacher", distance, batch_size=len(images))
            parts["teacher"] = self.teacher_weight * distance
        loss = torch.stack(list(parts.values())).sum()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def _to_prototypes(self, outputs: dict[str, Tensor], concept: Tensor) -> Tensor:
        """Cross-entropy of both towers' features over the prototypes; a pair that tells no concept (-1) does not count."""
        assert self.prototypes is not None and isinstance(self.fixed_code, Tensor)
        learned = F.normalize(self.prototypes, dim=-1) * (1 - self.fixed_code.square().sum(-1, keepdim=True)).sqrt()
        scale = self.vlm.logit_scale() if self.prototype_scale is None else self.prototype_scale
        scaled = scale * torch.cat([self.fixed_code, learned], dim=-1).T
        losses = [
            F.cross_entropy(outputs[f"{tower}_features"] @ scaled, concept, ignore_index=-1)
            for tower in ("image", "text")
        ]
        return torch.stack(losses).sum()

    def _to_teacher(self, teacher: VLM, outputs: dict[str, Tensor], images: Tensor, captions: list[str]) -> Tensor:
        """One less the cosine between a tower's features and the teacher's: the mean over every second pair, both towers' sum."""
        half = slice(None, None, 2)
        with torch.no_grad():
            teacher.to(self.device)
            image = teacher.encode_image(images[half])
            text = teacher.encode_text(teacher.tokenize(captions[half]).to(self.device))
        pairs = (("image_features", image), ("text_features", text))
        return torch.stack([(1 - (outputs[key][half] * target).sum(-1)).mean() for key, target in pairs]).sum()

    def _shrunk(self, images: Tensor) -> Tensor:
        """Images as this point of the schedules wants them, ready for the model."""
        done = self.global_step / max(int(self.trainer.estimated_stepping_batches), 1)
        x = self.vlm.preprocess(images)
        pixels = _current(self.sizes, done)
        if pixels is not None and pixels < x.shape[-1]:
            x = F.interpolate(x, (int(pixels), int(pixels)), mode="area")
        if self.dropped_patches:
            self.vlm.model.visual.patch_dropout = PatchDropout(_current(self.dropped_patches, done) or 0.0)
        return x.contiguous(memory_format=torch.channels_last)

    def on_train_batch_end(self, *args: object) -> None:
        """Clip the logit scale."""
        with torch.no_grad():
            self.vlm.model.logit_scale.clamp_(max=MAX_LOG_SCALE)

    def on_validation_epoch_start(self) -> None:
        """Build the zero-shot classifier of the current weights."""
        with torch.no_grad():
            data = self.data
            names = {s.name: tuple(s.class_names or data.class_names) for s in data.eval_sets}
            classifiers = {n: self.vlm.class_features(n, data.templates) for n in set(names.values())}
            self.classifiers = {name: classifiers[n] for name, n in names.items()}

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count correct zero-shot predictions."""
        inside = self.data.eval_sets[dataloader_idx].name
        logits = self.vlm.zero_shot_logits(self.vlm.encode_image(batch["image"]), self.classifiers[inside])
        for (name, _), accuracy in self.accuracy.items():
            if name == inside:
                accuracy.update(logits, batch["target"])

    def on_validation_epoch_end(self) -> None:
        """Log the accuracies."""
        for (name, kind), accuracy in self.accuracy.items():
            self.log(f"val/{name}/{kind}", accuracy.compute(), prog_bar=True)
            accuracy.reset()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW (Loshchilov & Hutter 2019) with warm-up and cosine decay."""
        parameters = [*self.vlm.parameters(), *([] if self.prototypes is None else [self.prototypes])]
        parameters = [p for p in parameters if p.requires_grad]
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


def _current(schedule: Sequence[tuple[float, float]], done: float) -> float | None:
    """The value of the last entry whose share is done; ``None`` before the first."""
    return next((value for share, value in reversed(schedule) if done >= share), None)


def copy_text_tower(source: VLM, target: VLM) -> None:
    """Copy the text tower's weights, and the logit scale, from one model to another, in place.

    Raises:
        VLMQError: a tensor of the target's text tower has no equal in the source.
    """
    theirs = source.state_dict()
    for name, tensor in target.state_dict().items():
        if (target.tower_of(name) == "text" and not target.in_decoder(name)) or name == "model.logit_scale":
            if name not in theirs or theirs[name].shape != tensor.shape:
                raise VLMQError(
                    f"the text tower of '{source.name}' does not fit '{target.name}': no '{name}' of its shape"
                )
            tensor.copy_(theirs[name])


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
