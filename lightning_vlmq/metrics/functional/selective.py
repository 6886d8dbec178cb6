"""Selective prediction: how fast the risk falls when the least confident samples are left out."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_vlmq.core.deterministic import running_sum
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.metrics.functional.ties import tie_group_means


def risk_at_coverage(confidence: Tensor, correct: Tensor) -> Tensor:
    """Risk (error rate) of the k most confident samples, k = 1..n: the risk-coverage curve (El-Yaniv & Wiener 2010).

    Samples of equal confidence share their mean error, so the curve does not depend on sample order.

    Args:
        confidence: float ``[..., n]``, any monotone confidence.
        correct: bool ``[..., n]``.

    Returns:
        float64 ``[..., n]``; NaN throughout where a confidence is NaN.

    Raises:
        VLMQError: shapes differ.
    """
    if confidence.shape != correct.shape or confidence.ndim == 0:
        raise VLMQError(
            f"confidence and correct must share a shape [..., n], got {tuple(confidence.shape)}"
            f" and {tuple(correct.shape)}"
        )
    ordered, order = confidence.sort(-1, descending=True)
    error = tie_group_means(ordered, 1.0 - correct.gather(-1, order).to(torch.float64))
    covered = torch.arange(1, confidence.shape[-1] + 1, device=confidence.device, dtype=torch.float64)
    risk = running_sum(error, -1) / covered
    return torch.where(confidence.isnan().any(-1, keepdim=True), torch.nan, risk)


def aurc(confidence: Tensor, correct: Tensor) -> Tensor:
    """Area under the risk-coverage curve: mean risk over all coverages k/n (Geifman & El-Yaniv 2017).

    Lower is better. With ties it is the mean over every order of the tied samples.

    Args:
        confidence: float ``[..., n]``.
        correct: bool ``[..., n]``.

    Returns:
        float64 ``[...]`` in [0, 1]; NaN where ``n`` is 0 or a confidence is NaN.

    Raises:
        VLMQError: shapes differ.
    """
    return risk_at_coverage(confidence, correct).mean(-1)


def augrc(confidence: Tensor, correct: Tensor) -> Tensor:
    """Area under the generalized risk-coverage curve (Traub et al. 2024, eq. 6): mean over k of errors among the k most confident, over n.

    The risk of a silent failure, error and acceptance at once; equal to (1 - AUROC_f) a (1 - a) + (1 - a)^2 / 2 for accuracy a and the
    AUROC of confidence for correctness (ibid., eq. 8), up to 1 / n. Lower is better. With ties the mean over every order of the tied.

    Args:
        confidence: float ``[..., n]``.
        correct: bool ``[..., n]``.

    Returns:
        float64 ``[...]`` in [0, 1]; NaN where ``n`` is 0 or a confidence is NaN.

    Raises:
        VLMQError: shapes differ.
    """
    n = confidence.shape[-1]
    share = torch.arange(1, n + 1, device=confidence.device, dtype=torch.float64) / max(n, 1)
    return (risk_at_coverage(confidence, correct) * share).mean(-1)


def checked_risk(risk: float) -> float:
    """The error rate as it came.

    Raises:
        VLMQError: it is outside [0, 1].
    """
    if not 0 <= risk <= 1:
        raise VLMQError(f"risk is an error rate in [0, 1], got {risk}")
    return risk


def within_risk(errors: Tensor, covered: Tensor, risk: float) -> Tensor:
    """Whether ``errors`` wrong among ``covered`` samples keep an error rate of at most ``risk``.

    Args:
        errors: float64 ``[...]``, whole numbers.
        covered: float64 ``[...]``, whole numbers.
        risk: in [0, 1].

    Returns:
        bool ``[...]``.
    """
    return errors <= risk * covered + 1e-9  # 0.05 * 20 may fall short of 1


def coverage_at_risk(confidence: Tensor, correct: Tensor, risk: float) -> Tensor:
    """Largest share of samples that a confidence threshold can keep at a risk of at most ``risk``.

    Only whole groups of equal confidence can be kept (Geifman & El-Yaniv 2017).

    Args:
        confidence: float ``[..., n]``.
        correct: bool ``[..., n]``.
        risk: error rate to stay at or below, in [0, 1].

    Returns:
        float64 ``[...]`` in [0, 1]; 0 where no threshold reaches the risk, NaN where ``n`` is 0 or a confidence is NaN.

    Raises:
        VLMQError: shapes differ or ``risk`` is outside [0, 1].
    """
    risk = checked_risk(risk)
    curve = risk_at_coverage(confidence, correct)
    n = confidence.shape[-1]
    if n == 0:
        return curve.mean(-1)
    ordered = confidence.sort(-1, descending=True).values
    group_end = torch.ones_like(ordered, dtype=torch.bool)
    group_end[..., :-1] = ordered[..., 1:] != ordered[..., :-1]
    covered = torch.arange(1, n + 1, device=curve.device)
    errors = (curve * covered).round()  # at the end of a group a whole number, but for the mean's rounding
    allowed = within_risk(errors, covered.to(torch.float64), risk)
    kept = covered.where(group_end & allowed, 0).amax(-1)
    return torch.where(curve.isnan().any(-1), torch.nan, kept.to(torch.float64) / n)
