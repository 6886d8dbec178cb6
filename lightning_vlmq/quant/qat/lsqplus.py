"""LSQ+: learned step and learned offset for activations."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.calibrating import Batch
from lightning_vlmq.quant.fake_quant import to_blocks
from lightning_vlmq.quant.layers import weight_quantized_layers
from lightning_vlmq.quant.methods import METHODS, QATMethod
from lightning_vlmq.quant.observers import observe_histograms
from lightning_vlmq.quant.ptq.mse import search_histogram
from lightning_vlmq.quant.qat.lsq import CLIP_KD_FEATURE_WEIGHT, layers_with_learned_input
from lightning_vlmq.quant.scheme import QuantScheme


@METHODS.register("lsqplus_contrastive")
class LSQPlusContrastive(QATMethod):
    """LSQ+ (Bhalgat et al. 2020, arXiv 2004.09576) with contrastive distillation.

    Activations: ``x_hat = round(clamp((x - beta) / s, n, p)) s + beta`` with ``s`` and ``beta`` learned (section 3.1), both
    started where the squared error over the calibration batches is least (section 3.2). Weights: symmetric, LSQ's
    gradient, ``s`` started at ``max(|mu - 3 sigma|, |mu + 3 sigma|) / 2^(b-1)`` of each block (section 3.2); an
    asymmetric weight grid spans ``mu - 3 sigma .. mu + 3 sigma`` instead. torchao's range learning is not used: it
    has no gradient scale and no per-tensor steps.

    Raises (from :meth:`prepare`):
        VLMQError: for dynamic activation ranges, which leave no step or offset to learn.
    """

    def init_training(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Set and release steps and offsets."""
        inputs = layers_with_learned_input(vlm)
        for layer in weight_quantized_layers(vlm).values():
            quantizer = layer.weight_fake_quant
            blocks = to_blocks(layer.weight.detach(), quantizer.granularity).reshape(quantizer.scale.numel(), -1)
            mean, deviation = blocks.mean(1), blocks.std(1, unbiased=False)
            low, high = mean - 3 * deviation, mean + 3 * deviation
            if quantizer.symmetric:
                quantizer.set_qparams(low.abs().maximum(high.abs()) / -quantizer.qmin)
            else:
                quantizer.set_range(low, high)
            quantizer.scale.requires_grad_(True)
        if inputs:
            for name, histogram in observe_histograms(vlm, scheme, calibration).items():
                quantizer = inputs[name].act_fake_quant
                quantizer.set_range(*search_histogram(histogram, quantizer))
                quantizer.set_offset(-quantizer.zero_point * quantizer.scale)
                quantizer.scale.requires_grad_(True)
                assert quantizer.offset is not None
                quantizer.offset.requires_grad_(True)


@METHODS.register("lsqplus_feature")
class LSQPlusFeature(LSQPlusContrastive):
    """LSQ+ with contrastive distillation and the feature loss of CLIP-KD."""

    feature_weight = CLIP_KD_FEATURE_WEIGHT
