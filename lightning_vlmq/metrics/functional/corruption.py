"""Mean corruption error (Hendrycks & Dietterich 2019), absolute and relative to the clean error."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError

ALEXNET_CLEAN_ERROR = 0.435
"""AlexNet's top-1 error on ImageNet's validation images, Hendrycks & Dietterich 2019, table 1."""

ALEXNET_ERRORS: Mapping[str, float] = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""AlexNet's top-1 error on ImageNet-C, mean over the five severities: the baseline of the published mCE."""


def mean_corruption_error(errors: Tensor, baseline: Tensor) -> Tensor:
    """mCE, Hendrycks & Dietterich 2019, section 4.1: mean over corruptions of sum_s E_cs / sum_s B_cs.

    Args:
        errors: the model's top-1 errors in 0..1, ``[..., corruptions, severities]``.
        baseline: the baseline model's, broadcastable. Where only its mean over severities is published (:data:`ALEXNET_ERRORS`),
            that mean in place of every severity gives the same.

    Returns:
        float64 ``[...]``, a ratio (1 is as bad as the baseline; papers write it in percent). NaN where the baseline
        makes no error on a corruption.

    Raises:
        VLMQError: no corruption or severity.
    """
    return _mean_ratio(errors, baseline, 0.0, 0.0)


def relative_mean_corruption_error(
    errors: Tensor, baseline: Tensor, clean: Tensor | float, baseline_clean: Tensor | float
) -> Tensor:
    """Relative mCE, ibid.: mean over corruptions of sum_s (E_cs - E_clean) / sum_s (B_cs - B_clean).

    Args:
        errors: the model's top-1 errors in 0..1, ``[..., corruptions, severities]``.
        baseline: the baseline model's, broadcastable.
        clean: the model's error on the uncorrupted images, ``[...]``.
        baseline_clean: the baseline model's, ``[...]``.

    Returns:
        float64 ``[...]``, a ratio: how much of the baseline's loss by corruption the model has. NaN where the baseline loses
        nothing on a corruption: a ratio to a loss of 0 or less says nothing.

    Raises:
        VLMQError: no corruption or severity.
    """
    return _mean_ratio(errors, baseline, clean, baseline_clean)


def _mean_ratio(errors: Tensor, baseline: Tensor, clean: Tensor | float, baseline_clean: Tensor | float) -> Tensor:
    if errors.ndim < 2 or 0 in errors.shape[-2:]:
        raise VLMQError(f"errors must be [..., corruptions, severities] and not empty, got {tuple(errors.shape)}")
    lost, lost_baseline = (
        (e.double() - torch.as_tensor(c, dtype=torch.float64)[..., None, None]).expand(errors.shape).sum(-1)
        for e, c in ((errors, clean), (baseline, baseline_clean))
    )
    return torch.where(lost_baseline > 0, lost / lost_baseline, torch.nan).mean(-1)
