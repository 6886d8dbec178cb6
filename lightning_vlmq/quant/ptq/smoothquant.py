"""Move activation outliers into the weights (SmoothQuant)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.calibrating import Batch, calibrate, shared_inputs
from lightning_vlmq.quant.layers import QuantizedLayer, act_quantized_layers
from lightning_vlmq.quant.methods import PTQMethod, register, within
from lightning_vlmq.quant.observers import ChannelObserver
from lightning_vlmq.quant.scheme import QuantScheme
from lightning_vlmq.quant.transforms import ChannelScale, scale_input_channels

FLOOR = 1e-5
"""Smallest magnitude of a channel, as in the authors' code: a channel that is zero throughout must not give a zero factor."""


@dataclass(frozen=True)
class ChannelScaled(PTQMethod):
    """What methods with a scale per input channel share: static activation ranges need no calibration pass of their own.

    A division by positive factors keeps the order of each channel's values, so the range of the scaled input follows
    from the ranges of the channels before; :func:`install_channel_scale` sets it with the scale.

    Attributes:
        joint: layers that share their input (query, key and value) share one scale, which can then stand in the LayerNorm
            before them, as the papers have it; else each has its own.
    """

    joint: bool = True

    def fit_activations(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Nothing: the ranges are there already."""

    def sets(self, vlm: VLM, scheme: QuantScheme, among: Mapping[str, QuantizedLayer]) -> list[list[str]]:
        """The layers of ``among`` by name, those that are to have one scale together."""
        if not self.joint:
            return [[name] for name in among]
        shared = shared_inputs(vlm, scheme).values()
        return [kept for names in shared if (kept := [name for name in names if name in among])]


@register("smoothquant")
@dataclass(frozen=True)
class SmoothQuant(ChannelScaled):
    """Divide input channel j by ``s_j = max|X_j|^a / max|W_j|^(1-a)`` and multiply the weight's by it, then min-max.

    Xiao et al. 2023 (arXiv 2211.10438), Eq. 3 and 4; of layers with one scale the largest weight of all counts, as in the
    authors' code. The factor stands at each layer's input, not in the LayerNorm before it, so that layers without one
    (attention output, second MLP layer, convolutions) are smoothed too. torchao's prototype covers linear layers alone and
    by default keeps every calibration input.

    Attributes:
        alpha: the migration strength; 0.5 in section 4 of the paper, more where activation outliers are large.
    """

    alpha: float = within(0.5, 0, 1)

    def fit_transforms(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Smooth every layer with a quantized input; for one without, weights would only get harder to quantize."""
        layers = act_quantized_layers(vlm)
        if not layers:
            return
        sets = self.sets(vlm, scheme, layers)
        inputs = {names[0]: ChannelObserver(layers[names[0]]) for names in sets}
        calibrate(vlm, scheme, calibration, inputs)
        for names in sets:
            observer, members = inputs[names[0]], [layers[name] for name in names]
            factor = smoothing_factor(members, observer.absolute_maximum, self.alpha)
            for layer in members:
                install_channel_scale(layer, factor, observer)


def smoothing_factor(layers: Sequence[QuantizedLayer], largest: Tensor, alpha: float) -> Tensor:
    """``s`` of Eq. 4, ``[channels]``, for layers that share an input.

    Args:
        layers: at least one.
        largest: the largest magnitude of each input channel, ``[channels]``.
        alpha: the migration strength, 0 to 1.
    """
    weight = torch.stack([weight_channel_maximum(layer) for layer in layers]).amax(0).clamp_min(FLOOR)
    return (largest.clamp_min(FLOOR) ** alpha / weight ** (1 - alpha)).clamp_min(FLOOR)


def weight_channel_maximum(layer: QuantizedLayer) -> Tensor:
    """Largest weight magnitude that meets each input channel, ``[channels]``."""
    weight = layer.weight.detach().abs()
    if not isinstance(layer, nn.Conv2d):
        return weight.amax(0)
    per_group = weight.amax((2, 3)).view(layer.groups, layer.out_channels // layer.groups, -1)
    return per_group.amax(1).flatten()


def install_channel_scale(layer: QuantizedLayer, factor: Tensor, inputs: ChannelObserver | None = None) -> None:
    """Divide a layer's input channels by a factor and multiply the weight's by it.

    Args:
        layer: changed in place.
        factor: ``[channels]``, positive.
        inputs: what was seen of its input before; given, a static activation grid is made of it.
    """
    layer.set_weight(scale_input_channels(layer, layer.weight, factor))
    layer.input_transform = ChannelScale(factor.view(-1, 1, 1) if isinstance(layer, nn.Conv2d) else factor)
    if inputs is not None and layer.act_fake_quant.is_static:
        layer.act_fake_quant.set_range(*inputs.scaled_range(factor))
