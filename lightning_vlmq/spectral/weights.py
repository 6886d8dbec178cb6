"""Singular values of one layer's weight, and what they say about its rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.spectral.dimension import effective_rank


def as_matrix(weight: Tensor) -> Tensor:
    """View a layer's weight as the matrix that maps one input patch to the outputs.

    For a convolution this is the unrolled kernel matrix. Its singular values are not those of the convolution as a map
    between whole images (Sedghi, Gupta & Long 2019), which depend on the image's size, padding and stride.

    Args:
        weight: float ``[out, in]`` (linear) or ``[out, in / groups, kh, kw]`` (convolution), every size at least 1.

    Returns:
        ``[out, in]`` or ``[out, in / groups * kh * kw]``; a depth-wise convolution gives ``[channels, kh * kw]``.

    Raises:
        VLMQError: if the weight is not of floating point, has fewer than two dimensions, is empty or is not finite.
    """
    if weight.ndim < 2 or weight.numel() == 0:
        raise VLMQError(f"a weight of shape {list(weight.shape)} is no matrix; pass [out, in] or [out, in, kh, kw]")
    if not weight.is_floating_point():
        raise VLMQError(f"a weight of dtype {weight.dtype} has no spectrum; pass the dequantized (effective) weight")
    if not torch.isfinite(torch.stack(torch.aminmax(weight.detach()))).all():  # isfinite itself goes over it six times
        raise VLMQError(f"the weight of shape {list(weight.shape)} holds NaN or infinity; check training or the scales")
    return weight.flatten(1)


GRAM_FLOOR = 2e-5
"""Smallest ratio of two singular values that a float64 Gram matrix gives to 1e-6; below it a full SVD is taken."""


def singular_values(weight: Tensor) -> Tensor:
    """Singular values of a linear weight, or of a convolution's unrolled kernel matrix, largest first.

    Square roots of the eigenvalues of the smaller Gram matrix in float64, by LAPACK: half the work of a float64 SVD and
    a thousand times as exact as a float32 one. Where the smallest is below :data:`GRAM_FLOOR` of the largest, a
    float64 SVD of the weight itself takes its place, so that all are right to 1e-6 of themselves down to 1e-7 of the
    largest.

    Args:
        weight: float ``[out, in]`` or ``[out, in / groups, kh, kw]``, see :func:`as_matrix`; or several of one shape,
            see :func:`stacked_singular_values`.

    Returns:
        float64 ``[min(out, in')]`` on the CPU, detached.

    Raises:
        VLMQError: if the weight is no finite floating-point matrix.
    """
    return stacked_singular_values([weight])[0]


def stacked_singular_values(weights: Sequence[Tensor]) -> Tensor:
    """As :func:`singular_values`, of several weights of one shape on one device: on a GPU in one batch.

    Returns:
        float64 ``[weights, min(out, in')]`` on the CPU, detached.

    Raises:
        VLMQError: as :func:`singular_values`, or the shapes differ.
    """
    matrices = [as_matrix(weight.detach()) for weight in weights]
    if len({matrix.shape for matrix in matrices}) != 1:
        raise VLMQError(f"weights decomposed together must have one shape, not {[list(m.shape) for m in matrices]}")
    if matrices[0].is_cuda:
        stack, scale = _in_range(torch.stack(matrices))
        squares = torch.linalg.eigvalsh(stack.mT @ stack if stack.shape[1] >= stack.shape[2] else stack @ stack.mT)
        values = squares.flip(1).clamp_min(0).sqrt()
        for row in (values[:, -1] < GRAM_FLOOR * values[:, 0]).nonzero().flatten().tolist():
            values[row] = torch.linalg.svdvals(stack[row])
        return (values * scale).cpu()
    return torch.stack([_on_cpu(matrix) for matrix in matrices])


def _in_range(matrix: Tensor) -> tuple[Tensor, float]:
    """In float64, over a power of two that keeps squares in its range (1 for any float32 weight), and that power."""
    largest = float(matrix.abs().max())
    scale = 1.0 if largest == 0 or 1e-100 < largest < 1e100 else 2.0 ** math.frexp(largest)[1]
    return (matrix.double() if scale == 1 else matrix.double() / scale), scale


def _on_cpu(matrix: Tensor) -> Tensor:
    # numpy's LAPACK, and its product of a matrix with its own transpose, are faster than torch's
    wide, scale = _in_range(matrix)
    array = wide.numpy()
    squares = np.linalg.eigvalsh(array.T @ array if array.shape[0] >= array.shape[1] else array @ array.T)
    values = np.sqrt(np.maximum(squares[::-1], 0))
    if values[-1] < GRAM_FLOOR * values[0]:
        values = np.linalg.svd(array, compute_uv=False)
    return torch.from_numpy(values * scale)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular values of one matrix and the scalars derived from them.

    A zero matrix has stable rank, effective rank and energy 0.

    Args:
        singular_values: float ``[r]`` with r at least 1, finite, not negative, largest first.

    Raises:
        VLMQError: if the values are not of that form.
    """

    singular_values: Tensor

    def __post_init__(self) -> None:
        values = self.singular_values
        if values.ndim != 1 or len(values) == 0 or not values.is_floating_point():
            raise VLMQError(f"a spectrum is a non-empty float vector, not {values.dtype} of shape {list(values.shape)}")
        if not torch.isfinite(values).all() or (values < 0).any() or (values.diff() > 0).any():
            raise VLMQError("singular values must be finite, not negative and sorted, largest first")

    @classmethod
    def of(cls, weight: Tensor) -> Spectrum:
        """Decompose a weight, see :func:`singular_values`. The values are kept on the CPU."""
        return cls(singular_values(weight))

    def __len__(self) -> int:
        """Number of singular values r."""
        return len(self.singular_values)

    @property
    def stable_rank(self) -> float:
        """Squared Frobenius norm over squared spectral norm, in [1, r] (Rudelson & Vershynin 2007)."""
        values = self.singular_values.double()
        if values[0] == 0:
            return 0.0
        return float((values / values[0]).square().sum())

    @property
    def effective_rank(self) -> float:
        """``exp`` of the entropy of the singular values normalised to sum 1, in [1, r] (Roy & Vetterli 2007, eq. 3)."""
        return effective_rank(self.singular_values)

    def energy_at(self, k: int) -> float:
        """Share of the squared singular values that lies in the ``k`` largest, in [0, 1]; 1 for ``k`` of r or more.

        Raises:
            VLMQError: if ``k`` is negative.
        """
        if k < 0:
            raise VLMQError(f"energy_at needs a rank of 0 or more, not {k}")
        values = self.singular_values.double()
        if values[0] == 0:
            return 0.0
        energy = (values / values[0]).square()
        return min(float(energy[:k].sum() / energy.sum()), 1.0)


def log_ratio(quantized: Tensor, reference: Tensor, floor: float = 1e-6) -> Tensor:
    """How much quantization grew or shrank each singular value, in octaves.

    Values below ``floor`` times the largest of both spectra are raised to it first: of weights in single precision,
    what is that small is rounding and has no meaningful ratio, and a rank that neither matrix has gives 0.

    Args:
        quantized: float ``[r]`` singular values of the quantized weight.
        reference: float ``[r]`` singular values of the full-precision weight.
        floor: relative size below which a singular value counts as zero, in (0, 1).

    Returns:
        float ``[r]``, ``log2(quantized / reference)``; always finite.

    Raises:
        VLMQError: if the shapes differ, ``floor`` is out of range, or values are negative or not finite.
    """
    if quantized.ndim != 1 or quantized.shape != reference.shape or len(quantized) == 0:
        raise VLMQError(
            f"spectra of shapes {list(quantized.shape)} and {list(reference.shape)} cannot be compared; "
            "both must be of one length"
        )
    if not 0 < floor < 1:
        raise VLMQError(f"floor must be between 0 and 1, not {floor}")
    both = torch.stack([quantized.double(), reference.double()])
    if not torch.isfinite(both).all() or (both < 0).any():
        raise VLMQError("singular values must be finite and not negative")
    largest = both.max()
    if largest == 0:
        return torch.zeros_like(quantized)
    logs = (both / largest).clamp_min(floor).log2()
    return (logs[0] - logs[1]).to(quantized.dtype)
