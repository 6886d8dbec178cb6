"""Activation-aware weight scaling (AWQ)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchao.quantization.granularity import PerGroup, PerTensor

from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.calibrating import Batch, calibrate
from lightning_vlmq.quant.fake_quant import FakeQuantizer
from lightning_vlmq.quant.layers import QuantizedLayer, static_layers, weight_quantized_layers
from lightning_vlmq.quant.methods import register, within
from lightning_vlmq.quant.observers import MagnitudeObserver, grouped_rows, output_error, second_moments
from lightning_vlmq.quant.ptq.smoothquant import ChannelScaled, install_channel_scale
from lightning_vlmq.quant.rounding import block_range, to_blocks
from lightning_vlmq.quant.scheme import QuantScheme
from lightning_vlmq.quant.transforms import scale_input_channels

FLOOR = 1e-4
CLIP_STEPS, CLIP_LEAST = 20, 0.5
"""Clip ranges are tried in steps of a twentieth down to half of the full one, as in the authors' code."""


@register("awq")
@dataclass(frozen=True)
class AWQ(ChannelScaled):
    """Scale up the weights that meet large activations before rounding, and the activations down.

    Lin et al. 2024 (arXiv 2306.00978): ``s = s_X^a`` with ``s_X`` each input channel's mean magnitude and ``a`` the
    exponent that minimises ``||Q(W diag(s)) diag(s)^-1 X - W X||`` (Eq. 4 and 5); of layers with one scale, the sum of their
    errors, each as a share of its layer's output. Then the authors' code clips each block of weights where the error of its
    outputs is least. Norms are taken over all calibration inputs at once, through their second moment, instead of over a
    stored sample; ``a = 0`` without clipping is min-max, so no layer gets worse than that on its calibration inputs. The
    authors do not clip queries and keys; here all layers are clipped. torchao's prototype keeps every calibration input and
    covers linear layers alone.

    Attributes:
        grid: exponents tried, evenly spaced over [0, 1); 20 in the authors' code.
        clip: whether weights are clipped after scaling.
    """

    grid: int = within(20, 1)
    clip: bool = True

    def fit_transforms(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Search and install scales and weight ranges of each layer with a quantized weight."""
        layers = weight_quantized_layers(vlm)
        observed = layers | static_layers(vlm)
        if not observed:
            return
        sets = {name: names for names in self.sets(vlm, scheme, observed) for name in names}
        inputs = {names[0]: MagnitudeObserver(observed[names[0]]) for names in sets.values()}
        calibrate(vlm, scheme, calibration, inputs)
        factors: dict[str, Tensor] = {}
        ranges: dict[str, tuple[Tensor, Tensor]] = {}
        for name, layer, moment in second_moments(vlm, scheme, calibration):
            first = sets[name][0]
            if first not in factors:
                members = [layers[member] for member in sets[name] if member in layers]
                factors[first] = search_scale(members, inputs[first].mean_magnitude, moment, self.grid)
            ranges[name] = self._range(layer, factors[first], moment)
        for name, names in sets.items():
            layer, inputs_seen = observed[name], inputs[names[0]]
            if names[0] in factors:
                install_channel_scale(layer, factors[names[0]], inputs_seen)
            else:
                layer.act_fake_quant.set_range(*inputs_seen.scaled_range(1.0))
        for name, ends in ranges.items():
            layers[name].weight_fake_quant.set_range(*ends)

    def fit_weights(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Nothing: the ranges are there already."""

    def _range(self, layer: QuantizedLayer, factor: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
        """The weight range of each block, of the scaled weight."""
        quantizer = layer.weight_fake_quant
        weight = scale_input_channels(layer, layer.weight, factor)
        if not self.clip:
            return block_range(to_blocks(weight, quantizer.granularity), quantizer.granularity)
        # inputs are divided by the factor: so is what a weight's change is measured with, row by row
        columns = scale_input_channels(layer, torch.ones_like(layer.weight), 1 / factor)
        inverse = grouped_rows(layer, columns)[:, 0]
        return search_clip(layer, weight, moment * inverse[:, :, None] * inverse[:, None])


def search_scale(layers: Sequence[QuantizedLayer], magnitude: Tensor, moment: Tensor, grid: int = 20) -> Tensor:
    """The best channel scale of layers that share an input.

    Args:
        layers: their weights and weight quantizers are used; neither is changed.
        magnitude: mean magnitude of each input channel, ``[channels]``.
        moment: second moment of the inputs, see :class:`~lightning_vlmq.quant.observers.SecondMomentObserver`.
        grid: number of exponents tried.

    Returns:
        ``s``, ``[channels]``, scaled so that its smallest and largest entry multiply to 1.
    """
    energies = [output_error(layer, torch.zeros_like(layer.weight), moment).item() for layer in layers]
    best, best_error = torch.ones_like(magnitude), torch.inf
    for step in range(grid):
        factor = magnitude.pow(step / grid).clamp_min(FLOOR)
        factor = factor / (factor.max() * factor.min()).sqrt()
        error = 0.0
        for layer, energy in zip(layers, energies):
            rounded = minmax_rounded(layer, scale_input_channels(layer, layer.weight, factor))
            rounded = scale_input_channels(layer, rounded, 1 / factor)
            error += output_error(layer, rounded, moment).item() / max(energy, 1e-30)
        if error < best_error:
            best, best_error = factor, error
    return best


def search_clip(layer: QuantizedLayer, weight: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """The range of each weight block, a share of its full one, with the least error of the block's outputs.

    Args:
        layer: for its quantizer and shape.
        weight: of the shape of ``layer.weight``.
        moment: second moment of the inputs that this weight is for. Where blocks are parts of an output's weights, each is
            judged by its own inputs alone, as in the authors' code.

    Returns:
        Minimum and maximum, ``[blocks]`` each.
    """
    quantizer = layer.weight_fake_quant
    blocks = to_blocks(weight, quantizer.granularity)
    low, high = block_range(blocks, quantizer.granularity)
    best_error, best_share = torch.full_like(low, torch.inf, dtype=torch.float64), torch.ones_like(low)
    for step in range(int(CLIP_STEPS * (1 - CLIP_LEAST)) + 1):
        share = 1 - step / CLIP_STEPS
        rounded = quantizer.round_within(blocks, low * share, high * share)
        error = _block_errors(layer, quantizer, (rounded - blocks).view_as(weight), moment)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_share = torch.where(better, share, best_share)
    return low * best_share, high * best_share


def _block_errors(layer: QuantizedLayer, quantizer: FakeQuantizer, change: Tensor, moment: Tensor) -> Tensor:
    """Mean squared output error that a weight's change makes through each of its blocks, float64 ``[blocks]``."""
    rows = grouped_rows(layer, change)
    if isinstance(quantizer.granularity, PerGroup):
        size = quantizer.granularity.group_size
        parts = rows.unflatten(2, (-1, size)).transpose(1, 2)  # [groups, blocks of a row, outputs, size]
        count = parts.shape[1]
        own = moment.unflatten(1, (count, size)).unflatten(3, (count, size)).diagonal(dim1=1, dim2=3).movedim(-1, 1)
        return ((parts @ own) * parts).sum(-1, dtype=torch.float64).transpose(1, 2).flatten()
    errors = ((rows @ moment) * rows).sum(-1, dtype=torch.float64).flatten()
    return errors.sum().view(1) if isinstance(quantizer.granularity, PerTensor) else errors


def minmax_rounded(layer: QuantizedLayer, weight: Tensor) -> Tensor:
    """``weight`` on the layer's integer grid with min-max ranges of its own, in its shape."""
    quantizer = layer.weight_fake_quant
    blocks = to_blocks(weight, quantizer.granularity)
    low, high = block_range(blocks, quantizer.granularity)
    return quantizer.round_within(blocks, low, high).view_as(weight)
