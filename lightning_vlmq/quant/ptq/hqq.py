"""Half-quadratic weight quantization (HQQ): a real-valued zero point fitted without data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_vlmq.quant.layers import QuantizedLayer
from lightning_vlmq.quant.methods import PTQMethod, register, within
from lightning_vlmq.quant.rounding import STEP_FLOOR, block_range, choose_qparams, to_blocks


@register("hqq")
@dataclass(frozen=True)
class HQQ(PTQMethod):
    """Fit each block's zero point under a heavy-tailed error, ``||W - W_hat||_p^p`` with p below 1.

    Badri and Shaji 2023 ("Half-Quadratic Quantization of Large Machine Learning Models", whose equations have no
    numbers): alternate its two sub-problems, a generalised shrinkage of the error and the mean that solves for the zero
    point, the step staying that of the min-max range.
    The grid is asymmetric with a real zero whatever the scheme's ``weight_symmetric`` says, as the method has no
    symmetric form. Activations are min-max. torchao's solver is not used: it returns the last zero point, which is not
    the best, and stops when the mean error over all blocks rises; here each block keeps the best of its own, so that
    none is worse than round-to-nearest. Weights are taken in units of their step, so that the shrinkage is as strong
    in a layer of small weights as in one of large ones.

    Attributes:
        p: of the error's norm; like those below, the authors' setting by default.
        iterations: rounds of the two sub-problems.
        penalty: weight of the half-quadratic coupling, beta.
        growth: factor by which the penalty grows each iteration.
    """

    p: float = within(0.7, 0.1, 1)
    iterations: int = within(20, 0)
    penalty: float = within(10.0, 1e-3)
    growth: float = within(1.01, 1)

    def fit_weight(self, layer: QuantizedLayer) -> None:
        """Fix one layer's step and offset."""
        quantizer = layer.weight_fake_quant
        levels = quantizer.qmax - quantizer.qmin
        blocks = to_blocks(layer.weight.detach(), quantizer.granularity)
        low, high = block_range(blocks, quantizer.granularity)
        rows = blocks.reshape(len(low), -1)
        # two starts: the range of the weights, and round-to-nearest's, which has zero on the grid
        own = ((high - low) / levels).clamp_min(STEP_FLOOR)
        rounded, zero_point = choose_qparams(low, high, 0, levels, symmetric=False)
        found = [self.fit_zero(rows, own, -low / own, levels), self.fit_zero(rows, rounded, zero_point, levels)]
        better = found[0][1] <= found[1][1]
        scale = torch.where(better, own, rounded)
        quantizer.set_qparams(scale)
        # the quantizer counts levels from qmin
        quantizer.set_offset(-(torch.where(better, found[0][0], found[1][0]) + quantizer.qmin) * scale)

    def fit_zero(self, rows: Tensor, scale: Tensor, zero: Tensor, levels: int) -> tuple[Tensor, Tensor]:
        """Improve each block's zero point with its step fixed.

        Args:
            rows: weights, ``[blocks, values]``.
            scale: steps, ``[blocks]``.
            zero: real-valued levels of zero to start from, ``[blocks]``, on the grid ``0 .. levels``.
            levels: the largest level.

        Returns:
            The zero point with the least error among the start and ``iterations`` updates, and that error
            ``||rows - rounded||_p^p``, both ``[blocks]``.
        """
        units = rows / scale[:, None]
        zero = zero[:, None]
        best, least = zero, torch.full_like(zero, torch.inf)
        penalty = self.penalty
        for _ in range(self.iterations + 1):
            level = (units + zero).round().clamp(0, levels)
            difference = units - (level - zero)
            error = difference.abs().pow(self.p).sum(1, keepdim=True)
            best, least = torch.where(error < least, zero, best), torch.minimum(error, least)
            shrunk = difference.sign() * (difference.abs() - difference.abs().pow(self.p - 1) / penalty).relu()
            zero = (level - (units - shrunk)).mean(1, keepdim=True)
            penalty *= self.growth
        return best[:, 0], least[:, 0] * scale**self.p
