"""Half-quadratic weight quantization (HQQ): a real-valued zero point fitted without data."""

from __future__ import annotations

import torch
from torchao.quantization.granularity import PerTensor
from torchao.quantization.quant_primitives import optimize_weights_proximal_legacy

from lightning_vlmq.quant.fake_quant import STEP_FLOOR, block_range, to_blocks
from lightning_vlmq.quant.layers import QuantizedLayer
from lightning_vlmq.quant.methods import METHODS, PTQMethod


@METHODS.register("hqq")
class HQQ(PTQMethod):
    """Fit each block's zero point under a heavy-tailed error, ``||W - W_hat||_p^p`` with p = 0.7.

    Badri and Shaji 2023 ("Half-Quadratic Quantization of Large Machine Learning Models"): alternate a generalised
    shrinkage of the error with the mean that solves for the zero point, the step staying that of the min-max range.
    torchao's proximal solver does it, on blocks of any layer. The grid is asymmetric with a real zero whatever the
    scheme's ``weight_symmetric`` says, as the method has no symmetric form. Activations are min-max.
    """

    def fit_weight(self, layer: QuantizedLayer) -> None:
        """Fix one layer's step and offset."""
        quantizer = layer.weight_fake_quant
        blocks = to_blocks(layer.weight.detach(), quantizer.granularity)
        low, high = block_range(blocks, quantizer.granularity)
        scale = ((high - low) / (quantizer.qmax - quantizer.qmin)).clamp_min(STEP_FLOOR)
        zero = quantizer.qmin - low / scale
        rows = blocks.reshape(1, -1) if isinstance(quantizer.granularity, PerTensor) else blocks
        _, _, zero = optimize_weights_proximal_legacy(
            rows,
            1 / scale[:, None],  # the solver multiplies by it
            zero[:, None],
            [quantizer.qmin, quantizer.qmax],
            axis=1,
            dtype=torch.float32,
        )
        quantizer.set_qparams(scale)
        quantizer.set_offset(-zero.clone().flatten() * scale)
