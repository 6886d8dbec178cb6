"""Class-wise calibration with a standard error, in memory that does not grow with the samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_vlmq.core.errors import VLMQError


class ClasswiseJackknife(Metric):
    """Class-wise ECE (see :func:`~.functional.classwise_ece`) and its delete-one-group jackknife over ``n_groups`` groups.

    A bootstrap of class-wise ECE needs all probabilities of all samples. Here each sample is in the group of its index modulo
    ``n_groups``, and every group keeps its bins' gaps; leaving a group out is a subtraction (Shao & Tu 1995, section 5.1.1).

    ``compute`` returns float64 ``[1 + n_groups]``: the error over all samples, then without each group; NaN without samples, with
    NaN probabilities, and without a group that holds all samples. The standard error is :func:`jackknife_standard_error` of the
    entries after the first, and those of two models are paired.

    Args:
        num_classes: C, the width of the logits.
        n_bins: number of equal-width bins per class.
        n_groups: number of groups.
        kwargs: torchmetrics' own arguments.

    Raises:
        VLMQError: ``num_classes`` or ``n_bins`` is below 1, or ``n_groups`` below 2.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    gap: Tensor
    count: Tensor

    def __init__(self, num_classes: int, n_bins: int = 15, n_groups: int = 20, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_classes < 1 or n_bins < 1 or n_groups < 2:
            raise VLMQError(
                f"need num_classes and n_bins of at least 1 and n_groups of at least 2, got {num_classes}, {n_bins}, {n_groups}"
            )
        self.num_classes, self.n_bins, self.n_groups = num_classes, n_bins, n_groups
        gap = torch.zeros(n_groups, num_classes, n_bins + 1, dtype=torch.float64)
        self.add_state("gap", gap, dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(n_groups, dtype=torch.float64), dist_reduce_fx="sum")

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
        edges = torch.linspace(0, 1, self.n_bins + 1, dtype=probs.dtype, device=probs.device)
        row = group.unsqueeze(1) * self.num_classes + torch.arange(self.num_classes, device=probs.device)
        cell = row * (self.n_bins + 1) + torch.bucketize(probs, edges, right=True) - 1
        gap = -probs.to(torch.float64)
        gap[torch.arange(len(gap), device=gap.device), target[kept]] += 1
        self.gap.view(-1).index_add_(0, cell.flatten(), gap.flatten())
        self.count += torch.bincount(group, minlength=self.n_groups)

    def compute(self) -> Tensor:
        """The error over all samples so far, and over all but each group's."""
        gap, count = self.gap.sum(0), self.count.sum()
        kept = torch.cat([gap.unsqueeze(0), gap - self.gap])
        n = torch.cat([count.reshape(1), count - self.count])
        return kept.abs().sum(-1).mean(-1) / n


def jackknife_standard_error(left_out: Tensor) -> Tensor:
    """Standard error from values without each of G groups: sqrt((G - 1) / G sum_g (value_g - mean)^2) (Tukey 1958).

    Args:
        left_out: float ``[..., G]``. NaN, a group whose absence leaves nothing, is left out of the sum.

    Returns:
        float64 ``[...]``; NaN with fewer than two defined values.
    """
    values = left_out.to(torch.float64)
    defined = (~values.isnan()).sum(-1)
    spread = (values - values.nanmean(-1, keepdim=True)).square().nansum(-1)
    return torch.where(defined > 1, ((defined - 1) / defined * spread).sqrt(), torch.nan)
