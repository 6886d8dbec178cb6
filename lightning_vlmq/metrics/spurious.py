"""Reliance on spurious features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.metrics.functional import added_vulnerability, relative_change, relative_spurious_gap


def _per_group(flags: Tensor, is_common: Tensor) -> Tensor:
    """How many flags are set in the counter group [0] and the common one [1]. int64 ``[2]``."""
    flags = flags.long()
    return flags.new_zeros(2).scatter_add_(0, is_common.long(), flags)


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
        self.correct += _per_group(correct, is_common)
        self.total += _per_group(torch.ones_like(is_common), is_common)

    def compute(self) -> Tensor:
        """The gap over all samples so far."""
        accuracy = self.correct.to(torch.float64) / self.total
        return relative_spurious_gap(accuracy[1], accuracy[0])

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one or several values; see torchmetrics' ``Metric.plot``. Returns figure and axis."""
        return self._plot(val, ax)


class AddedVulnerability(Metric):
    """Vuln_add = delta_counter - delta_common: relative accuracy lost on the counter group beyond the common one's.

    delta is :func:`~.functional.relative_change` of a group's accuracy from full precision to the quantized model, so
    that a positive value says that quantization hurts most where the spurious feature is missing. ``compute`` returns a
    float64 scalar, NaN when a group is empty or the full-precision model has nothing correct in one.

    Args:
        kwargs: torchmetrics' own arguments.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    correct_f: Tensor
    correct_q: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("correct_f", "correct_q", "total"):  # [0] is the counter group, [1] the common one
            self.add_state(name, torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, correct_f: Tensor, correct_q: Tensor, is_common: Tensor) -> None:
        """Add a batch.

        Args:
            correct_f: bool ``[n]``, the full-precision model is right.
            correct_q: bool ``[n]``, the quantized model is right on the same sample.
            is_common: bool ``[n]``, True where the sample's background is the common one of its class.

        Raises:
            VLMQError: the shapes differ or are not ``[n]``.
        """
        shapes = [tuple(x.shape) for x in (correct_f, correct_q, is_common)]
        if correct_f.ndim != 1 or len(set(shapes)) != 1:
            raise VLMQError(f"correct_f, correct_q and is_common must be [n] over the same samples, got {shapes}")
        self.correct_f += _per_group(correct_f, is_common)
        self.correct_q += _per_group(correct_q, is_common)
        self.total += _per_group(torch.ones_like(is_common), is_common)

    def compute(self) -> Tensor:
        """The added vulnerability over all samples so far."""
        total = self.total.to(torch.float64)
        counter, common = relative_change(self.correct_f / total, self.correct_q / total)
        return added_vulnerability(counter, common)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one or several values; see torchmetrics' ``Metric.plot``. Returns figure and axis."""
        return self._plot(val, ax)
