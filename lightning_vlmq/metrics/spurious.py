"""Reliance on spurious features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_vlmq.errors import VLMQError
from lightning_vlmq.metrics.functional import relative_spurious_gap


class RelativeSpuriousGap(Metric):
    """RSG = (accuracy on the common group - accuracy on the counter group) / accuracy on the common group.

    ``compute`` returns a float64 scalar, NaN when a group is empty or nothing in the common group is correct.

    Args:
        kwargs: torchmetrics' own arguments.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    correct: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # [0] is the counter group, [1] the common one
        self.add_state("correct", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, correct: Tensor, is_common: Tensor) -> None:
        """Add a batch.

        Args:
            correct: bool ``[n]``.
            is_common: bool ``[n]``, True where the sample's background is the common one of its class.

        Raises:
            VLMQError: the shapes differ or are not ``[n]``.
        """
        if correct.ndim != 1 or correct.shape != is_common.shape:
            raise VLMQError(
                f"correct and is_common must be [n], got {tuple(correct.shape)} and {tuple(is_common.shape)}"
            )
        group = is_common.long()
        self.correct += torch.zeros_like(self.correct).scatter_add_(0, group, correct.long())
        self.total += torch.zeros_like(self.total).scatter_add_(0, group, torch.ones_like(group))

    def compute(self) -> Tensor:
        """The gap over all samples so far."""
        accuracy = self.correct.to(torch.float64) / self.total
        return relative_spurious_gap(accuracy[1], accuracy[0])

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one or several values; see torchmetrics' ``Metric.plot``. Returns figure and axis."""
        return self._plot(val, ax)
