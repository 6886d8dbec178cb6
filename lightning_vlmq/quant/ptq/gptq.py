"""Second-order weight rounding (GPTQ)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torchao.quantization.granularity import PerGroup

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.calibrating import Batch
from lightning_vlmq.quant.clipping import judge
from lightning_vlmq.quant.fake_quant import FakeQuantizer
from lightning_vlmq.quant.fits import Fit
from lightning_vlmq.quant.layers import QuantizedLayer
from lightning_vlmq.quant.methods import METHODS, PTQMethod, register, within
from lightning_vlmq.quant.observers import grouped_rows, second_moments
from lightning_vlmq.quant.ptq.mse import search_blocks
from lightning_vlmq.quant.rounding import choose_qparams, quantize_dequantize
from lightning_vlmq.quant.scheme import QuantScheme

SPAN = 16
"""Columns that are rounded one by one before what they did reaches the others (GPTQ section 4, step 2)."""

Ranges = Literal["minmax", "mse"]


@register("gptq")
@dataclass(frozen=True)
class GPTQ(PTQMethod):
    """Round one input column at a time and let the columns after it make up for the error (Frantar et al. 2023).

    Algorithm 1 of arXiv 2210.17323, the updates of its Eq. 2 and 3 in a fixed order, on the Hessian of
    ``||W X - W_hat X||^2`` (Eq. 1), damped, in the form of rounding with linear feedback from an LDL
    decomposition, which Chee et al. 2023 (QuIP, arXiv 2307.13304) prove equal to it and which needs one Cholesky factor
    and no inverse. A group's grid is taken when its first column is reached. Hessians come from one pass
    of the full-precision model, not from a pass per already quantized block. Activations are min-max. A convolution is
    a linear layer over its patches, one problem per group. torchao's prototype is not used: it runs on CUDA only, on
    linear layers only, for three fixed number formats.

    Attributes:
        damping: added to the Hessian's diagonal, as a share of its mean (section 4, step 3: 0.01).
        act_order: round the columns with the largest inputs first, as an option of the authors' code has it; then the
            grids of groups are those of the weights as they were.
        grid: ranges of the weight grids: ``minmax``, or those with the least squared error (``mse``), as another option of the
            authors' code has it.
    """

    damping: float = within(0.01, 1e-8, 1)
    act_order: bool = False
    grid: Ranges = "minmax"

    def fit_weights(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Fix every layer's grid and replace its weight by the rounded one."""
        self.fits(vlm, scheme, calibration, (self.grid,))[self.grid].restore()

    def fits(
        self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch], grids: Sequence[Ranges]
    ) -> dict[Ranges, Fit]:
        """Rounded weights of every layer on each of several grids, by the grid's name, from one pass over the inputs.

        The model keeps its weights; its weight grids are left as the last fit has them.

        Raises:
            VLMQError: a layer's inputs are such that their second moment cannot be factorised, in one line that names it.
        """
        found = {grid: Fit() for grid in grids}
        for name, layer, moment in second_moments(vlm, scheme, calibration):
            for grid, fit in found.items():
                METHODS[grid].fit_weight(layer)
                # the weight that replaces this one lies on the grid, so that nothing of it could tell later
                layer.weight_fake_quant.clipping = judge(layer.weight.detach(), layer.weight_fake_quant)
                try:
                    rounded = replace(self, grid=grid).round_columns(layer, moment)  # sets its groups' grids on the way
                except torch.linalg.LinAlgError as error:
                    size = moment.diagonal(dim1=1, dim2=2).mean().item()
                    raise VLMQError(
                        f"GPTQ cannot round '{name}': the second moment of its inputs, {size:.1e} on average, is not positive "
                        f"definite with a damping of {self.damping:g}; inputs that nearly vanish come from weights that do not fit the "
                        "model: check these, or raise the damping"
                    ) from error
                fit.keep(layer, rounded)
        return found

    def round_columns(self, layer: QuantizedLayer, moment: Tensor) -> Tensor:
        """GPTQ on one layer: column c is rounded after adding what the columns before it owe it.

        ``w_hat_c = Q(w_c + sum over j < c of (w_j - w_hat_j) feedback_jc)``. The sums are matrix products over spans that
        are halved and halved again, so that a column's part waits until its span is done.

        Args:
            layer: with its grid set; a group's is set anew here, unless ``act_order`` is on.
            moment: second moment of the inputs, ``[groups, K, K]``; any multiple of the Hessian does.

        Returns:
            The rounded weight, in the shape of ``layer.weight``.
        """
        quantizer = layer.weight_fake_quant
        value = grouped_rows(layer, layer.weight.detach()).transpose(1, 2).clone(memory_format=torch.contiguous_format)
        groups, columns, outputs = value.shape
        order = moment.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True) if self.act_order else None
        if order is not None:
            value = value.gather(1, order[:, :, None].expand_as(value))
            moment = moment.gather(1, order[:, :, None].expand_as(moment))
            moment = moment.gather(2, order[:, None].expand_as(moment))
        change = value.clone()  # [G, K, N], as value: a column lies together
        lower = feedback(moment, self.damping).transpose(1, 2).contiguous()
        has_groups = isinstance(quantizer.granularity, PerGroup)
        size = quantizer.granularity.group_size if has_groups else columns
        scale, zero_point = (
            t.detach().expand(groups * outputs * (columns // size)) if t.numel() == 1 else t.detach().clone()
            for t in (quantizer.scale, quantizer.zero_point)
        )
        scale, zero_point = (t.view(groups, outputs, -1).movedim(-1, 0).contiguous() for t in (scale, zero_point))
        every = torch.arange(groups, device=value.device)
        # which of a row's grids a column is on: one for all rows' groups at a time, unless the order mixes them
        grid_of = (
            (lambda column: column // size) if order is None else (lambda column: (order[:, column] // size, every))
        )

        def round_span(start: int, stop: int) -> None:
            length = stop - start
            if has_groups and order is None and length == size:
                # what the whole group would be with nothing left to round, of which `value` is right for the first column
                kept, sums = change[:, start:stop], value[:, start:stop] - change[:, start:stop]
                triangle = lower[:, start:stop, start:stop]
                now = kept + torch.linalg.solve_triangular(triangle, sums, upper=False, unitriangular=True)
                scale[start // size], zero_point[start // size] = self._group_grid(now, quantizer)
            if length > size or length > SPAN:
                middle = start + (length // size // 2 * size if length > size else length // 2)
                round_span(start, middle)
                value[:, middle:stop].baddbmm_(lower[:, middle:stop, start:middle], change[:, start:middle])
                round_span(middle, stop)
                return
            for column in range(start, stop):
                if column == start or order is not None:
                    step, zero = scale[grid_of(column)], zero_point[grid_of(column)]
                    low, high = quantizer.qmin - zero, quantizer.qmax - zero
                now = value[:, column : column + 1].baddbmm_(
                    lower[:, column : column + 1, start:column], change[:, start:column]
                )
                now.copy_(quantize_dequantize(now[:, 0], step, None, low, high)[:, None])
                change[:, column] -= now[:, 0]

        round_span(0, columns)
        if has_groups and order is None:
            quantizer.set_qparams(scale.movedim(0, -1).flatten(), zero_point.movedim(0, -1).flatten())
        if order is not None:
            value = torch.empty_like(value).scatter_(1, order[:, :, None].expand_as(value), value)
        return value.transpose(1, 2).reshape_as(layer.weight)

    def _group_grid(self, now: Tensor, quantizer: FakeQuantizer) -> tuple[Tensor, Tensor]:
        """Step and zero point, ``[G, N]`` each, of a group's columns ``[G, size, N]``."""
        low, high = now.amin(1), now.amax(1)
        if self.grid == "mse":
            blocks = now.transpose(1, 2)
            low, high = (end.view_as(low) for end in search_blocks(blocks.reshape(-1, blocks.shape[2]), quantizer))
        return choose_qparams(low, high, quantizer.qmin, quantizer.qmax, quantizer.symmetric)


def feedback(moment: Tensor, damping: float) -> Tensor:
    """Shares of each column's rounding error that the columns after it make up for.

    With the damped Hessian ``H = U D U^T``, U unit upper triangular, it is U; computed in float64. Inputs that are
    always zero get the mean diagonal, so that their weights simply round.

    Args:
        moment: ``[groups, K, K]``, symmetric, positive semi-definite.
        damping: added to the diagonal, as a share of its mean.

    Returns:
        ``[groups, K, K]``, unit upper triangular, the dtype of ``moment``.
    """
    hessian = moment.flip(1, 2).double()  # last input first, as a Cholesky factor is lower triangular
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    diagonal += torch.where(diagonal == 0, 1.0, 0.0) * diagonal.mean(1, keepdim=True).clamp_min(1e-30)
    diagonal += damping * diagonal.mean(1, keepdim=True)
    factor = torch.linalg.cholesky(hessian)
    factor /= factor.diagonal(dim1=1, dim2=2).clone()[:, None]
    return factor.to(moment.dtype).flip(1, 2)
