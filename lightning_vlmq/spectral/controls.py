"""Controls that part the two readings of quantization's effect: "it filters the spectrum" and "any noise does it"."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.spectral.weights import as_matrix


def truncate_rank(weight: Tensor, k: int) -> Tensor:
    """Best approximation of rank ``k`` (Eckart & Young 1936): the spectral filter without any quantization.

    Args:
        weight: float ``[out, in]`` or ``[out, in / groups, kh, kw]``, see :func:`as_matrix`.
        k: number of leading singular directions to keep; 0 gives the zero weight.

    Returns:
        a new tensor of the weight's shape, dtype and device, detached.

    Raises:
        VLMQError: if ``k`` is negative or the weight is no finite floating-point matrix.
    """
    if k < 0:
        raise VLMQError(f"truncate_rank needs a rank of 0 or more, not {k}")
    matrix = as_matrix(weight.detach())
    if k >= min(matrix.shape):
        return weight.detach().clone()
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return ((left[:, :k] * values[:k]) @ right[:k]).reshape(weight.shape).to(weight.dtype)


def matched_noise(weight: Tensor, reference_error: Tensor, generator: torch.Generator) -> Tensor:
    """Weight plus Gaussian noise that has the norm of a quantization error in every output channel.

    Matching channel by channel keeps the control fair for per-channel scales, where the error's size differs between
    channels; the norm over the whole tensor then matches too. Only the direction of the error is random.

    Args:
        weight: float ``[out, ...]``, full precision.
        reference_error: float, the weight's shape: effective quantized weight minus ``weight``.
        generator: CPU generator; the same seed gives the same noise on every device.

    Returns:
        a new tensor of the weight's shape, dtype and device, detached.

    Raises:
        VLMQError: if the shapes differ or either tensor is no finite floating-point matrix.
    """
    if weight.shape != reference_error.shape:
        raise VLMQError(
            f"weight {list(weight.shape)} and error {list(reference_error.shape)} differ in shape; "
            "pass the error of this very weight"
        )
    matrix, error = as_matrix(weight.detach()).double(), as_matrix(reference_error.detach()).double()
    noise = torch.randn(matrix.shape, generator=generator, dtype=torch.float64).to(matrix.device)
    noise *= error.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
    return (matrix + noise).reshape(weight.shape).to(weight.dtype)
