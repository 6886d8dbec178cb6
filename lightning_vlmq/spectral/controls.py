"""Controls that part the two readings of quantization's effect: "it filters the spectrum" and "any noise does it"."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_vlmq.core.deterministic import running_sum
from lightning_vlmq.core.errors import VLMQError, unknown
from lightning_vlmq.spectral.weights import as_matrix

DISTRIBUTIONS = ("gaussian", "uniform", "sign_flip")
"""Kinds of noise; ``sign_flip`` keeps the size of every entry of the error and draws its sign."""


def draw_noise(error: Tensor, distribution: str, generator: torch.Generator) -> Tensor:
    """Noise with the norm of a quantization error in every row.

    Args:
        error: float64 ``[rows, values]``.
        distribution: one of :data:`DISTRIBUTIONS`.
        generator: CPU generator; the same seed gives the same noise on every device.

    Returns:
        float64, the shape and device of ``error``; a row without error gets none.

    Raises:
        VLMQError: an unknown distribution.
    """
    if distribution not in DISTRIBUTIONS:
        raise unknown("distribution", distribution, DISTRIBUTIONS)
    if distribution == "gaussian":
        noise = torch.randn(error.shape, generator=generator, dtype=torch.float64)
    else:
        noise = torch.rand(error.shape, generator=generator, dtype=torch.float64) * 2 - 1
    noise = noise.to(error.device)
    if distribution == "sign_flip":
        return error.abs() * noise.sign()
    return noise * (error.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True).clamp_min(1e-300))


def matched_noise(
    weight: Tensor, reference_error: Tensor, generator: torch.Generator, distribution: str = "gaussian"
) -> Tensor:
    """Weight plus noise that has the norm of a quantization error in every output channel.

    Matching channel by channel keeps the control fair for per-channel scales, where the error's size differs between
    channels; the norm over the whole tensor then matches too. Only the direction of the error is random.

    Args:
        weight: float ``[out, ...]``, full precision.
        reference_error: float, the weight's shape: effective quantized weight minus ``weight``.
        generator: CPU generator; the same seed gives the same noise on every device.
        distribution: one of :data:`DISTRIBUTIONS`.

    Returns:
        A new tensor of the weight's shape, dtype and device, detached.

    Raises:
        VLMQError: if the shapes differ, either tensor is no finite floating-point matrix, or the distribution is unknown.
    """
    if weight.shape != reference_error.shape:
        raise VLMQError(
            f"weight {list(weight.shape)} and error {list(reference_error.shape)} differ in shape; "
            "pass the error of this very weight"
        )
    matrix, error = as_matrix(weight.detach()).double(), as_matrix(reference_error.detach()).double()
    return (matrix + draw_noise(error, distribution, generator)).reshape(weight.shape).to(weight.dtype)


class RankCut:
    """Singular directions of a matrix, and what its output loses without some of them.

    Plain, the best approximations of the matrix (Eckart & Young 1936); with the second moment of the inputs, those of
    its outputs ``W x`` (the activation-weighted low-rank problem of e.g. LQER and QERA). As directions are orthogonal
    under the norm in question, only the weighted form loses exactly the squared singular values in output error; for
    the plain one it is computed.

    Args:
        weight: float ``[out, in]`` or ``[out, in / groups, kh, kw]``, see :func:`~lightning_vlmq.spectral.as_matrix`.
        moment: float ``[in', in']``, second moment of the inputs of the matrix; the identity if not given.
        is_weighted: whether the directions are chosen by the moment too, and not only judged by it.

    Raises:
        VLMQError: if the weight is no finite floating-point matrix or the moment does not fit.
    """

    def __init__(self, weight: Tensor, moment: Tensor | None = None, is_weighted: bool = False) -> None:
        self.weight = weight.detach()
        matrix = as_matrix(self.weight).double()
        if moment is not None and moment.shape != (matrix.shape[1],) * 2:
            raise VLMQError(f"a moment {list(moment.shape)} does not fit a weight of {matrix.shape[1]} inputs")
        self._moment = None if moment is None else moment.to(matrix)
        root = inverse = None
        if is_weighted and self._moment is not None:
            root, inverse = square_roots(self._moment)
        left, self.values, right = torch.linalg.svd(matrix if root is None else matrix @ root, full_matrices=False)
        self._left = left * self.values
        self._right = right if inverse is None else right @ inverse

    def __len__(self) -> int:
        """Number of directions."""
        return len(self.values)

    def keep(self, start: int, stop: int | None = None) -> Tensor:
        """The weight with directions ``start`` to ``stop`` alone, in its shape and dtype.

        Raises:
            VLMQError: if the range is not within 0 and the number of directions.
        """
        end = len(self) if stop is None else stop
        if not 0 <= start <= end <= len(self):
            raise VLMQError(f"ranks {start} to {end} are not within 0 to {len(self)}")
        if (start, end) == (0, len(self)):
            return self.weight.clone()
        return (self._left[:, start:end] @ self._right[start:end]).reshape(self.weight.shape).to(self.weight.dtype)

    def errors(self, from_top: bool = False) -> Tensor:
        """Mean squared output error, summed over outputs, without the last (or first) k directions, k from 0 to all.

        Returns:
            float64 ``[len + 1]``, 0 first.
        """
        left, right = (self._left.flip(1), self._right.flip(0)) if not from_top else (self._left, self._right)
        inputs = right if self._moment is None else right @ self._moment
        products = (left.mT @ left) * (inputs @ right.mT)  # error of a set of directions: the sum of its block
        edges = products.tril(-1).sum(1) * 2 + products.diagonal()
        return torch.cat([edges.new_zeros(1), running_sum(edges)]).clamp_min(0)

    def nearest(self, error: float, from_top: bool = False) -> int:
        """How many of the last (or first) directions to drop for the output error nearest to ``error``, on a log scale.

        At least one, but 0 where ``error`` is 0.
        """
        if error <= 0:
            return 0
        found = self.errors(from_top)[1:].clamp_min(1e-300).log()
        return 1 + int((found - torch.tensor(error).log()).abs().argmin())


def square_roots(moment: Tensor, floor: float = 1e-10) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a second moment ``[d, d]`` and its pseudo-inverse, float64.

    Directions with less than ``floor`` of the largest energy count as never entered.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    kept = values > floor * values[-1].clamp_min(0)
    root = torch.where(kept, values, 0.0).clamp_min(0).sqrt()
    inverse = torch.where(kept, root, 1.0).reciprocal() * kept
    return (vectors * root) @ vectors.mT, (vectors * inverse) @ vectors.mT


def filter_gains(weight: Tensor, quantized: Tensor) -> tuple[Tensor, Tensor]:
    """How much quantization leaves of each singular direction of a weight, as a filter: smoothed, and as measured.

    ``g_k = u_k^T W_q v_k / s_k``, not the ratio of singular values: noise makes small singular values grow, so that
    their ratio would call it amplification. Each is averaged, with weights ``s_k^2`` (least squares), over a window of
    ranks that is a constant factor wide, ``[k / sqrt(2), k sqrt(2)]`` in 1-based ranks.

    Args:
        weight: float ``[out, in]`` or a convolution's, see :func:`~lightning_vlmq.spectral.as_matrix`.
        quantized: effective quantized weight, the same shape.

    Returns:
        float64 ``[r]`` each, largest singular direction first; 1 where the weight has no such direction.

    Raises:
        VLMQError: if the shapes differ or either is no finite floating-point matrix.
    """
    if weight.shape != quantized.shape:
        raise VLMQError(f"weight {list(weight.shape)} and quantized weight {list(quantized.shape)} differ in shape")
    matrix, other = as_matrix(weight.detach()).double(), as_matrix(quantized.detach()).double()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    energy, coherent = values.square(), ((left.mT @ other) * right).sum(1) * values
    kept = values > 1e-7 * values[0]
    measured = torch.where(kept, coherent / energy.where(kept, torch.ones(())), 1.0)
    rank = torch.arange(1, len(values) + 1, dtype=torch.float64)
    low = (rank / 2**0.5).ceil().long().clamp_min(1) - 1
    high = (rank * 2**0.5).floor().long().clamp_max(len(values))
    sums = [torch.cat([t.new_zeros(1), running_sum(torch.where(kept, t, 0.0))]).cpu() for t in (energy, coherent)]
    window, product = (total[high] - total[low] for total in sums)
    smooth = torch.where(window > 0, product / window.where(window > 0, torch.ones(())), 1.0)
    return smooth.to(measured), measured


def shrink_spectrum(weight: Tensor, gains: Tensor) -> Tensor:
    """``U diag(clip(g, 0, 1) s) V^T``: the weight with each singular direction damped, never amplified.

    Args:
        weight: float ``[out, in]`` or a convolution's.
        gains: ``[r]``, see :func:`filter_gains`; what lies outside [0, 1] is clipped to it.

    Returns:
        A new tensor of the weight's shape, dtype and device, detached.

    Raises:
        VLMQError: if the weight is no finite floating-point matrix or the gains are of another number.
    """
    matrix = as_matrix(weight.detach()).double()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    if gains.shape != values.shape:
        raise VLMQError(f"{len(values)} singular directions need as many gains, got {list(gains.shape)}")
    return ((left * (gains.to(values).clamp(0, 1) * values)) @ right).reshape(weight.shape).to(weight.dtype)
