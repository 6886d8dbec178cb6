"""The fake quantizer of one weight or of one layer's input: its grid, fixed or learned or of each input, and its integers.

torchao's ``IntxFakeQuantizer(range_learning=True)`` is not used: it has no gradient scale, no per-tensor steps and no
convolutions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization.granularity import Granularity, PerTensor

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.quant.learned_step import LearnedStep
from lightning_vlmq.quant.rounding import (
    STEP_FLOOR,
    Clipping,
    block_range,
    choose_qparams,
    quantize_dequantize,
    to_blocks,
)
from lightning_vlmq.quant.scheme import UNQUANTIZED_BITS, integer_range


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
        clipping: what a static grid clips of the inputs, or the weight, it was fitted to, once that is noted; not part of a checkpoint.
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

    @property
    def is_static(self) -> bool:
        """Whether this side is quantized by a step that calibration sets, rather than not at all or by each input's own range."""
        return self.quantizes and not self.dynamic

    @property
    def extra_bits(self) -> int:
        """Bits that a weight's quantizer keeps beside its integers and their steps: of what is added to them in full precision."""
        return 0

    def to_round(self, x: Tensor) -> Tensor:
        """What of ``x`` is put on the grid, in its shape: all of it, unless something is taken from it before."""
        return x

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


def unused_steps(model: nn.Module) -> set[str]:
    """Names of the steps that no forward pass reads and no calibration sets: of sides in full precision, and of dynamic ranges."""
    quantizers = ((name, m) for name, m in model.named_modules() if isinstance(m, FakeQuantizer))
    return {f"{name}.scale" for name, m in quantizers if not m.is_static}
