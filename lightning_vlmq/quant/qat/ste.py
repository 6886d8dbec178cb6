"""Quantization-aware training through a straight-through estimator, with min-max ranges."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.layers import weight_quantized_layers
from lightning_vlmq.quant.methods import register
from lightning_vlmq.quant.training import QATMethod


@register("ste_contrastive")
@register("ste_feature", distillation="feature")
@dataclass(frozen=True)
class STE(QATMethod):
    """Min-max fake quantization trained through the rounding.

    The gradient passes unchanged inside the range and is zero outside (straight-through estimator, Bengio et al. 2013;
    Jacob et al. 2018, section 3, Eq. 12). Weight ranges follow the weights at every forward; activation ranges stay
    those of the calibration batches (or dynamic, if the scheme says so). torchao's ``QATConfig`` is not used: it covers
    linear layers and embeddings alone, and takes no per-tensor steps.
    """

    def init_training(self, vlm: VLM) -> None:
        """Let weight ranges follow the weights."""
        for layer in weight_quantized_layers(vlm).values():
            layer.weight_fake_quant.dynamic = True
