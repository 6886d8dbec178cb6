"""How many predictions quantization leaves unchanged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_vlmq.core.errors import VLMQError


class Agreement(Metric):
    """Share of samples on which two models predict the same class; 1 minus it is the flips (Dutta et al. 2024).

    ``compute`` returns a float64 scalar in [0, 1], NaN without samples.

    Args:
        kwargs: torchmetrics' own arguments.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    agreed: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("agreed", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    @staticmethod
    def _prediction(preds: Tensor) -> Tensor:
        if preds.is_floating_point():
            defined = preds.logsumexp(-1).isfinite()  # as in per_sample: a softmax exists
            return torch.where(defined, preds.argmax(-1), -1)
        return preds

    def update(self, preds_f: Tensor, preds_q: Tensor) -> None:
        """Add a batch.

        Args:
            preds_f: int64 ``[n]`` predictions or float ``[n, C]`` logits of the one model. A row of logits without a
                softmax (see :func:`~.functional.per_sample`) and a prediction of -1 agree with nothing.
            preds_q: the same of the other model on the same samples.

        Raises:
            VLMQError: the numbers of samples differ.
        """
        preds_f, preds_q = self._prediction(preds_f), self._prediction(preds_q)
        if preds_f.ndim != 1 or preds_f.shape != preds_q.shape:
            raise VLMQError(
                f"both models' predictions must be [n] or [n, C] over the same samples, got {tuple(preds_f.shape)}"
                f" and {tuple(preds_q.shape)} predictions"
            )
        self.agreed += ((preds_f == preds_q) & (preds_f >= 0)).sum()
        self.total += preds_f.numel()

    def compute(self) -> Tensor:
        """Agreed over all samples."""
        return self.agreed.to(torch.float64) / self.total

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one or several values; see torchmetrics' ``Metric.plot``. Returns figure and axis."""
        return self._plot(val, ax)
