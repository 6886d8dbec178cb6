"""One row per evaluated sample: what every later statistic is computed from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_vlmq.errors import VLMQError


@dataclass(frozen=True)
class _Softmax:
    """What the records need of the softmax, in few passes over ``[n, C]`` and without keeping probabilities."""

    logits: Tensor  # [n, C], at least float32
    target: Tensor  # [n]
    prediction: Tensor  # [n]
    confidence: Tensor  # [n]
    correct: Tensor  # [n]
    labelled: Tensor  # [n], has a class and a softmax
    highest: Tensor  # [n], the highest logit
    exp_shifted: Tensor  # [n, C], exp(logit - highest logit)
    exp_sum: Tensor  # [n], its row sums: the highest probability is 1 / exp_sum


def _softmax(logits: Tensor, target: Tensor) -> _Softmax:
    if logits.ndim != 2 or target.shape != logits.shape[:1] or logits.shape[1] == 0:
        raise VLMQError(
            f"logits must be [n, C] with C > 0 and target [n], got {tuple(logits.shape)} and {tuple(target.shape)}"
        )
    if not logits.is_floating_point():
        raise VLMQError(f"logits must be floating point, got {logits.dtype}")
    n, n_classes = logits.shape
    target = target.long()
    if n and (int(target.min()) < -1 or int(target.max()) >= n_classes):
        raise VLMQError(f"targets must lie in [-1, {n_classes}), got {int(target.min())} to {int(target.max())}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    highest, prediction = logits.max(-1)
    exp_shifted = (logits - highest.unsqueeze(-1)).exp_()
    exp_sum = exp_shifted.sum(-1)
    confidence = exp_sum.reciprocal()
    defined = ~confidence.isnan()
    prediction = torch.where(defined, prediction, -1)
    labelled = (target >= 0) & defined
    return _Softmax(
        logits=logits,
        target=target,
        prediction=prediction,
        confidence=confidence,
        correct=labelled & (prediction == target),
        labelled=labelled,
        highest=highest,
        exp_shifted=exp_shifted,
        exp_sum=exp_sum,
    )


def confidence_and_correct(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The two columns that calibration needs; arguments, NaN rules and errors as :func:`per_sample`.

    Args:
        logits: float ``[n, C]``.
        target: int64 ``[n]``, -1 where there is no class.

    Returns:
        ``confidence`` float ``[n]`` and ``correct`` bool ``[n]``.

    Raises:
        VLMQError: as :func:`per_sample`.
    """
    parts = _softmax(logits, target)
    return parts.confidence, parts.correct


def per_sample(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Turn a batch of logits into the per-sample records.

    Args:
        logits: float ``[n, C]``, before the softmax and with the logit scale already applied. Half precision is
            computed in float32.
        target: int64 ``[n]``, the class, or -1 where the sample has no class (out-of-distribution sets).

    Returns:
        Columns of shape ``[n]``:

        - ``prediction`` int64, the first class with the highest logit;
        - ``confidence`` float, the highest softmax probability;
        - ``correct`` bool; ``correct_top5`` bool, the target is among the first min(5, C) classes (equal logits rank
          in class order). Both False where the target is -1;
        - ``nll`` float, -log p(target) in nats; ``brier`` float, the multi-class sum form
          sum_c (p_c - 1[c = target])^2 (Brier 1950), in [0, 2]. Both NaN where the target is -1.

        A row whose softmax is undefined (a NaN or +inf logit, or all -inf) has prediction -1, is not correct, and has
        NaN in every float column: a broken model never counts as right and its mean metrics show it.

    Raises:
        VLMQError: shapes do not fit, ``C`` is 0, ``logits`` is not floating point, or a target is outside [-1, C).
    """
    p = _softmax(logits, target)
    column = p.target.clamp(min=0).unsqueeze(-1)
    target_logit = p.logits.gather(-1, column)
    # not -log of the target's probability, which can underflow
    nll = p.exp_sum.log() + (p.highest - target_logit.squeeze(-1))
    target_prob = p.exp_shifted.gather(-1, column).squeeze(-1) / p.exp_sum
    brier = torch.linalg.vecdot(p.exp_shifted, p.exp_shifted) / p.exp_sum.square() - 2 * target_prob + 1
    nan = torch.full_like(p.confidence, torch.nan)
    return {
        "prediction": p.prediction,
        "confidence": p.confidence,
        "correct": p.correct,
        "correct_top5": p.labelled & (_rank(p.logits, column, target_logit) < min(5, p.logits.shape[1])),
        "nll": torch.where(p.labelled, nll, nan),
        "brier": torch.where(p.labelled, brier, nan),
    }


def _rank(logits: Tensor, column: Tensor, target_logit: Tensor) -> Tensor:
    """Classes ahead of the target: those with a higher logit, and of equal ones those that come first. int64 ``[n]``."""
    higher = (logits > target_logit).count_nonzero(-1)
    equal = logits == target_logit
    tied = equal.count_nonzero(-1) > 1
    if bool(tied.any()):
        before = torch.arange(logits.shape[1], device=logits.device) < column[tied]
        higher[tied] += (equal[tied] & before).count_nonzero(-1)
    return higher


def agreement(prediction_f: Tensor, prediction_q: Tensor) -> Tensor:
    """Share of samples whose prediction two models share; one minus it is the share of flips (Dutta et al. 2024).

    Args:
        prediction_f: int64 ``[..., n]``, classes; -1 marks a sample for which a model has no prediction.
        prediction_q: int64 ``[..., n]``.

    Returns:
        float64 ``[...]``; NaN where ``n`` is 0. A sample without prediction never counts as agreed.

    Raises:
        VLMQError: the last dimensions differ.
    """
    if prediction_f.shape[-1:] != prediction_q.shape[-1:]:
        raise VLMQError(
            f"agreement needs predictions on the same samples, got {tuple(prediction_f.shape)}"
            f" and {tuple(prediction_q.shape)}"
        )
    return ((prediction_f == prediction_q) & (prediction_f >= 0)).to(torch.float64).mean(-1)
