"""The gradients of fake quantization: of values, of a learned step, of a learned offset."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_vlmq.quant.rounding import STEP_FLOOR, quantize_dequantize


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
