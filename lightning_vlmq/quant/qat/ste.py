"""Quantization-aware training through a straight-through estimator, with min-max ranges."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.calibrating import Batch
from lightning_vlmq.quant.layers import weight_quantized_layers
from lightning_vlmq.quant.methods import METHODS, QATMethod
from lightning_vlmq.quant.qat.lsq import CLIP_KD_FEATURE_WEIGHT
from lightning_vlmq.quant.scheme import QuantScheme


@METHODS.register("ste_contrastive")
class STEContrastive(QATMethod):
    """Min-max fake quantization trained through the rounding with contrastive distillation.

    The gradient passes unchanged inside the range and is zero outside (straight-through estimator, Bengio et al. 2013;
    Jacob et al. 2018, section 3, Eq. 12). Weight ranges follow the weights at every forward; activation ranges stay
    those of the calibration batches (or dynamic, if the scheme says so). torchao's ``QATConfig`` is not used: it covers
    linear layers and embeddings alone, and takes no per-tensor steps.
    """

    def init_training(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Let weight ranges follow the weights."""
        for layer in weight_quantized_layers(vlm).values():
            layer.weight_fake_quant.dynamic = True


@METHODS.register("ste_feature")
class STEFeature(STEContrastive):
    """Min-max fake quantization trained with contrastive distillation and the feature loss of CLIP-KD."""

    feature_weight = CLIP_KD_FEATURE_WEIGHT
