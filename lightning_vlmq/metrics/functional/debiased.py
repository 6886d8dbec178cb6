"""Calibration errors for inference: sums of absolute gaps without the noise that binning adds.

A plug-in calibration error is a sum of |gap|, and noise makes every |gap| larger: a perfectly calibrated model has an error, of a size
that depends on how many bins its confidences spread over. The difference of two models keeps what is left of it (Bröcker 2012; Kumar et
al. 2019; Roelofs et al. 2022), so that neither its interval nor its test holds. Here each bin's |gap| is replaced by a function of gap and
standard error whose expectation is nearly the true |gap|, as Cai & Low 2011 do for sums of absolute means.
"""

from __future__ import annotations

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
