"""Rotate inputs and weights so that outliers spread over all channels (QuaRot)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.calibration import Batch
from lightning_vlmq.quant.layers import quantized_layers
from lightning_vlmq.quant.methods import METHODS, PTQMethod
from lightning_vlmq.quant.scheme import QuantScheme
from lightning_vlmq.quant.transforms import Rotation, randomized_hadamard

SEED = 0


@METHODS.register("quarot")
class QuaRot(PTQMethod):
    """Rotate every layer's input by a randomized Hadamard matrix and fold the inverse into its weight, then min-max.

    Ashkboos et al. 2024 (arXiv 2404.00456), with round-to-nearest weights. See :func:`rotate_layers` for where the
    rotations stand here.
    """

    def fit_transforms(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Rotate every layer that mixes its input channels."""
        rotate_layers(vlm)


def rotate_layers(vlm: VLM) -> None:
    """Give every quantized linear layer and ungrouped convolution a rotation of its own: ``W x = (W R^T)(R x)``.

    QuaRot folds the rotation of a language model's residual stream into the weights before it and keeps only those of
    the attention and MLP inner inputs at run time. That takes RMSNorm; the towers here have LayerNorm with means and
    biases, and ConvNeXt's depth-wise convolutions act on the residual channels one by one, which no rotation commutes
    with. So every rotation is applied to the layer's input at run time, which quantizes the same rotated inputs and
    weights. Grouped and depth-wise convolutions, whose channels do not meet, are left as they are.
    """
    generator = torch.Generator().manual_seed(SEED)
    for layer in quantized_layers(vlm).values():
        is_conv = isinstance(layer, nn.Conv2d)
        if is_conv and layer.groups > 1:  # type: ignore[operator]
            continue
        signs, left, right = randomized_hadamard(layer.weight.shape[1], generator)
        rotation = Rotation(signs.view(-1, 1, 1) if is_conv else signs, left, right).to(layer.weight.device)
        layer.set_weight(rotation(layer.weight.detach().double()).to(layer.weight.dtype))
        layer.input_transform = rotation.to(layer.weight.dtype)
