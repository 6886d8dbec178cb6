"""Activation-aware weight scaling (AWQ)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.calibrating import Batch, calibrate
from lightning_vlmq.quant.fake_quant import block_range, to_blocks
from lightning_vlmq.quant.layers import QuantizedLayer, static_layers, weight_quantized_layers
from lightning_vlmq.quant.methods import METHODS
from lightning_vlmq.quant.observers import MagnitudeObserver, output_error, second_moments
from lightning_vlmq.quant.ptq.smoothquant import ChannelScaled, install_channel_scale
from lightning_vlmq.quant.scheme import QuantScheme
from lightning_vlmq.quant.transforms import scale_input_channels

GRID = 20
"""Exponents tried, evenly spaced over [0, 1), as in the authors' code."""
FLOOR = 1e-4


@METHODS.register("awq")
class AWQ(ChannelScaled):
    """Scale up the weights that meet large activations before rounding, and the activations down.

    Lin et al. 2024 (arXiv 2306.00978): ``s = s_X^a`` with ``s_X`` each input channel's mean magnitude and ``a`` the
    exponent that minimises ``||Q(W diag(s)) diag(s)^-1 X - W X||`` (Eq. 4 and 5). The norm is taken over all
    calibration inputs at once, through their second moment, instead of over a stored sample; ``a = 0`` is min-max, so
    no layer gets worse than that on its calibration inputs. The authors' additional clipping search is left out, as
    Eq. 4 and 5 do. torchao's prototype keeps every calibration input and covers linear layers alone.
    """

    def fit_transforms(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Search and install the scales of each layer with a quantized weight."""
        observed = weight_quantized_layers(vlm) | static_layers(vlm)
        if not observed:
            return
        inputs = {name: MagnitudeObserver(layer) for name, layer in observed.items()}
        calibrate(vlm, scheme, calibration, inputs)
        factors = {
            name: search_scale(layer, inputs[name].mean_magnitude, moment)
            for name, layer, moment in second_moments(vlm, scheme, calibration)
        }
        for name, factor in factors.items():
            install_channel_scale(observed[name], factor)
        self.inputs = inputs


def search_scale(layer: QuantizedLayer, magnitude: Tensor, moment: Tensor) -> Tensor:
    """The best channel scale of one layer.

    Args:
        layer: its weight and weight quantizer are used; neither is changed.
        magnitude: mean magnitude of each input channel, ``[channels]``.
        moment: second moment of its inputs, see :class:`SecondMomentObserver`.

    Returns:
        ``s``, ``[channels]``, scaled so that its smallest and largest entry multiply to 1.
    """
    best, best_error = torch.ones_like(magnitude), torch.inf
    for step in range(GRID):
        factor = magnitude.pow(step / GRID).clamp_min(FLOOR)
        factor = factor / (factor.max() * factor.min()).sqrt()
        rounded = minmax_rounded(layer, scale_input_channels(layer, layer.weight, factor))
        rounded = scale_input_channels(layer, rounded, 1 / factor)
        error = output_error(layer, rounded, moment).item()
        if error < best_error:
            best, best_error = factor, error
    return best


def minmax_rounded(layer: QuantizedLayer, weight: Tensor) -> Tensor:
    """``weight`` on the layer's integer grid with min-max ranges of its own, in its shape."""
    quantizer = layer.weight_fake_quant
    blocks = to_blocks(weight, quantizer.granularity)
    low, high = block_range(blocks, quantizer.granularity)
    return quantizer.round_within(blocks, low, high).view_as(weight)
