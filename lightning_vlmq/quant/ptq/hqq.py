"""Half-quadratic weight quantization (HQQ): a real-valued zero point fitted without data."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_vlmq.quant.fake_quant import STEP_FLOOR, block_range, choose_qparams, to_blocks
from lightning_vlmq.quant.layers import QuantizedLayer
from lightning_vlmq.quant.methods import METHODS, PTQMethod

NORM = 0.7
"""p of the error's norm; with the two below, the authors' setting."""
PENALTY, GROWTH = 10.0, 1.01
"""Weight of the half-quadratic coupling, beta, and the factor it grows by each iteration."""
ITERATIONS = 20


@METHODS.register("hqq")
class HQQ(PTQMethod):
    """Fit each block's zero point under a heavy-tailed error, ``||W - W_hat||_p^p`` with p = 0.7.

    Badri and Shaji 2023 ("Half-Quadratic Quantization of Large Machine Learning Models", whose equations have no
    numbers): alternate its two sub-problems, a generalised shrinkage of the error and the mean that solves for the zero
    point, the step staying that of the min-max range.
    The grid is asymmetric with a real zero whatever the scheme's ``weight_symmetric`` says, as the method has no
    symmetric form. Activations are min-max. torchao's solver is not used: it returns the last zero point, which is not
    the best, and stops when the mean error over all blocks rises; here each block keeps the best of its own, so that
    none is worse than round-to-nearest. Weights are taken in units of their step, so that the shrinkage is as strong
    in a layer of small weights as in one of large ones.
    """

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
        found = [fit_zero(rows, own, -low / own, levels), fit_zero(rows, rounded, zero_point, levels)]
        better = found[0][1] <= found[1][1]
        scale = torch.where(better, own, rounded)
        quantizer.set_qparams(scale)
        # the quantizer counts levels from qmin
        quantizer.set_offset(-(torch.where(better, found[0][0], found[1][0]) + quantizer.qmin) * scale)


def fit_zero(rows: Tensor, scale: Tensor, zero: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Improve each block's zero point with its step fixed.

    Args:
        rows: weights, ``[blocks, values]``.
        scale: steps, ``[blocks]``.
        zero: real-valued levels of zero to start from, ``[blocks]``, on the grid ``0 .. levels``.
        levels: the largest level.

    Returns:
        The zero point with the least error among the start and :data:`ITERATIONS` updates, and that error
        ``||rows - rounded||_p^p``, both ``[blocks]``.
    """
    units = rows / scale[:, None]
    zero = zero[:, None]
    best, least = zero, torch.full_like(zero, torch.inf)
    penalty = PENALTY
    for _ in range(ITERATIONS + 1):
        level = (units + zero).round().clamp(0, levels)
        difference = units - (level - zero)
        error = difference.abs().pow(NORM).sum(1, keepdim=True)
        best, least = torch.where(error < least, zero, best), torch.minimum(error, least)
        shrunk = difference.sign() * (difference.abs() - difference.abs().pow(NORM - 1) / penalty).relu()
        zero = (level - (units - shrunk)).mean(1, keepdim=True)
        penalty *= GROWTH
    return best[:, 0], least[:, 0] * scale**NORM
