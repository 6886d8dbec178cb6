"""LSQ+: learned step and learned offset for activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.calibrating import Batch
from lightning_vlmq.quant.layers import QuantizedLayer, static_layers
from lightning_vlmq.quant.methods import METHODS, register
from lightning_vlmq.quant.qat.lsq import LearnedSteps
from lightning_vlmq.quant.rounding import to_blocks
from lightning_vlmq.quant.scheme import QuantScheme


@register("lsqplus_contrastive")
@register("lsqplus_feature", distillation="feature")
@dataclass(frozen=True)
class LSQPlus(LearnedSteps):
    """LSQ+ (Bhalgat et al. 2020, arXiv 2004.09576): steps and activation offsets learned with the weights.

    Activations: ``x_hat = round(clamp((x - beta) / s, n, p)) s + beta`` with ``s`` and ``beta`` learned (section 3.1). Weights:
    LSQ's gradient. The paper starts activations where the squared error over the calibration batches is least, and a
    weight's step at ``max(|mu - 3 sigma|, |mu + 3 sigma|) / 2^(b-1)`` of each block (section 3.2), an asymmetric weight grid
    spanning ``mu - 3 sigma .. mu + 3 sigma``; by default both start from the least squared error or from min-max. torchao's range
    learning is not used: it has no gradient scale and no per-tensor steps.

    Raises (from :meth:`prepare`):
        VLMQError: for dynamic activation ranges, which leave no step or offset to learn.
    """

    def paper_activations(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Start where the squared error is least."""
        METHODS["mse"].fit_activations(vlm, scheme, calibration)

    def paper_weight(self, layer: QuantizedLayer) -> None:
        """Span three standard deviations."""
        quantizer = layer.weight_fake_quant
        blocks = to_blocks(layer.weight.detach(), quantizer.granularity).reshape(quantizer.scale.numel(), -1)
        mean, deviation = blocks.mean(1), blocks.std(1, unbiased=False)
        low, high = mean - 3 * deviation, mean + 3 * deviation
        if quantizer.symmetric:
            quantizer.set_qparams(low.abs().maximum(high.abs()) / -quantizer.qmin)
        else:
            quantizer.set_range(low, high)

    def init_training(self, vlm: VLM) -> None:
        """Release the steps, and offsets in place of the activations' zero points."""
        super().init_training(vlm)
        for layer in static_layers(vlm).values():
            quantizer = layer.act_fake_quant
            quantizer.set_offset(-quantizer.zero_point * quantizer.scale)
            assert quantizer.offset is not None
            quantizer.offset.requires_grad_(True)
