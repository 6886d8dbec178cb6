"""Quantization-aware training: a quantized student distilled from its full-precision teacher on caption pairs."""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from dataclasses import asdict
from fractions import Fraction
from statistics import median
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.evaluation.digests import tower_digests
from lightning_vlmq.evaluation.results import model_rows
from lightning_vlmq.evaluation.subject import calibration
from lightning_vlmq.evaluation.tuning import encode_pairs
from lightning_vlmq.modules.evaluation import EvaluationModule
from lightning_vlmq.quant import METHODS, QATMethod
from lightning_vlmq.quant.quantized import measured_again
from lightning_vlmq.quant.scheme import FULL_PRECISION
from lightning_vlmq.quant.training import default_rates
from lightning_vlmq.quant.trajectory import GridRecord, Grids, GridWatch, learned_grids

log = logging.getLogger(__name__)


class QATModule(EvaluationModule):
    """Trains the quantized model of an :class:`EvaluationModule`, whose validation then judges the result.

    The teacher never changes and sees the same pairs every epoch, so its features are computed once, and kept for other fits of the
    same model; the contrastive loss tells the pairs of a batch from them, or (``quant.method.contrast: batch``) from one another, under
    DDP from those of all processes. The student runs in evaluation mode: no dropout, normalised by full precision's statistics.

    A share of the pairs is not trained on. The loss on these is measured before training and after every epoch, and the state
    with the least of them is what remains at the end, the start included: training cannot make a model worse in what it is
    trained for, as far as these pairs tell. As they choose the state, its loss on them is a little too good; a run's ``kl`` on the
    evaluation sets is not, as no evaluation data are looked at.

    Logs ``train/loss``, its parts (``train/loss/contrastive``, ``train/loss/feature``), the learning rate of each kind of parameter
    (``train/lr/<kind>``, the median where every tensor has its own), and whenever the trainer logs: median and largest
    relative change of steps and offsets since the start (``train/change/<kind>/median``) and clipped shares
    (``train/clipped/weights``, ``train/clipped/inputs``); each epoch ``train/held_out_loss``.

    Args:
        weight_lr: peak learning rate of Adam on weights, in quantization steps of each weight per update; cosine decay to zero,
            as for the steps. See :meth:`~lightning_vlmq.quant.QATMethod.parameter_groups`. None takes the rate
            for these bits, :func:`~lightning_vlmq.quant.training.default_rates`.
        weight_decay: decoupled, on matrix weights only.
        step_lr: peak learning rate of quantization steps and offsets, relative to each step's size; of weights' steps as if they had
            4 bits, see there. None as for weights.
        held_out: share of the caption pairs that is not trained on, evenly spread; 0 trains on all and keeps the last state, as does,
            with a warning, a share that comes to fewer than two pairs.
        kwargs: as :class:`EvaluationModule`; ``quant.method`` has to be one that trains. A ``checkpoint`` is judged, not trained.

    Attributes:
        held_out_losses: on the held-out pairs, before training and after each epoch.
        trajectory: the learned grids, whenever the trainer logged.
    """

    def __init__(
        self,
        *args: Any,
        weight_lr: float | None = None,
        weight_decay: float = 0.0,
        step_lr: float | None = None,
        held_out: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.save_hyperparameters(ignore=["evaluators"])
        if self.scheme is None or not self.quant.chosen().needs_training:
            trained = ", ".join(name for name in METHODS if METHODS[name].needs_training)
            raise VLMQError(
                f"method '{self.quant.method}' has nothing to train; use 'vlmq validate', or one of {trained}"
            )
        if not 0 <= held_out <= 0.5:
            raise VLMQError(f"held_out is a share of the caption pairs, 0 to 0.5; got {held_out!r}")
        rates = default_rates(self.scheme.weight_bits)
        self.weight_lr = rates[0] if weight_lr is None else weight_lr
        self.step_lr = rates[1] if step_lr is None else step_lr
        self.weight_decay, self.held_out = weight_decay, held_out
        self.held_out_losses: list[float] = []
        self.trajectory: list[GridRecord] = []
        self._start: Grids = []
        self._best: dict[str, Tensor] = {}
        self._measured_at = 0

    @property
    def method(self) -> QATMethod:
        """The method that quantized the model."""
        assert self.quantized is not None and isinstance(self.quantized.method, QATMethod)
        return self.quantized.method

    def identity(self) -> dict[str, Any]:
        """As :meth:`EvaluationModule.identity`, the rates, and what is not trained on."""
        return {
            **super().identity(),
            "weight_lr": self.weight_lr,
            "weight_decay": self.weight_decay,
            "step_lr": self.step_lr,
            "held_out": self.held_out,
        }

    def setup(self, stage: str) -> None:
        """As :meth:`EvaluationModule.setup`, and keep some pairs from being trained on.

        Raises:
            VLMQError: a saved model is given to be trained: it does not hold what a fit goes on from.
        """
        if stage == "fit" and self.checkpoint is not None:
            raise VLMQError(
                f"model.checkpoint '{self.checkpoint}' is a finished model, which is judged, not trained: leave it out. To go on with a "
                "training, give --ckpt_path a checkpoint of the trainer's; to train from a solution without training, choose the method's "
                "start, e.g. --model.quant.method \"lsq_contrastive(weights='gptq')\""
            )
        super().setup(stage)
        if stage != "fit":
            return
        pairs = len(self.data.require_disjoint_pairs())
        rows = held_out_rows(pairs, self.held_out)
        if self.held_out and len(rows) < 2:  # one pair has no other to be told from
            log.warning(
                f"held_out {self.held_out} of {pairs} caption pairs leaves {len(rows)} to tell training by, which takes 2: it is "
                "trained on all of them, and the last state is kept"
            )
            rows = []
        self.data.held_out = frozenset(rows)
        self._start = learned_grids(self.vlm)  # of a resumed fit its checkpoint's, which is loaded after this

    def on_fit_start(self) -> None:
        """Take the teacher's features ``[pairs, dim]`` of images and of captions, which all fits of a model share, and the tokens."""
        assert self.reference is not None and self.scheme is not None
        batches = self.data.calibration_batches()
        self.tokens = torch.cat([self.vlm.tokenize(b["caption"]) for b in batches]).to(self.device)
        towers = tower_digests(self.reference, None, FULL_PRECISION, self.trainer)
        self.cache.lasting |= set(towers.values())
        teacher = encode_pairs(self.reference.to(self.device).eval(), self.data, self.cache, towers)
        self.teacher_image = teacher.images.to(self.device)
        self.teacher_text = teacher.texts[teacher.caption].to(self.device)
        rows = sorted(self.data.held_out)
        trained = torch.ones(len(self.teacher_image), dtype=torch.bool, device=self.device)
        trained[rows] = False
        self._trained_pairs = self.teacher_image[trained], self.teacher_text[trained]
        self._held_out_rows = torch.tensor(rows, dtype=torch.int64, device=self.device)
        if rows:
            images = torch.cat([b["image"] for b in batches])
            self._held_out_images = images[rows].to(self.device)
        self._watch = GridWatch(self.vlm, self._start)
        self.vlm.eval()  # a fit that goes on within an epoch does not start one
        if rows and not self.held_out_losses:  # a resumed fit has them from its checkpoint
            self._measure()

    def on_train_start(self) -> None:
        """Measure the held-out pairs where a checkpoint was taken at an epoch's last update, which is before they were measured."""
        is_over = self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if len(self._held_out_rows) and is_over and self._measured_at < self.global_step:
            self._measure()

    def on_train_epoch_start(self) -> None:
        """Put the student in evaluation mode, as Lightning puts it in training mode."""
        self.vlm.eval()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After an epoch, measure the loss on the held-out pairs; after the last update, go back to the best state."""
        is_over = self.global_step >= self._updates
        if pairs := len(self._held_out_rows) * (is_over or self.trainer.is_last_batch):
            self._measure()
            self.log("train/held_out_loss", self.held_out_losses[-1], on_step=False, on_epoch=True, batch_size=pairs)
        if is_over:
            self._end()

    def _end(self) -> None:
        """Go back to the best state, and ask again what its grids clip, which training moved."""
        if self.held_out_losses:
            self.vlm.load_state_dict(self._best)
            if min(self.held_out_losses) == self.held_out_losses[0]:
                log.warning(
                    f"training did not lower the loss on held-out pairs ({self.held_out_losses[0]:.3g} at the start, "
                    f"{self.held_out_losses[-1]:.3g} at the end): the start is kept; change model.weight_lr or model.step_lr"
                )
        assert self.quantized is not None
        self.vlm.eval()
        self.quantized = measured_again(self.vlm, self.quantized, calibration(self.vlm, self.data))

    @torch.no_grad()
    def _measure(self) -> None:
        """The loss on the held-out pairs, all at once, and the state if it is the best so far.

        Raises:
            VLMQError: the loss is not finite, with which no state could be told from another.
        """
        assert self.reference is not None and self.scheme is not None
        self.vlm.eval()
        rows = self._held_out_rows
        text = self.teacher_text[rows]
        own = self.vlm.encode_text(self.tokens[rows]) if "text" in self.scheme.towers else text
        image = self.vlm.encode_image(self._held_out_images)
        everything = self.teacher_image, self.teacher_text
        scale = self.reference.logit_scale()
        loss = float(self.method.loss(image, own, self.teacher_image[rows], text, scale, everything))
        if not math.isfinite(loss):
            if not self.held_out_losses:
                raise VLMQError(
                    f"the loss on held-out pairs is {loss} before training, so that nothing can be learned from it; check the weights, "
                    "give more bits or another start, or --trainer.precision 32-true"
                )
            raise VLMQError(
                f"training diverged: the loss on held-out pairs is {loss} after step {self.global_step}; lower model.weight_lr or "
                "model.step_lr"
            )
        if all(loss < before for before in self.held_out_losses):
            self._best = {name: tensor.detach().clone() for name, tensor in self.vlm.state_dict().items()}
        self.held_out_losses.append(loss)
        self._measured_at = self.global_step

    def on_validation_epoch_end(self) -> None:
        """As :meth:`EvaluationModule.on_validation_epoch_end`, and rows of the held-out loss: at the start, and the least."""
        super().on_validation_epoch_end()
        if self.held_out_losses and not self.trainer.sanity_checking:
            kept = {"held_out_loss_start": self.held_out_losses[0], "held_out_loss": min(self.held_out_losses)}
            self.rows += model_rows(self.eval_sets, kept)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the best state so far and the losses on held-out pairs; the grids at the start and how they moved."""
        checkpoint["grids"] = {"start": self._start, "trajectory": [asdict(record) for record in self.trajectory]}
        checkpoint["held_out"] = {"losses": self.held_out_losses, "best": self._best, "measured_at": self._measured_at}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them back."""
        if "grids" in checkpoint:
            self._start = checkpoint["grids"]["start"]
            self.trajectory = [GridRecord(**record) for record in checkpoint["grids"]["trajectory"]]
        kept = checkpoint.get("held_out", {"losses": [], "best": {}})
        self.held_out_losses, self._best = list(kept["losses"]), dict(kept["best"])
        self._measured_at = int(kept.get("measured_at", 0))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Distil on a batch of ``image`` uint8 ``[b, 3, h, w]`` and ``index`` int64 ``[b]``; returns the scalar loss."""
        assert self.reference is not None and self.scheme is not None
        index = batch["index"].to(self.device)
        teacher_image, teacher_text = self.teacher_image[index], self.teacher_text[index]
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        is_told = bool(self.trainer.loggers) and (self.global_step == 0 or (self.global_step + 1) % every == 0)
        with self._watch.inputs() if is_told else nullcontext():
            image = self.vlm.encode_image(batch["image"])
            text = self.vlm.encode_text(self.tokens[index]) if "text" in self.scheme.towers else teacher_text
        if self.trainer.world_size > 1:
            image, text, teacher_image, teacher_text = map(self._gather, (image, text, teacher_image, teacher_text))
        scale = self.reference.logit_scale()
        parts = self.method.loss_parts(image, text, teacher_image, teacher_text, scale, self._trained_pairs)
        loss = torch.stack(list(parts.values())).sum()
        if not torch.isfinite(loss):
            raise VLMQError(
                f"training diverged at step {self.global_step} (loss {float(loss)}); lower model.weight_lr or model.step_lr"
            )
        told: dict[str, Any] = {f"train/loss/{name}": part.detach() for name, part in parts.items()}
        if is_told:
            self.trajectory.append(self._watch.record(self.global_step))
            told |= self.trajectory[-1].scalars() | self._rates()
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

    def _rates(self) -> dict[str, float]:
        """The learning rate of each kind of parameter at this update, ``train/lr/<kind>``; the median of its groups."""
        groups = self.optimizers().param_groups  # type: ignore[union-attr]
        kinds = dict.fromkeys(group["name"] for group in groups)
        return {f"train/lr/{kind}": median(g["lr"] for g in groups if g["name"] == kind) for kind in kinds}

    @property
    def _updates(self) -> int:
        """Number of updates of the whole fit."""
        return max(int(self.trainer.estimated_stepping_batches), 1)

    def _decay(self, step: int) -> float:
        """Share of the peak rates at an update."""
        return 0.5 * (1 + math.cos(math.pi * min(step / self._updates, 1)))


def held_out_rows(pairs: int, share: float) -> list[int]:
    """The rows that a share of caption pairs comes to, evenly spread: those at which the share of the rows so far reaches a whole number.

    Example:
        >>> held_out_rows(10, 0.4)
        [2, 4, 7, 9]
    """
    number, of = Fraction(str(float(share))).as_integer_ratio()  # as it is written: 0.1 is a tenth
    return [-(-k * of // number) - 1 for k in range(1, pairs * number // of + 1)]
