"""Second-order weight rounding (GPTQ)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchao.quantization.granularity import PerGroup

from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.calibrating import Batch
from lightning_vlmq.quant.fake_quant import choose_qparams, quantize_dequantize
from lightning_vlmq.quant.layers import QuantizedLayer
from lightning_vlmq.quant.methods import METHODS, PTQMethod
from lightning_vlmq.quant.observers import grouped_rows, second_moments
from lightning_vlmq.quant.scheme import QuantScheme

DAMPING = 0.01
"""Added to the Hessian's diagonal, as a share of its mean (GPTQ section 4, step 3)."""
SPAN = 16
"""Columns that are rounded one by one before what they did reaches the others (GPTQ section 4, step 2)."""


@METHODS.register("gptq")
class GPTQ(PTQMethod):
    """Round one input column at a time and let the columns after it make up for the error (Frantar et al. 2023).

    Algorithm 1 of arXiv 2210.17323, the updates of its Eq. 2 and 3 in a fixed order, on the Hessian of
    ``||W X - W_hat X||^2`` (Eq. 1) with 1 % damping, in the form of rounding with linear feedback from an LDL
    decomposition, which Chee et al. 2023 (QuIP, arXiv 2307.13304) prove equal to it and which needs one Cholesky factor
    and no inverse. Grids are min-max; a group's is taken when its first column is reached. Hessians come from one pass
    of the full-precision model, not from a pass per already quantized block. Activations are min-max. A convolution is
    a linear layer over its patches, one problem per group. torchao's prototype is not used: it runs on CUDA only, on
    linear layers only, for three fixed number formats.
    """

    def fit_weights(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Fix every layer's grid and replace its weight by the rounded one."""
        rounded = []
        for _, layer, moment in second_moments(vlm, scheme, calibration):
            super().fit_weight(layer)
            rounded.append((layer, round_columns(layer, moment)))
        for layer, weight in rounded:
            layer.set_weight(weight)


def round_columns(layer: QuantizedLayer, moment: Tensor) -> Tensor:
    """GPTQ on one layer: column c is rounded after adding what the columns before it owe it.

    ``w_hat_c = Q(w_c + sum over j < c of (w_j - w_hat_j) feedback_jc)``. The sums are matrix products over spans that
    are halved and halved again, so that a column's part waits until its span is done.

    Args:
        layer: with its min-max grid set; a group grid is set anew here.
        moment: second moment of the inputs, ``[groups, K, K]``; any multiple of the Hessian does.

    Returns:
        The rounded weight, in the shape of ``layer.weight``.
    """
    quantizer = layer.weight_fake_quant
    value = grouped_rows(layer, layer.weight.detach()).transpose(1, 2).clone(memory_format=torch.contiguous_format)
    change = value.clone()  # [G, K, N], as value: a column lies together
    lower = feedback(moment).transpose(1, 2).contiguous()
    groups, columns, outputs = value.shape
    has_groups = isinstance(quantizer.granularity, PerGroup)
    size = quantizer.granularity.group_size if has_groups else columns
    shape = (columns // size, groups, outputs)
    scale, zero_point = (
        t.detach().expand(groups * outputs * shape[0]) if t.numel() == 1 else t.detach().clone()
        for t in (quantizer.scale, quantizer.zero_point)
    )
    scale, zero_point = (t.view(groups, outputs, -1).movedim(-1, 0).contiguous() for t in (scale, zero_point))

    def round_span(start: int, stop: int) -> None:
        length = stop - start
        if has_groups and length == size:
            # what the whole group would be with nothing left to round, of which `value` is right for the first column
            kept, sums = change[:, start:stop], value[:, start:stop] - change[:, start:stop]
            triangle = lower[:, start:stop, start:stop]
            now = kept + torch.linalg.solve_triangular(triangle, sums, upper=False, unitriangular=True)
            scale[start // size], zero_point[start // size] = choose_qparams(
                now.amin(1), now.amax(1), quantizer.qmin, quantizer.qmax, quantizer.symmetric
            )
        if length > size or length > SPAN:
            middle = start + (length // size // 2 * size if length > size else length // 2)
            round_span(start, middle)
            value[:, middle:stop].baddbmm_(lower[:, middle:stop, start:middle], change[:, start:middle])
            round_span(middle, stop)
            return
        step, zero = scale[start // size], zero_point[start // size]
        low, high = quantizer.qmin - zero, quantizer.qmax - zero
        for column in range(start, stop):
            now = value[:, column : column + 1].baddbmm_(
                lower[:, column : column + 1, start:column], change[:, start:column]
            )
            now.copy_(quantize_dequantize(now[:, 0], step, None, low, high)[:, None])
            change[:, column] -= now[:, 0]

    round_span(0, columns)
    if has_groups:
        quantizer.set_qparams(scale.movedim(0, -1).flatten(), zero_point.movedim(0, -1).flatten())
    return value.transpose(1, 2).reshape_as(layer.weight)


def feedback(moment: Tensor) -> Tensor:
    """Shares of each column's rounding error that the columns after it make up for.

    With the damped Hessian ``H = U D U^T``, U unit upper triangular, it is U; computed in float64. Inputs that are
    always zero get the mean diagonal, so that their weights simply round.

    Args:
        moment: ``[groups, K, K]``, symmetric, positive semi-definite.

    Returns:
        ``[groups, K, K]``, unit upper triangular, the dtype of ``moment``.
    """
    hessian = moment.flip(1, 2).double()  # last input first, as a Cholesky factor is lower triangular
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    diagonal += torch.where(diagonal == 0, 1.0, 0.0) * diagonal.mean(1, keepdim=True).clamp_min(1e-30)
    diagonal += DAMPING * diagonal.mean(1, keepdim=True)
    factor = torch.linalg.cholesky(hessian)
    factor /= factor.diagonal(dim1=1, dim2=2).clone()[:, None]
    return factor.to(moment.dtype).flip(1, 2)
