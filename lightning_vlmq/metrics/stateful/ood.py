"""False positive rate of out-of-distribution detection, in both of the field's conventions."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_vlmq.core.errors import unknown
from lightning_vlmq.metrics.functional import fpr95, fpr95_openood
from lightning_vlmq.metrics.stateful.records import ColumnMetric

_BY_POSITIVE = {"id": fpr95, "ood": fpr95_openood}


class FPR95(ColumnMetric):
    """False positive rate at 95 % true positive rate.

    ``compute`` returns a float64 scalar in [0, 1], NaN when one side is empty or a score is NaN.

    Args:
        positive: the positive class: ``"id"`` as in the CLIP and MCM papers (:func:`~.functional.fpr95`), or ``"ood"``
            as in OpenOOD v1.5 (:func:`~.functional.fpr95_openood`).
        kwargs: torchmetrics' own arguments.

    Raises:
        VLMQError: ``positive`` is neither.
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self, positive: Literal["id", "ood"] = "id", **kwargs: Any) -> None:
        super().__init__({"score": torch.float32, "is_id": torch.bool}, **kwargs)
        if positive not in _BY_POSITIVE:
            raise unknown("positive class", positive, _BY_POSITIVE)
        self.positive = positive

    def update(self, score: Tensor, is_id: Tensor) -> None:
        """Add a batch.

        Args:
            score: float ``[n]``, higher means more in-distribution.
            is_id: bool ``[n]``.

        Raises:
            VLMQError: the shapes differ or are not ``[n]``.
        """
        self.append(score=score, is_id=is_id)

    def compute(self) -> Tensor:
        """The rate over all samples so far."""
        score, is_id = self.column("score"), self.column("is_id")
        return _BY_POSITIVE[self.positive](score[is_id], score[~is_id])
