"""What class-wise calibration errors follow from, in memory that does not grow with the samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.metrics.functional import equal_width_bins


class ClasswiseGaps(Metric):
    """Gaps between probability and "is it this class" by class and bin, of each of ``n_groups`` groups of samples.

    A bootstrap of class-wise ECE (see :func:`~lightning_vlmq.metrics.functional.classwise_ece`) needs all probabilities of all
    samples. Here each is in the
    group of its index modulo ``n_groups``, and what is resampled are groups.

    ``compute`` returns ``gap`` float64 ``[groups, C, bins + 1]``, sums over a group's samples; ``count`` float64 ``[groups]``, its samples;
    ``square`` float64 ``[C, bins + 1]``, sums of squares over all samples; ``variance`` likewise, with one more sample at the cell's mean
    p (1 - p), as :func:`~lightning_vlmq.metrics.functional.gap_variances`. The error is ``gap.sum(0).abs().sum(-1).mean() / count.sum()``.

    Args:
        num_classes: C, the width of the logits.
        n_bins: number of equal-width bins per class.
        n_groups: number of groups.
        kwargs: torchmetrics' own arguments.

    Raises:
        VLMQError: ``num_classes`` or ``n_bins`` is below 1, or ``n_groups`` below 2.
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    gap: Tensor
    count: Tensor
    square: Tensor
    spread: Tensor
    cells: Tensor

    def __init__(self, num_classes: int, n_bins: int = 15, n_groups: int = 100, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_classes < 1 or n_bins < 1 or n_groups < 2:
            raise VLMQError(
                f"need num_classes and n_bins of at least 1 and n_groups of at least 2, got {num_classes}, {n_bins}, {n_groups}"
            )
        self.num_classes, self.n_bins, self.n_groups = num_classes, n_bins, n_groups
        shape = (num_classes, n_bins + 1)
        self.add_state("gap", torch.zeros(n_groups, *shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(n_groups, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("square", "spread", "cells"):
            self.add_state(name, torch.zeros(*shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, index: Tensor, logits: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            index: int64 ``[n]``, the position of each sample in its data set.
            logits: float ``[n, C]``.
            target: int64 ``[n]``; samples with -1 are left out.

        Raises:
            VLMQError: C is not ``num_classes``, or the numbers of samples differ.
        """
        if logits.ndim != 2 or logits.shape[1] != self.num_classes or not len(index) == len(target) == len(logits):
            raise VLMQError(
                f"need index [n], logits [n, {self.num_classes}] and target [n], got {tuple(index.shape)}, "
                f"{tuple(logits.shape)} and {tuple(target.shape)}"
            )
        kept = target >= 0
        probs = logits[kept].to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        group = index[kept] % self.n_groups
        place = torch.arange(self.num_classes, device=probs.device) * (self.n_bins + 1) + equal_width_bins(
            probs, self.n_bins
        )
        exact = probs.to(torch.float64)
        gap = -exact
        gap[torch.arange(len(gap), device=gap.device), target[kept]] += 1
        whole = (group.unsqueeze(1) * self.num_classes * (self.n_bins + 1) + place).flatten()
        self.gap.view(-1).index_add_(0, whole, gap.flatten())
        self.square.view(-1).index_add_(0, place.flatten(), gap.square().flatten())
        self.spread.view(-1).index_add_(0, place.flatten(), (exact * (1 - exact)).flatten())
        self.cells.view(-1).index_add_(0, place.flatten(), torch.ones_like(gap).flatten())
        self.count += torch.bincount(group, minlength=self.n_groups)

    def compute(self) -> dict[str, Tensor]:
        """Sums over all samples so far."""
        variance = self.square + self.spread / self.cells.clamp(min=1)
        return {"gap": self.gap, "count": self.count, "variance": variance, "square": self.square}
