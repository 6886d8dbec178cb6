"""Second-order weight rounding (GPTQ)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchao.quantization.granularity import PerGroup, PerTensor

from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.calibration import Batch
from lightning_vlmq.quant.fake_quant import choose_qparams, quantize_dequantize
from lightning_vlmq.quant.layers import QuantizedLayer
from lightning_vlmq.quant.methods import METHODS, PTQMethod
from lightning_vlmq.quant.observers import grouped_rows, second_moments
from lightning_vlmq.quant.scheme import QuantScheme

DAMPING = 0.01
"""Added to the Hessian's diagonal, as a share of its mean (GPTQ section 3.3, step 3)."""
BLOCK = 128
"""Columns between lazy updates of the rest (GPTQ section 3.3, step 2)."""


@METHODS.register("gptq")
class GPTQ(PTQMethod):
    """Round one input column at a time and let the columns after it make up for the error (Frantar et al. 2023).

    Algorithm 1 of arXiv 2210.17323: the inverse Hessian of ``||W X - W_hat X||^2`` through its Cholesky factor, lazy
    updates in blocks of 128 columns, 1 % damping. Grids are min-max; a group's is taken when its first column is
    reached. Hessians come from one pass of the full-precision model, not from a pass per already quantized block.
    Activations are min-max. A convolution is a linear layer over its patches, one problem per group. torchao's
    prototype is not used: it runs on CUDA only, on linear layers only, for two fixed number formats.
    """

    def fit_weights(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Fix every layer's grid and replace its weight by the rounded one."""
        rounded = {}
        for name, layer, moment in second_moments(vlm, scheme, calibration):
            super().fit_weight(layer)
            rounded[name] = (layer, round_columns(layer, moment))
        for layer, weight in rounded.values():
            layer.set_weight(weight)


def round_columns(layer: QuantizedLayer, moment: Tensor) -> Tensor:
    """GPTQ's Algorithm 1 on one layer.

    Args:
        layer: with its min-max grid set; a group grid is set anew here.
        moment: second moment of the inputs, ``[groups, K, K]``; any multiple of the Hessian does.

    Returns:
        The rounded weight, in the shape of ``layer.weight``.
    """
    quantizer = layer.weight_fake_quant
    rows = grouped_rows(layer, layer.weight.detach()).clone()  # [G, N, K]
    groups, outputs, columns = rows.shape
    factor = inverse_factor(moment)
    group_size = quantizer.granularity.group_size if isinstance(quantizer.granularity, PerGroup) else columns
    shared = isinstance(quantizer.granularity, PerTensor)
    # [G, N, groups of columns]
    scale = quantizer.scale.detach().expand(groups * outputs) if shared else quantizer.scale.detach()
    zero_point = quantizer.zero_point.expand(groups * outputs) if shared else quantizer.zero_point
    scale, zero_point = (t.clone().view(groups, outputs, -1) for t in (scale, zero_point))
    out = torch.empty_like(rows)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.zeros_like(rows[:, :, start:stop])
        for column in range(start, stop):
            index = column // group_size
            if isinstance(quantizer.granularity, PerGroup) and column % group_size == 0:
                # the rest of the group may lie beyond this block, where this block's errors have not arrived yet
                now = rows[:, :, column : column + group_size].clone()
                if column + group_size > stop:
                    late = factor[:, start:stop, stop : column + group_size]
                    now[:, :, stop - column :] -= errors @ late
                scale[:, :, index], zero_point[:, :, index] = choose_qparams(
                    now.amin(-1), now.amax(-1), quantizer.qmin, quantizer.qmax, quantizer.symmetric
                )
            value, step, zero = rows[:, :, column], scale[:, :, index], zero_point[:, :, index]
            out[:, :, column] = quantize_dequantize(value, step, None, quantizer.qmin - zero, quantizer.qmax - zero)
            error = (value - out[:, :, column]) / factor[:, column, column, None]
            rows[:, :, column:stop] -= error[:, :, None] * factor[:, None, column, column:stop]
            errors[:, :, column - start] = error
        rows[:, :, stop:] -= errors @ factor[:, start:stop, stop:]
    if not shared:
        quantizer.set_qparams(scale.flatten(), zero_point.flatten())
    return out.view_as(layer.weight)


def inverse_factor(moment: Tensor) -> Tensor:
    """Upper Cholesky factor of the damped Hessian's inverse (Algorithm 1), computed in float64.

    Inputs that are always zero get the mean diagonal, so that their weights simply round.

    Args:
        moment: ``[groups, K, K]``, symmetric, positive semi-definite.

    Returns:
        ``[groups, K, K]``, upper triangular, the dtype of ``moment``.
    """
    hessian = moment.double().clone()
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    diagonal += torch.where(diagonal == 0, 1.0, 0.0) * diagonal.mean(1, keepdim=True).clamp_min(1e-30)
    diagonal += DAMPING * diagonal.mean(1, keepdim=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True).to(moment.dtype)
