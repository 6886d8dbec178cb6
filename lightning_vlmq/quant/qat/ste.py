"""Quantization-aware training through a straight-through estimator, with min-max ranges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.calibrating import Batch
from lightning_vlmq.quant.layers import weight_quantized_layers
from lightning_vlmq.quant.methods import register
from lightning_vlmq.quant.ptq.gptq import GPTQ
from lightning_vlmq.quant.scheme import QuantScheme
from lightning_vlmq.quant.training import QATMethod


@register("ste_contrastive")
@register("ste_feature", distillation="feature")
@dataclass(frozen=True)
class STE(QATMethod):
    """Min-max fake quantization trained through the rounding.

    The gradient passes unchanged inside the range and is zero outside (straight-through estimator, Bengio et al. 2013;
    Jacob et al. 2018, section 3, Eq. 12). Activation ranges stay those of the calibration batches (or dynamic, if the scheme says so).
    torchao's ``QATConfig`` is not used: it covers linear layers and embeddings alone, and takes no per-tensor steps.

    Attributes:
        weights: ``gptq`` starts from weights rounded by GPTQ on min-max grids, which then stay; ``rtn`` from full precision's, which
            round to nearest, on ranges that follow the weights at every forward, as in the paper. With few updates training does not
            find what GPTQ solves for.
    """

    weights: Literal["gptq", "rtn"] = "gptq"

    def fit_weights(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Fix the weight grids, and the weights that training starts from."""
        if self.weights == "gptq":
            GPTQ().fit_weights(vlm, scheme, calibration)
        else:
            super().fit_weights(vlm, scheme, calibration)

    def init_training(self, vlm: VLM) -> None:
        """Let weight ranges follow weights that round to nearest; where GPTQ put them, a range taken anew would round them elsewhere."""
        for layer in weight_quantized_layers(vlm).values():
            layer.weight_fake_quant.dynamic = self.weights == "rtn"
