"""Logit scale tuning: the one scalar between cosine similarities and confidence, fitted on image-caption pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError

LOGIT_SCALE_RANGE = (0.01, 1000.0)
"""Fitted scales stay inside."""


@dataclass(frozen=True)
class LogitScale:
    """What turns a cosine similarity into a logit: ``scale * cosine + bias``.

    Attributes:
        scale: the factor, already exponentiated.
        bias: the additive bias of a model trained with SigLIP's pairwise sigmoid loss; ``None`` for softmax models.
    """

    scale: float
    bias: float | None = None

    def logits(self, cosine: Tensor) -> Tensor:
        """Logits of cosine similarities, any shape and floating dtype."""
        return self.scale * cosine + (self.bias or 0.0)


def fit_logit_scale(
    images: Tensor, texts: Tensor, caption: Tensor, start: LogitScale, batch_size: int = 1024
) -> LogitScale:
    """Logit scale that minimises :func:`pairs_nll`, all features frozen: L-BFGS-B on log s in float64.

    That is the loss of the softmax confidences that are judged, for every model. A sigmoid model keeps its bias: added to all
    logits alike it changes no softmax confidence, so that the pairwise sigmoid loss would fit a number that nothing here reads,
    and a scale for another question.

    Args:
        images: float ``[n, dim]``, unit-norm features of the pairs' images.
        texts: float ``[m, dim]``, unit-norm features of the distinct captions.
        caption: int64 ``[n]`` in [0, m), the caption of each image.
        start: the model's own scale and bias.
        batch_size: as :func:`pairs_nll`.

    Returns:
        The fitted scale, inside :data:`LOGIT_SCALE_RANGE`, with the bias of ``start``. Where no optimum is finite: a scale that
        leaves next to no loss when every pair is told apart with a margin, the lower end when the features are worse than
        chance. NaN when a feature is NaN or infinite.

    Raises:
        VLMQError: as :func:`pairs_nll`, or there are fewer than two distinct captions (one says nothing about the scale).
    """
    batches = _batches(images, texts, caption, batch_size)
    if len(caption.unique()) < 2:
        raise VLMQError("logit scale tuning needs image-caption pairs with at least two distinct captions; add pairs")
    if not bool(images.isfinite().all() and texts.isfinite().all()):
        return LogitScale(math.nan, start.bias)
    low, high = (math.log(end) for end in LOGIT_SCALE_RANGE)
    found = minimize(
        _loss_and_gradient,
        [min(max(math.log(start.scale), low), high)],
        args=(batches, len(caption)),
        jac=True,
        method="L-BFGS-B",
        bounds=[(low, high)],
        options={"maxiter": 500, "ftol": 1e-15, "gtol": 1e-9},
    )
    return LogitScale(math.exp(float(found.x[0])), start.bias)


def pairs_nll(images: Tensor, texts: Tensor, caption: Tensor, scale: float, batch_size: int = 1024) -> float:
    """Contrastive NLL per pair under a logit scale, in float64.

    Pairs with equal captions are not each other's negatives: every image with a caption is a right answer to it. It is the
    symmetric contrastive NLL (Radford et al. 2021, figure 3) with several positives, averaged over the pairs of a batch and
    both directions::

        -log sum_{j in P(i)} exp(s cos(x_i, t_j)) / sum_j exp(s cos(x_i, t_j))      and the same with x and t swapped

    where P(i) are the pairs of the batch with pair i's caption.

    Args:
        images: float ``[n, dim]``, unit-norm features of the pairs' images.
        texts: float ``[m, dim]``, unit-norm features of the distinct captions.
        caption: int64 ``[n]`` in [0, m), the caption of each image.
        scale: s.
        batch_size: pairs that are each other's negatives, at most; more pairs are dealt out to batches of nearly equal
            size, every k-th to the same one.

    Returns:
        The loss in nats; NaN without pairs or with broken features.

    Raises:
        VLMQError: shapes do not fit, a caption index is outside [0, m), or ``batch_size`` is below 2.
    """
    batches = _batches(images, texts, caption, batch_size)
    if not len(caption):
        return math.nan
    return _loss_and_gradient(np.array([math.log(scale)]), batches, len(caption))[0]


def _batches(images: Tensor, texts: Tensor, caption: Tensor, batch_size: int) -> list[_Batch]:
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1] or caption.shape != images.shape[:1]:
        raise VLMQError(
            "logit scale tuning needs images [n, dim], texts [m, dim] and a caption index [n], got "
            f"{tuple(images.shape)}, {tuple(texts.shape)} and {tuple(caption.shape)}"
        )
    if batch_size < 2:
        raise VLMQError(f"pairs are compared within a batch: batch_size must be at least 2, got {batch_size}")
    if caption.numel() and (int(caption.min()) < 0 or int(caption.max()) >= len(texts)):
        raise VLMQError(
            f"caption indices must lie in [0, {len(texts)}), got {int(caption.min())}..{int(caption.max())}"
        )
    n_batches = -(-len(caption) // batch_size)
    with torch.inference_mode(False):  # callers may be in it, where nothing can be differentiated
        return [_Batch.of(images[k::n_batches], texts, caption[k::n_batches]) for k in range(n_batches)]


@dataclass(frozen=True)
class _Batch:
    """Cosines of a batch's images with its distinct captions: copies of a caption are one column, counted."""

    cosine: Tensor  # float64 [n, distinct]
    caption: Tensor  # int64 [n], the column of each image's caption
    copies: Tensor  # float64 [distinct], pairs with this caption

    @classmethod
    def of(cls, images: Tensor, texts: Tensor, caption: Tensor) -> _Batch:
        kept, column, copies = caption.unique(return_inverse=True, return_counts=True)
        cosine = images.detach().cpu().to(torch.float64) @ texts.detach().cpu().to(torch.float64)[kept.cpu()].T
        return cls(cosine, column.cpu(), copies.cpu().to(torch.float64))

    def contrastive(self, scale: Tensor) -> Tensor:
        """Summed over pairs; see :func:`pairs_nll`."""
        logits = scale * self.cosine
        right = logits.gather(1, self.caption.unsqueeze(1)).squeeze(1)
        # image to text: of a caption's probability, each copy has its share
        to_text = (logits + self.copies.log()).logsumexp(1) - right - self.copies.log()[self.caption]
        # text to image: the images of a caption together, a logsumexp by caption
        best = torch.full_like(self.copies, -torch.inf).scatter_reduce(0, self.caption, right.detach(), "amax")
        own = torch.zeros_like(best).index_add(0, self.caption, (right - best[self.caption]).exp()).log() + best
        to_image = self.copies * (logits.logsumexp(0) - own)
        return (to_text.sum() + to_image.sum()) / 2


def _loss_and_gradient(
    log_scale: NDArray[np.float64], batches: Sequence[_Batch], n: int
) -> tuple[float, NDArray[np.float64]]:
    with torch.inference_mode(False), torch.enable_grad():
        variable = torch.tensor(log_scale, dtype=torch.float64, requires_grad=True)
        loss = torch.stack([batch.contrastive(variable[0].exp()) for batch in batches]).sum() / n
        loss.backward()
    assert variable.grad is not None
    return float(loss.detach()), variable.grad.numpy()
