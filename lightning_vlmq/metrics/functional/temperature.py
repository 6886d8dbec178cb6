"""Temperature scaling: how much of the miscalibration one scalar removes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.metrics.functional.calibration import Binning, calibration_error
from lightning_vlmq.metrics.functional.classification import confidence_and_correct

TEMPERATURE_RANGE = (0.01, 100.0)
"""Fitted temperatures stay inside; the ends stand for "no finite optimum"."""


def checked_temperature(temperature: float) -> float:
    """The temperature as it came; a NaN is what :func:`fit_temperature` gives for broken logits.

    Raises:
        VLMQError: it is not positive.
    """
    if temperature <= 0:
        raise VLMQError(f"a temperature must be positive, got {temperature}")
    return temperature


def divided(logits: Tensor, temperature: float) -> Tensor:
    """Logits over a temperature, in their shape, at least float32: a low temperature overflows half precision."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature


def fit_temperature(logits: Tensor, target: Tensor) -> float:
    """Temperature T that minimises the NLL of softmax(logits / T) (Guo et al. 2017), by LBFGS on log T in float64.

    Fit on samples that the reported metric does not see.

    Args:
        logits: float ``[n, C]`` of calibration samples.
        target: int64 ``[n]`` in [0, C).

    Returns:
        T, kept inside :data:`TEMPERATURE_RANGE`: the lower end when every sample is right with a margin (the NLL falls
        as T does), the upper end when the logits are worse than chance. 1.0 when T changes nothing (all logits equal);
        NaN when a logit is NaN or infinite.

    Raises:
        VLMQError: there are no samples, shapes do not fit, or a target is outside [0, C).
    """
    if logits.ndim != 2 or target.shape != logits.shape[:1] or logits.numel() == 0:
        raise VLMQError(f"need logits [n, C] and target [n], n > 0, got {tuple(logits.shape)}, {tuple(target.shape)}")
    if int(target.min()) < 0 or int(target.max()) >= logits.shape[1]:
        raise VLMQError(f"fitting a temperature needs targets in [0, {logits.shape[1]}); drop samples without a class")
    if not bool(logits.isfinite().all()):
        return float("nan")
    logits = logits.detach().to(torch.float64)
    low, high = torch.tensor(TEMPERATURE_RANGE, dtype=torch.float64).log().tolist()
    log_t = torch.zeros((), dtype=torch.float64, device=logits.device, requires_grad=True)
    optimiser = torch.optim.LBFGS([log_t], max_iter=100, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = cross_entropy(logits * torch.exp(-log_t), target)
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    return float(log_t.detach().clamp(low, high).exp())


def temperature_scaled_ece(
    logits: Tensor, target: Tensor, temperature: float, n_bins: int = 15, binning: Binning = "width"
) -> Tensor:
    """ECE after dividing the logits by a temperature fitted elsewhere (:func:`fit_temperature`).

    Args:
        logits: float ``[n, C]``.
        target: int64 ``[n]`` in [0, C).
        temperature: positive.
        n_bins: number of bins.
        binning: as :func:`~.calibration.calibration_error`.

    Returns:
        float64 scalar.

    Raises:
        VLMQError: the temperature is not positive, or the inputs are not as :func:`~.classification.per_sample` needs.
    """
    logits = divided(logits, checked_temperature(temperature))
    confidence, correct = confidence_and_correct(logits, target)
    return calibration_error(confidence, correct, n_bins, binning=binning)
