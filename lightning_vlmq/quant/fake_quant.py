"""Fake quantization: values rounded onto an integer grid and back, with the gradients that training needs.

One formula serves every method::

    x_hat = clamp(round((x - offset) / scale), lo, hi) * scale + offset
    lo, hi = qmin - zero_point, qmax - zero_point

A round-to-nearest quantizer has an integer zero point and no offset; LSQ learns ``scale``; LSQ+ learns ``scale`` and
``offset``; HQQ's real-valued zero is an offset. torchao's ``IntxFakeQuantizer(range_learning=True)`` is not used: it
has no gradient scale, no per-tensor steps and no convolutions. torch's fused
``fake_quantize_per_tensor_affine`` is not used either: it is several times slower than these in-place operations on a
CPU (it also writes a mask), and it turns NaN into a finite level where this leaves it to be seen.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization.granularity import Granularity, PerAxis, PerGroup, PerTensor, PerToken
from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine_with_min_max

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.quant.scheme import UNQUANTIZED_BITS, integer_range

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


class LearnedStep(torch.autograd.Function):
    """Fake quantization with LSQ's and LSQ+'s gradients, in any floating dtype.

    With ``v = (x - offset) / scale``:

    - ``d x_hat / d x`` is 1 where ``lo - margin <= v <= hi + margin`` and 0 elsewhere (LSQ, Esser et al. 2020, Eq. 5, has
      no margin; torch's fake quantization, which asks whether the rounded level is in range, has one of 0.5);
    - ``d x_hat / d scale`` is ``round(v) - v`` inside, ``lo`` below and ``hi`` above (LSQ Eq. 3), times ``grad_scale``
      (LSQ section 2.2: ``1 / sqrt(N Qp)``);
    - ``d x_hat / d offset`` is 0 inside and 1 elsewhere (LSQ+, Bhalgat et al. 2020, section 3.1), times
      ``grad_scale``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        lo: Tensor | int,
        hi: Tensor | int,
        grad_scale: float,
        margin: float = 0.0,
    ) -> Tensor:
        """Quantize and dequantize ``x``; ``scale``, ``offset``, ``lo`` and ``hi`` broadcast against it."""
        bounds = [bound for bound in (lo, hi) if isinstance(bound, Tensor)]
        ctx.save_for_backward(x, scale, *([] if offset is None else [offset]), *bounds)
        ctx.has_offset = offset is not None
        ctx.bounds = None if bounds else (lo, hi)
        ctx.grad_scale, ctx.margin = grad_scale, margin
        return quantize_dequantize(x, scale, offset, lo, hi)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients for ``x``, ``scale`` and ``offset``."""
        (grad,) = grads
        x, scale, *rest = ctx.saved_tensors
        offset = rest.pop(0) if ctx.has_offset else None
        lo, hi = rest if ctx.bounds is None else ctx.bounds
        v = (x if offset is None else x - offset) * scale.clamp_min(STEP_FLOOR).reciprocal()
        nearest = v.clamp_min(lo - ctx.margin).clamp_max_(hi + ctx.margin)
        inside = v.eq_(nearest)  # 1.0 or 0.0: a mask of bool, and torch.where, take several times longer on a CPU
        grad_x = grad * inside
        grad_scale = grad_offset = None
        if ctx.needs_input_grad[1]:
            level = nearest.round().clamp_min_(lo).clamp_max_(hi) if ctx.margin else nearest.round()
            per_value = level.sub_(nearest.mul_(inside))  # round(v) - v inside, the level itself elsewhere
            grad_scale = per_value.mul_(grad).sum_to_size(scale.shape) * ctx.grad_scale
        if offset is not None and ctx.needs_input_grad[2]:
            grad_offset = (grad - grad_x).sum_to_size(offset.shape) * ctx.grad_scale
        return grad_x if ctx.needs_input_grad[0] else None, grad_scale, grad_offset, None, None, None, None


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


class FakeQuantizer(nn.Module):
    """Fake quantizer of one weight or of one layer's input.

    Args:
        bits: 2 to 8; 16 makes it pass its input through.
        symmetric: signed grid with zero point 0, else unsigned grid with an integer zero point.
        granularity: what shares one step (torchao's value objects).
        blocks: number of steps kept (1 per tensor, channels or groups of a weight).
        dynamic: take the range from each input; then no state is used.
        values_per_step: LSQ's N, for a weight the number of values that share a step; None for an activation, where it
            is the number of features of one sample.

    Attributes:
        scale: ``[blocks]`` parameter, frozen until a method makes it learnable.
        zero_point: ``[blocks]`` buffer of integer values.
        offset: ``[blocks]`` parameter or None (see :meth:`set_offset`).
        scales_gradient: whether a learned step's gradient is multiplied by LSQ's ``1 / sqrt(N Qp)``.
        enabled: whether forward quantizes; calibration switches it off to see full-precision activations.
        calibrated: whether a static quantizer has its step.
        clipping: what a static grid clips of the inputs it was fitted to, once that is noted; not part of a checkpoint.
    """

    zero_point: Tensor
    has_integers = True  # what forward makes of a weight is integers on the grid, and nothing else

    def __init__(
        self,
        bits: int,
        symmetric: bool,
        granularity: Granularity,
        blocks: int = 1,
        dynamic: bool = False,
        values_per_step: int | None = None,
    ) -> None:
        super().__init__()
        self.bits = bits
        self.symmetric = symmetric
        self.granularity = granularity
        self.dynamic = dynamic
        self.values_per_step = values_per_step
        self.enabled = self.quantizes
        self.calibrated = False
        self.scales_gradient = True
        self.clipping: Clipping | None = None
        self.qmin, self.qmax = integer_range(bits, symmetric)
        self.scale = nn.Parameter(torch.full((blocks,), math.nan), requires_grad=False)
        self.register_buffer("zero_point", torch.zeros(blocks))
        self.register_parameter("offset", None)

    @property
    def quantizes(self) -> bool:
        """Whether this side is quantized at all."""
        return self.bits != UNQUANTIZED_BITS

    def set_qparams(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Fix the grid.

        Args:
            scale: ``[blocks]`` steps, finite; entries below :data:`STEP_FLOOR` are raised to it.
            zero_point: ``[blocks]`` integer-valued levels of zero; zeros when None.

        Raises:
            VLMQError: for steps that are not finite or of the wrong number.
        """
        if scale.numel() != self.scale.numel():
            raise VLMQError(f"got {scale.numel()} quantization steps for {self.scale.numel()} blocks")
        if not bool(torch.isfinite(scale).all()):
            raise VLMQError(
                "quantization steps are not finite; check the weights and the calibration data for NaN or inf"
            )
        with torch.no_grad():
            self.scale.copy_(scale.reshape(-1).clamp_min(STEP_FLOOR))
            self.zero_point.copy_(torch.zeros_like(self.zero_point) if zero_point is None else zero_point.reshape(-1))
        self.calibrated = True

    def set_range(self, minimum: Tensor, maximum: Tensor) -> None:
        """Fix the grid so that it spans ``[minimum, maximum]`` (``[blocks]`` each); see :func:`choose_qparams`.

        Raises:
            VLMQError: for ends that are not finite.
        """
        if not bool(torch.isfinite(minimum).all() and torch.isfinite(maximum).all()):
            raise VLMQError("a quantization range is not finite; check weights and calibration data for NaN or inf")
        self.set_qparams(*choose_qparams(minimum, maximum, self.qmin, self.qmax, self.symmetric))

    def round_within(self, blocks: Tensor, minimum: Tensor, maximum: Tensor) -> Tensor:
        """Fake-quantize with other ranges than its own, which stay as they are; no gradient.

        Args:
            blocks: ``[n, values]``, or any shape where one range is given.
            minimum: ``[n]`` or ``[1]``.
            maximum: like ``minimum``.
        """
        scale, zero_point = choose_qparams(minimum, maximum, self.qmin, self.qmax, self.symmetric)
        shape = (-1,) if scale.numel() == 1 else (-1, 1)
        lo, hi = (self.qmin - zero_point).view(shape), (self.qmax - zero_point).view(shape)
        return quantize_dequantize(blocks, scale.view(shape), None, lo, hi)

    def set_offset(self, offset: Tensor) -> None:
        """Give the grid a real-valued offset (``[blocks]``) and drop its zero point."""
        self.offset = nn.Parameter(offset.detach().reshape(-1).to(self.scale), requires_grad=False)
        self.zero_point.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize ``x`` in its shape and dtype.

        Raises:
            VLMQError: when a static quantizer has not been calibrated.
        """
        if not self.enabled:
            return x
        blocks = to_blocks(x, self.granularity)
        scale, offset, lo, hi = self.grid(blocks)
        if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
            # a fixed min-max grid must not lose its extreme values' gradients to the rounding of its step or zero point
            margin = 0.0 if scale.requires_grad else 0.5
            out = LearnedStep.apply(blocks, scale, offset, lo, hi, self._gradient_scale(x), margin)
        else:
            out = quantize_dequantize(blocks, scale, offset, lo, hi)
        return out.view(x.shape).to(x.dtype)

    def grid(self, blocks: Tensor) -> tuple[Tensor, Tensor | None, Tensor | int, Tensor | int]:
        """The grid that ``blocks``, from :func:`to_blocks`, is rounded onto.

        Returns:
            ``(scale, offset, lo, hi)`` as :func:`quantize_dequantize` takes them, broadcastable to ``blocks``.

        Raises:
            VLMQError: when a static quantizer has not been calibrated.
        """
        scale, zero_point = self._grid(blocks)
        column = (-1,) if isinstance(self.granularity, PerTensor) else (-1, 1)
        offset = None if self.offset is None or self.dynamic else self.offset.view(column)
        lo: Tensor | int = self.qmin
        hi: Tensor | int = self.qmax
        if not self.symmetric and offset is None:
            lo, hi = (self.qmin - zero_point).view(column), (self.qmax - zero_point).view(column)
        return scale.view(column), offset, lo, hi

    @torch.no_grad()
    def integers(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The whole numbers behind what :meth:`forward` makes of a weight.

        ``(levels - zero_point) * scale`` (plus ``offset``) is that result to the last bit. An unsigned grid is moved
        down by ``2^(bits-1)``, to fit signed integers.

        Args:
            x: the weight, for a quantizer of 2 to 8 bits.

        Returns:
            ``(levels, scale, zero_point, offset)``: int8 in the shape of ``x``; float, int8 and float or None, ``[blocks]``.
        """
        if not self.has_integers:
            raise VLMQError(
                f"a weight with a {type(self).__name__.lower()} error is not integers; convert another method's model"
            )
        blocks = to_blocks(x, self.granularity)
        scale, offset, lo, hi = self.grid(blocks)
        scale = scale.clamp_min(STEP_FLOOR)
        levels = ((blocks if offset is None else blocks - offset) * scale.reciprocal()).round()
        lowest = -(2 ** (self.bits - 1))
        zero_point = torch.as_tensor(lowest - lo, dtype=torch.int8, device=x.device).expand_as(scale)
        stored = (levels.clamp_(lo, hi) + (lowest - lo)).to(torch.int8).view(x.shape)  # type: ignore[arg-type]
        steps = scale.flatten().clone(), zero_point.flatten().clone()
        return stored, *steps, None if offset is None else offset.flatten().clone()

    def _grid(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Stored step and zero point, or those of this very input when dynamic."""
        if self.dynamic:
            with torch.no_grad():
                low, high = block_range(blocks, self.granularity)
                return choose_qparams(low, high, self.qmin, self.qmax, self.symmetric)
        if not self.calibrated:
            raise VLMQError(
                "a quantizer has no range yet; run the method's prepare() or load a quantized checkpoint first"
            )
        return self.scale, self.zero_point

    def _gradient_scale(self, x: Tensor) -> float:
        """LSQ section 2.2: ``1 / sqrt(N Qp)``; the paper counts features, so one sample of a batch counts."""
        if not self.scales_gradient:
            return 1.0
        values = x[0].numel() if self.values_per_step is None else self.values_per_step
        return 1.0 / math.sqrt(max(values, 1) * self.qmax)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.calibrated = bool(torch.isfinite(self.scale).all())

    def extra_repr(self) -> str:
        """Bits, grid and granularity for ``print(model)``."""
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"bits={self.bits}, {kind}, {self.granularity}, dynamic={self.dynamic}"
