"""How well a score tells in-distribution (ID) from out-of-distribution (OOD) samples. A higher score means more ID.

Every function takes ``id_scores`` float ``[..., n1]`` and ``ood_scores`` float ``[..., n2]`` (leading dimensions
broadcast), and returns float64 ``[...]``: NaN where a side is empty or a score is NaN. Infinite scores are ordered as
usual. Equal scores form one point of the curve, as in scikit-learn's ``roc_curve`` and ``average_precision_score``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError


def _aligned(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    if positive.ndim == 0 or negative.ndim == 0:
        raise VLMQError("scores must be [..., n], got a scalar")
    dtype = torch.promote_types(torch.promote_types(positive.dtype, negative.dtype), torch.float32)
    lead = torch.broadcast_shapes(positive.shape[:-1], negative.shape[:-1])
    positive = positive.to(dtype).expand(*lead, positive.shape[-1]).contiguous()
    negative = negative.to(dtype).expand(*lead, negative.shape[-1]).contiguous()
    return positive, negative


def _where_defined(value: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    undefined = positive.isnan().any(-1) | negative.isnan().any(-1)
    return torch.where(undefined, torch.nan, value)


def _undefined(positive: Tensor) -> Tensor:
    return torch.full(positive.shape[:-1], torch.nan, dtype=torch.float64, device=positive.device)


def auroc(id_scores: Tensor, ood_scores: Tensor) -> Tensor:
    """Area under the ROC curve: P(ID score > OOD score) + P(equal) / 2 (Hanley & McNeil 1982). Chance is 0.5.

    Args:
        id_scores: float ``[..., n1]``.
        ood_scores: float ``[..., n2]``.

    Returns:
        float64 ``[...]``; see the module's notes on NaN and ties.
    """
    positive, negative = _aligned(id_scores, ood_scores)
    n_pairs = positive.shape[-1] * negative.shape[-1]
    if n_pairs == 0:
        return _undefined(positive)
    return _where_defined(
        _twice_below(positive, negative).sum(-1).to(torch.float64) / (2 * n_pairs), positive, negative
    )


def _twice_below(scores: Tensor, others: Tensor) -> Tensor:
    """For each score, twice the number of the others below it, plus the number of equal ones."""
    ordered = others.sort(-1).values
    return torch.searchsorted(ordered, scores, right=False) + torch.searchsorted(ordered, scores, right=True)


def placements(id_scores: Tensor, ood_scores: Tensor) -> tuple[Tensor, Tensor]:
    """DeLong's structural components (DeLong et al. 1988): the means of either are the AUROC, which is linear in both to first order.

    Args:
        id_scores: float ``[..., n1]``, ``n1 > 0``.
        ood_scores: float ``[..., n2]``, ``n2 > 0``.

    Returns:
        float64 ``[..., n1]``, the share of OOD samples below each ID sample, and ``[..., n2]``, of ID samples above each OOD sample;
        equal ones count half. NaN throughout where a score is NaN.
    """
    positive, negative = _aligned(id_scores, ood_scores)
    undefined = (positive.isnan().any(-1) | negative.isnan().any(-1)).unsqueeze(-1)
    below = _twice_below(positive, negative).to(torch.float64) / (2 * negative.shape[-1])
    above = 1 - _twice_below(negative, positive).to(torch.float64) / (2 * positive.shape[-1])
    return below.masked_fill(undefined, torch.nan), above.masked_fill(undefined, torch.nan)


def _average_precision(positive: Tensor, negative: Tensor) -> Tensor:
    # Summing precision over recall steps is the mean, over positives, of the precision at that positive's own score.
    positive, negative = _aligned(positive, negative)
    if positive.shape[-1] * negative.shape[-1] == 0:
        return _undefined(positive)
    positive = positive.sort(-1).values  # looked up in order, which is kinder to the cache
    hits = positive.shape[-1] - torch.searchsorted(positive, positive, right=False)
    alarms = negative.shape[-1] - torch.searchsorted(negative.sort(-1).values, positive, right=False)
    precision = hits.to(torch.float64) / (hits + alarms)
    return _where_defined(precision.mean(-1), positive, negative)


def aupr_in(id_scores: Tensor, ood_scores: Tensor) -> Tensor:
    """Average precision with ID as the positive class. Chance is n1 / (n1 + n2).

    Args:
        id_scores: float ``[..., n1]``.
        ood_scores: float ``[..., n2]``.

    Returns:
        float64 ``[...]``, scikit-learn's ``average_precision_score``; see the module's notes on NaN and ties.
    """
    return _average_precision(id_scores, ood_scores)


def aupr_out(id_scores: Tensor, ood_scores: Tensor) -> Tensor:
    """Average precision with OOD as the positive class, ranked by the negated score. Chance is n2 / (n1 + n2).

    Args:
        id_scores: float ``[..., n1]``.
        ood_scores: float ``[..., n2]``.

    Returns:
        float64 ``[...]``, scikit-learn's ``average_precision_score``; see the module's notes on NaN and ties.
    """
    return _average_precision(-ood_scores, -id_scores)


def _false_positive_rate_at_95(positive: Tensor, negative: Tensor) -> Tensor:
    positive, negative = _aligned(positive, negative)
    n = positive.shape[-1]
    if n * negative.shape[-1] == 0:
        return _undefined(positive)
    kept = -(-95 * n // 100)  # the smallest count that is at least 95 %, without rounding
    threshold = positive.sort(-1).values[..., n - kept].unsqueeze(-1)
    return _where_defined((negative >= threshold).to(torch.float64).mean(-1), positive, negative)


def fpr95(id_scores: Tensor, ood_scores: Tensor) -> Tensor:
    """Share of OOD samples accepted at the highest threshold that accepts at least 95 % of ID (ID positive).

    The convention of the CLIP-based detection papers (Ming et al. 2022, MCM).

    It is ``fpr[argmax(tpr >= 0.95)]`` of scikit-learn's ``roc_curve(..., drop_intermediate=False)``. The default call
    leaves points out where consecutive groups of tied scores hold the same counts of both classes, and can then report
    a higher rate: for equal ID and OOD scores 0..99 it gives 1.00 in place of 0.95.

    Args:
        id_scores: float ``[..., n1]``.
        ood_scores: float ``[..., n2]``.

    Returns:
        float64 ``[...]``; see the module's notes on NaN and ties.
    """
    return _false_positive_rate_at_95(id_scores, ood_scores)


def fpr95_openood(id_scores: Tensor, ood_scores: Tensor) -> Tensor:
    """Share of ID samples flagged at the lowest threshold that flags at least 95 % of OOD (OOD positive).

    The convention of OpenOOD v1.5's evaluators (Zhang et al. 2023), which rank by the negated score. The note on
    ``drop_intermediate`` in :func:`fpr95` applies; without ties the two are equal.

    Args:
        id_scores: float ``[..., n1]``.
        ood_scores: float ``[..., n2]``.

    Returns:
        float64 ``[...]``; see the module's notes on NaN and ties.
    """
    return _false_positive_rate_at_95(-ood_scores, -id_scores)
