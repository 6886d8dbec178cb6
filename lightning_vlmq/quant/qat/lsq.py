"""Learned step size quantization (LSQ): steps trained together with the weights, by distillation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.calibrating import Batch, calibrate
from lightning_vlmq.quant.fake_quant import FakeQuantizer, to_blocks
from lightning_vlmq.quant.layers import QuantizedLayer, act_quantized_layers, weight_quantized_layers
from lightning_vlmq.quant.methods import METHODS, QATMethod
from lightning_vlmq.quant.observers import MagnitudeObserver
from lightning_vlmq.quant.scheme import QuantScheme

CLIP_KD_FEATURE_WEIGHT = 2000.0
"""CLIP-KD's weight of the feature loss, a mean over features of unit-norm vectors (Yang et al. 2024, the authors' scripts)."""


@METHODS.register("lsq_contrastive")
class LSQContrastive(QATMethod):
    """LSQ (Esser et al. 2020, arXiv 1902.08153) with contrastive distillation.

    Steps start at ``2 <|v|> / sqrt(Qp)`` (section 2.1): a weight's from each of its blocks, an activation's from the
    calibration batches. Gradients are Eq. 3 and 5 with the gradient scale of section 2.2. An asymmetric grid keeps a
    fixed integer zero point, chosen with the initial step so that the calibration minimum is its lowest level. torchao's
    range learning is not used for want of the gradient scale; see :mod:`~lightning_vlmq.quant.fake_quant`.

    Raises (from :meth:`prepare`):
        VLMQError: for dynamic activation ranges, which leave no activation step to learn.
    """

    def init_training(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Set and release the steps."""
        inputs = layers_with_learned_input(vlm)
        for layer in weight_quantized_layers(vlm).values():
            quantizer = layer.weight_fake_quant
            blocks = to_blocks(layer.weight.detach(), quantizer.granularity).reshape(quantizer.scale.numel(), -1)
            start(quantizer, blocks.abs().mean(1), blocks.amin(1))
        if inputs:
            observers = {name: MagnitudeObserver(layer) for name, layer in inputs.items()}
            calibrate(vlm, scheme, calibration, observers)
            for name, observer in observers.items():
                start(
                    inputs[name].act_fake_quant, observer.mean_magnitude.mean().view(1), observer.minimum.amin().view(1)
                )


@METHODS.register("lsq_feature")
class LSQFeature(LSQContrastive):
    """LSQ with contrastive distillation and the feature loss of CLIP-KD."""

    feature_weight = CLIP_KD_FEATURE_WEIGHT


def layers_with_learned_input(vlm: VLM) -> dict[str, QuantizedLayer]:
    """The layers whose input step a method is about to learn; raises :class:`VLMQError` where one has a dynamic range."""
    layers = act_quantized_layers(vlm)
    for name, layer in layers.items():
        if layer.act_fake_quant.dynamic:
            raise VLMQError(
                f"activation steps are to be learned, but layer '{name}' has none with act_dynamic; set that to false"
            )
    return layers


def start(quantizer: FakeQuantizer, magnitude: torch.Tensor, minimum: torch.Tensor) -> None:
    """Set a quantizer's initial LSQ step, ``2 <|v|> / sqrt(Qp)``, and make it learnable.

    Args:
        quantizer: of a weight or an activation.
        magnitude: mean absolute value of each block, ``[blocks]``.
        minimum: smallest value of each block, ``[blocks]``; it fixes an asymmetric grid's zero point.
    """
    scale = (2 * magnitude / math.sqrt(quantizer.qmax)).to(quantizer.scale)
    zero_point = None
    if not quantizer.symmetric:
        safe = scale.clamp_min(torch.finfo(scale.dtype).tiny)
        zero_point = (-minimum.to(scale).clamp_max(0) / safe).round().clamp(quantizer.qmin, quantizer.qmax)
    quantizer.set_qparams(scale, zero_point)
    quantizer.scale.requires_grad_(True)
