"""Quantization-aware training: a quantized student distilled from its full-precision teacher on caption pairs."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.modules.evaluation import EvaluationModule
from lightning_vlmq.quant import METHODS, QATMethod


class QATModule(EvaluationModule):
    """Trains the quantized model of an :class:`EvaluationModule`, whose validation then judges the result.

    The teacher never changes and sees the same pairs every epoch, so its features are computed once. Under DDP the contrastive loss
    sees the features of all processes. Logs, at every update, ``train/loss`` and its parts
    (``train/loss/contrastive``, ``train/loss/feature``) and both rates (``train/weight_lr``, ``train/step_lr``).

    Args:
        weight_lr: peak learning rate of Adam on weights, in quantization steps of each weight per update; cosine decay to zero,
            as for the steps. See :meth:`~lightning_vlmq.quant.QATMethod.parameter_groups`.
        weight_decay: decoupled, on matrix weights only.
        step_lr: peak learning rate of quantization steps and offsets, relative to each step's size.
        kwargs: as :class:`EvaluationModule`; ``quant.method`` has to be one that trains.
    """

    def __init__(
        self, *args: Any, weight_lr: float = 1e-3, weight_decay: float = 0.0, step_lr: float = 0.01, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.save_hyperparameters(ignore=["evaluators"])
        if self.scheme is None or not self.quant.chosen().needs_training:
            trained = ", ".join(name for name in METHODS if METHODS[name].needs_training)
            raise VLMQError(
                f"method '{self.quant.method}' has nothing to train; use 'vlmq validate', or one of {trained}"
            )
        self.weight_lr, self.weight_decay, self.step_lr = weight_lr, weight_decay, step_lr

    @property
    def method(self) -> QATMethod:
        """The method that quantized the model."""
        assert self.quantized is not None and isinstance(self.quantized.method, QATMethod)
        return self.quantized.method

    def identity(self) -> dict[str, Any]:
        """As :meth:`EvaluationModule.identity`, and the rates."""
        return {
            **super().identity(),
            "weight_lr": self.weight_lr,
            "weight_decay": self.weight_decay,
            "step_lr": self.step_lr,
        }

    def on_fit_start(self) -> None:
        """Run the teacher over all pairs: features ``[pairs, dim]`` of images and of captions, and the captions' tokens."""
        assert self.reference is not None and self.scheme is not None
        batches = self.data.calibration_batches()
        with torch.no_grad():
            tokens = [self.vlm.tokenize(b["caption"]) for b in batches]
            self.tokens = torch.cat(tokens).to(self.device)
            self.teacher_image = torch.cat([self.reference.encode_image(b["image"].to(self.device)) for b in batches])
            self.teacher_text = torch.cat([self.reference.encode_text(t.to(self.device)) for t in tokens])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Distil on a batch of ``image`` uint8 ``[b, 3, h, w]`` and ``index`` int64 ``[b]``; returns the scalar loss."""
        assert self.reference is not None and self.scheme is not None
        index = batch["index"].to(self.device)
        teacher_image, teacher_text = self.teacher_image[index], self.teacher_text[index]
        image = self.vlm.encode_image(batch["image"])
        text = self.vlm.encode_text(self.tokens[index]) if "text" in self.scheme.towers else teacher_text
        if self.trainer.world_size > 1:
            image, text, teacher_image, teacher_text = map(self._gather, (image, text, teacher_image, teacher_text))
        parts = self.method.loss_parts(image, text, teacher_image, teacher_text, self.reference.logit_scale())
        loss = torch.stack(list(parts.values())).sum()
        if not torch.isfinite(loss):
            raise VLMQError(
                f"training diverged at step {self.global_step} (loss {float(loss)}); lower model.weight_lr or model.step_lr"
            )
        decay = self._decay(self.global_step)
        told: dict[str, Any] = {f"train/loss/{name}": part.detach() for name, part in parts.items()}
        told |= {"train/weight_lr": self.weight_lr * decay, "train/step_lr": self.step_lr * decay}
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(index))
        self.log_dict(told, batch_size=len(index))
        return loss

    def _gather(self, features: Tensor) -> Tensor:
        """Features ``[b, dim]`` of all processes as ``[processes * b, dim]``; gradients flow back to where they came from."""
        gathered = self.all_gather(features, sync_grads=features.requires_grad)
        assert isinstance(gathered, Tensor)
        return gathered.flatten(0, 1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW (Loshchilov & Hutter 2019) with cosine decay, in the method's parameter groups."""
        groups = self.method.parameter_groups(self.vlm, self.weight_lr, self.weight_decay, self.step_lr)
        optimizer = torch.optim.AdamW(groups, weight_decay=self.weight_decay)
        optimizer.register_step_post_hook(lambda *_: self.method.keep_steps_positive(self.vlm))
        scheduler = LambdaLR(optimizer, lambda step: self._decay(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _decay(self, step: int) -> float:
        """Share of the peak rates at an update."""
        total = max(int(self.trainer.estimated_stepping_batches), 1)
        return 0.5 * (1 + math.cos(math.pi * min(step / total, 1)))
