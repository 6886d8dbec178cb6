"""Move activation outliers into the weights (SmoothQuant)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.calibrating import Batch, calibrate
from lightning_vlmq.quant.layers import QuantizedLayer, act_quantized_layers, static_layers
from lightning_vlmq.quant.methods import METHODS, PTQMethod
from lightning_vlmq.quant.observers import ChannelObserver
from lightning_vlmq.quant.scheme import QuantScheme
from lightning_vlmq.quant.transforms import ChannelScale, scale_input_channels

ALPHA = 0.5
FLOOR = 1e-5
"""Smallest magnitude of a channel, as in the authors' code: a channel that is zero throughout must not give a zero factor."""


class ChannelScaled(PTQMethod):
    """What methods with a scale per input channel share: static activation ranges need no calibration pass of their own.

    A division by positive factors keeps the order of each channel's values, so the range of the scaled input follows
    from the ranges of the channels before.
    """

    def __init__(self) -> None:
        self.inputs: Mapping[str, ChannelObserver] = {}

    def fit_activations(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Fix the static activation grids; the extreme values of the scaled inputs."""
        for name, layer in static_layers(vlm).items():
            scale = layer.input_transform
            factor = scale.factor.flatten() if isinstance(scale, ChannelScale) else 1.0
            layer.act_fake_quant.set_range(*self.inputs[name].scaled_range(factor))


@METHODS.register("smoothquant")
class SmoothQuant(ChannelScaled):
    """Divide input channel j by ``s_j = max|X_j|^a / max|W_j|^(1-a)`` and multiply the weight's by it, then min-max.

    Xiao et al. 2023 (arXiv 2211.10438), Eq. 3 and 4, with the migration strength ``a = 0.5`` of section 4. The factor
    stands at each layer's input, not in the LayerNorm before it, so that layers without one (attention output, second
    MLP layer, convolutions) are smoothed too. torchao's prototype covers linear layers alone and by default keeps
    every calibration input.
    """

    def fit_transforms(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Smooth every layer with a quantized input; for one without, weights would only get harder to quantize."""
        layers = act_quantized_layers(vlm)
        if not layers:
            return
        self.inputs = {name: ChannelObserver(layer) for name, layer in layers.items()}
        calibrate(vlm, scheme, calibration, self.inputs)
        for name, layer in layers.items():
            install_channel_scale(layer, smoothing_factor(layer, self.inputs[name].absolute_maximum))


def smoothing_factor(layer: QuantizedLayer, largest: Tensor) -> Tensor:
    """``s`` of Eq. 4, ``[channels]``, from the largest magnitude of each input channel, ``[channels]``."""
    weight = weight_channel_maximum(layer).clamp_min(FLOOR)
    return (largest.clamp_min(FLOOR) ** ALPHA / weight ** (1 - ALPHA)).clamp_min(FLOOR)


def weight_channel_maximum(layer: QuantizedLayer) -> Tensor:
    """Largest weight magnitude that meets each input channel, ``[channels]``."""
    weight = layer.weight.detach().abs()
    if not isinstance(layer, nn.Conv2d):
        return weight.amax(0)
    per_group = weight.amax((2, 3)).view(layer.groups, layer.out_channels // layer.groups, -1)
    return per_group.amax(1).flatten()


def install_channel_scale(layer: QuantizedLayer, factor: Tensor) -> None:
    """Divide a layer's input channels by ``factor`` (``[channels]``, positive) and multiply its weight's by it."""
    layer.set_weight(scale_input_channels(layer, layer.weight, factor))
    layer.input_transform = ChannelScale(factor.view(-1, 1, 1) if isinstance(layer, nn.Conv2d) else factor)
