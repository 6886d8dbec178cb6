"""Rounding onto an integer grid and back: the grid of a range, what shares one step, what a grid clips. Functions of tensors.

One formula serves every method::

    x_hat = clamp(round((x - offset) / scale), lo, hi) * scale + offset
    lo, hi = qmin - zero_point, qmax - zero_point

A round-to-nearest quantizer has an integer zero point and no offset; LSQ learns ``scale``; LSQ+ learns ``scale`` and
``offset``; HQQ's real-valued zero is an offset. torch's fused ``fake_quantize_per_tensor_affine`` is not used: it is several
times slower than these in-place operations on a CPU (it also writes a mask), and it turns NaN into a finite level where this
leaves it to be seen.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from torch import Tensor
from torchao.quantization.granularity import Granularity, PerAxis, PerGroup, PerTensor, PerToken
from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine_with_min_max

from lightning_vlmq.core.errors import VLMQError

STEP_FLOOR = 1e-12
"""Smallest step: keeps a learned step positive and a constant-zero tensor's step away from a division by zero."""


def choose_qparams(minimum: Tensor, maximum: Tensor, qmin: int, qmax: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Step and zero point whose grid spans ``[minimum, maximum]`` (widened to hold zero).

    Symmetric: ``scale = max(min / qmin, max / qmax)``, zero point 0: nothing is clipped and the extreme value is a
        level
    (with the other common choice, ``max|x| / ((qmax - qmin) / 2)``, it is half-way between two and float noise
    decides).
    Asymmetric: ``scale = (max - min) / (qmax - qmin)``, ``zero_point = qmin - round(min / scale)``: zero is a level.

    Args:
        minimum: smallest values, any shape, float32 or float64.
        maximum: largest values, the same shape and dtype.
        qmin: smallest integer level.
        qmax: largest integer level.
        symmetric: which of the two formulas.

    Returns:
        ``(scale, zero_point)``, both in the shape and dtype of ``minimum``; the zero point is integer-valued.
    """
    mapping = MappingType.SYMMETRIC_NO_CLIPPING_ERR if symmetric else MappingType.ASYMMETRIC
    return choose_qparams_affine_with_min_max(
        minimum,
        maximum,
        mapping,
        (),
        torch.int32,  # only says that qmin..qmax is allowed; nothing is stored as integers
        qmin,
        qmax,
        eps=STEP_FLOOR,
        zero_point_dtype=minimum.dtype,
    )


def to_blocks(x: Tensor, granularity: Granularity) -> Tensor:
    """View ``x`` so that each row shares one step.

    Args:
        x: a weight ``[out, ...]`` or an activation ``[batch, ..., features]``.
        granularity: ``PerTensor`` (``x`` is returned as it is: its one step broadcasts), ``PerAxis(0)`` (rows are
            first-axis entries), ``PerGroup(g)`` (rows are ``g`` consecutive values), ``PerToken`` (rows are last-axis
            vectors).

    Returns:
        ``x`` itself for ``PerTensor``, else ``[blocks, values per block]``.
    """
    if isinstance(granularity, PerTensor):
        return x
    if isinstance(granularity, PerAxis) and granularity.axis == 0:
        return x.reshape(x.shape[0], -1)
    if isinstance(granularity, PerGroup):
        return x.reshape(-1, granularity.group_size)
    if isinstance(granularity, PerToken):
        return x.reshape(-1, x.shape[-1])
    raise VLMQError(f"unsupported granularity {granularity}; use PerTensor, PerAxis(0), PerGroup or PerToken")


def block_range(blocks: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each block that :func:`to_blocks` made; two ``[blocks]`` tensors."""
    if isinstance(granularity, PerTensor):
        low, high = torch.aminmax(blocks)
        return low.view(1), high.view(1)
    return blocks.amin(1), blocks.amax(1)  # aminmax along an axis takes several times longer on a CPU


def all_finite(x: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity: by its extremes, as :func:`torch.isfinite` goes over it six times."""
    return x.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(x.detach()))).all())


def quantize_dequantize(x: Tensor, scale: Tensor, offset: Tensor | None, lo: Tensor | int, hi: Tensor | int) -> Tensor:
    """Round ``x`` onto the grid and back (see the module's formula); no gradient of its own.

    Args:
        x: values, any shape; NaN stays NaN, infinities saturate.
        scale: step, broadcastable to ``x``; entries below :data:`STEP_FLOOR` count as that.
        offset: real-valued shift or None, broadcastable.
        lo: smallest level minus zero point.
        hi: largest level minus zero point.
    """
    scale = scale.clamp_min(STEP_FLOOR)
    level = (x if offset is None else x - offset) * scale.reciprocal()
    # in two steps, as clamp_ with both bounds is slow where they are tensors to be broadcast
    level = level.round_().clamp_min_(lo).clamp_max_(hi).mul_(scale)
    return level if offset is None else level.add_(offset)


@dataclass(frozen=True)
class Clipping:
    """What a grid does to values beyond its ends; sums, so that those of several batches add up.

    Errors are those of the batches in which it clips anything.

    Attributes:
        values: how many there are.
        below: of these, more than half a step below the lowest level.
        above: likewise above the highest.
        energy: sum of the clipped values' squares.
        clipped_error: sum of their squared errors.
        error: sum of all values' squared errors.
        minmax_error: what that would be on the grid of as many levels that spans each batch (or block).
    """

    values: int = 0
    below: int = 0
    above: int = 0
    energy: float = 0.0
    clipped_error: float = 0.0
    error: float = 0.0
    minmax_error: float = 0.0

    def __add__(self, other: Clipping) -> Clipping:
        return Clipping(*(mine + its for mine, its in zip(astuple(self), astuple(other))))

    @property
    def shares(self) -> tuple[float, float]:
        """Of all values, those clipped at the grid's lower and at its upper end."""
        return self.below / max(self.values, 1), self.above / max(self.values, 1)

    @property
    def lost(self) -> float:
        """Share of the clipped values' energy that clipping takes."""
        return self.clipped_error / self.energy if self.energy else 0.0
