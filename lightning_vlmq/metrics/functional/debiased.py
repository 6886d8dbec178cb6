"""Calibration errors for inference: sums of absolute gaps without the noise that binning adds.

A plug-in calibration error is a sum of |gap|, and noise makes every |gap| larger: a perfectly calibrated model has an error, of a size
that depends on how many bins its confidences spread over. The difference of two models keeps what is left of it (Bröcker 2012; Kumar et
al. 2019; Roelofs et al. 2022), so that neither its interval nor its test holds. Here each bin's |gap| is replaced by a function of gap and
standard error whose expectation is nearly the true |gap|, as Cai & Low 2011 do for sums of absolute means.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WEIGHTS = ((4.844, 0.25), (-2.149, 1.0))
"""T(x) = |x| - sum_j a_j exp(-x^2 / (2 t_j)), as (a_j, t_j): the a_j minimise max_m |E T(m + Z) - |m||, Z standard normal.

That maximum is 0.151 (|x| itself: 0.798), T's standard deviation at most 1.80. More terms lower the bias by little and cost much spread.
"""


def debiased_magnitude(x: Tensor) -> Tensor:
    """A nearly unbiased estimate of |m| from x ~ N(m, 1): off by at most 0.151 for any m. It can be negative.

    Args:
        x: float, any shape.

    Returns:
        float, as ``x``.
    """
    square = x.square()
    return x.abs() - sum(a * torch.exp(-square / (2 * t)) for a, t in _WEIGHTS)


def remaining_bias(m: Tensor) -> Tensor:
    r"""E T(m + Z) - |m| of :func:`debiased_magnitude`, Z standard normal: within 0.152 of 0, and nearly 0 beyond \|m\| = 4.

    Args:
        m: float, any shape.
    """
    folded = math.sqrt(2 / math.pi) * torch.exp(-m.square() / 2) + m * torch.erf(m / math.sqrt(2))  # E |m + Z|
    return (
        folded - m.abs() - sum(a * (t / (1 + t)) ** 0.5 * torch.exp(-m.square() / (2 * (1 + t))) for a, t in _WEIGHTS)
    )


def bias_doubt(means_f: Tensor, variances_f: Tensor, means_q: Tensor, variances_q: Tensor) -> Tensor:
    """How far the change of a debiased error may be off for its bias, as a standard deviation; no resampling shows it.

    No estimator of a sum of absolute values is unbiased (Cai & Low 2011). What is left in a bin is bounded: by how much
    :func:`remaining_bias` varies where the two gaps can be (2 standard errors around), and by how far they are apart. Bins add up, as
    they would if the bias were of one sign; it is taken as uniform between its bounds (a standard uncertainty of type B, GUM 2008, 4.3.7).

    Args:
        means_f: float ``[bins]``, one model's, as for :func:`debiased_error`.
        variances_f: float ``[bins]``.
        means_q: float ``[bins]``, the other's.
        variances_q: float ``[bins]``.

    Returns:
        float64 scalar, 0 for equal models.
    """
    pairs = [
        (m.to(torch.float64), v.to(torch.float64).sqrt()) for m, v in ((means_f, variances_f), (means_q, variances_q))
    ]
    deviations = torch.stack([s for _, s in pairs])
    scaled = torch.stack([m / s.where(s > 0, 1.0) for m, s in pairs])
    near, far = scaled.abs().amin(0) - 2, scaled.abs().amax(0) + 2
    grid = torch.linspace(0, 1, 33, dtype=torch.float64).unsqueeze(1)
    biases = remaining_bias((near + grid * (far - near)).clamp(min=0))
    between = torch.minimum(biases.amax(0) - biases.amin(0), (scaled[1] - scaled[0]).abs())
    bound = deviations.mean(0) * between + (deviations[1] - deviations[0]).abs() * biases.abs().amax(0)
    return bound.sum() / math.sqrt(3)


def gap_variances(gaps: Tensor) -> Tensor:
    """Variance of each column's mean, of gap columns as :func:`~.calibration.bin_gaps` makes them.

    The second moment of the samples in the bin, and of one more at their mean c (1 - c): a bin of few samples, all right, is not
    without doubt.

    Args:
        gaps: float ``[n, bins]``, correct - confidence in the sample's bin, 0 elsewhere.

    Returns:
        float64 ``[bins]``; 0 for an empty bin.
    """
    gaps = gaps.to(torch.float64)
    confidence = torch.where(gaps > 0, 1 - gaps, -gaps)
    own = (confidence * (1 - confidence) * (gaps != 0)).sum(0) / (gaps != 0).sum(0).clamp(min=1)
    return (gaps.square().sum(0) + own) / max(len(gaps), 1) ** 2


def debiased_error(means: Tensor, variances: Tensor) -> Tensor:
    """Sum over bins of the debiased |gap|; the plug-in error is the sum of ``|means|``.

    Args:
        means: float ``[..., bins]``, a bin's gap summed over its samples, over all samples.
        variances: float ``[bins]``, of ``means`` over samples. A bin of variance 0 counts as it is.

    Returns:
        float64 ``[...]``; can be negative for a calibrated model: zero within its error.
    """
    deviation = variances.to(torch.float64).sqrt()
    scaled = means.to(torch.float64) / deviation.where(deviation > 0, 1.0)
    return torch.where(deviation > 0, deviation * debiased_magnitude(scaled), means.abs()).sum(-1)
