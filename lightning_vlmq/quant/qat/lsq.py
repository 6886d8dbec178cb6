"""Learned step size quantization (LSQ): steps trained together with the weights, by distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.calibrating import Batch, calibrate
from lightning_vlmq.quant.clipping import note_clipping
from lightning_vlmq.quant.fake_quant import FakeQuantizer
from lightning_vlmq.quant.fits import Fit
from lightning_vlmq.quant.layers import (
    QuantizedLayer,
    act_quantized_layers,
    static_layers,
    weight_quantized_layers,
)
from lightning_vlmq.quant.methods import METHODS, register
from lightning_vlmq.quant.observers import MagnitudeObserver
from lightning_vlmq.quant.ptq.gptq import GPTQ
from lightning_vlmq.quant.rounding import to_blocks
from lightning_vlmq.quant.scheme import QuantScheme
from lightning_vlmq.quant.starting import keep_best
from lightning_vlmq.quant.training import QATMethod


@dataclass(frozen=True)
class LearnedSteps(QATMethod):
    """What methods with learned steps share: where the steps start from, and that all of them learn.

    Attributes:
        start: the ranges that the grids start from: ``mse`` or ``minmax``, those of the methods of that name; ``best``, min-max for
            inputs and for weights unless the other has a tenth less distillation loss on the calibration pairs; or ``paper``,
            what the method's paper says.
        weights: ``gptq`` starts from weights rounded by GPTQ on these grids, ``rtn`` from full precision's, which round to nearest.
            With few updates training does not find what GPTQ solves for; ``paper`` starts with ``rtn`` alone.
        gradient_scale: ``paper`` multiplies the gradient of a step by ``1 / sqrt(N Qp)`` (LSQ, section 2.2), ``none`` leaves it.
            Adam divides it out again, so that it is in force under plain gradient descent alone; the rates of
            :meth:`~lightning_vlmq.quant.QATMethod.parameter_groups` do what it is for.
    """

    start: Literal["best", "mse", "minmax", "paper"] = "best"
    weights: Literal["gptq", "rtn"] = "gptq"
    gradient_scale: Literal["paper", "none"] = "paper"

    def fit_weights(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Fix the weight grids, and the weights that training starts from."""
        if self.start == "best":
            mse = METHODS["mse"]

            def refit() -> None:
                mse.fit_activations(vlm, scheme, calibration)
                note_clipping(vlm, scheme, calibration)

            inputs = {"minmax": lambda: None} | ({"mse": refit} if static_layers(vlm) else {})
            weights = partial(self._weight_fits, vlm, scheme, calibration)
            keep_best(vlm, scheme, calibration, self.loss, inputs, weights)
        elif self.weights == "gptq" and self.start != "paper":
            GPTQ(grid=self.start).fit_weights(vlm, scheme, calibration)
        else:
            super().fit_weights(vlm, scheme, calibration)

    def _weight_fits(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> Mapping[str, Fit]:
        """The fits that ``best`` chooses from."""
        if self.weights == "gptq":
            return {str(grid): fit for grid, fit in GPTQ().fits(vlm, scheme, calibration, ("minmax", "mse")).items()}
        found = {name: Fit() for name in ("minmax", "mse")}
        for name, fit in found.items():
            for layer in weight_quantized_layers(vlm).values():
                METHODS[name].fit_weight(layer)
                fit.keep(layer, layer.weight)
        return found

    def install(self, vlm: VLM, scheme: QuantScheme) -> None:
        """As :meth:`PTQMethod.install`; dynamic ranges are refused, as they leave no activation step to learn."""
        super().install(vlm, scheme)
        for name, layer in act_quantized_layers(vlm).items():
            if layer.act_fake_quant.dynamic:
                raise VLMQError(
                    f"activation steps are to be learned, but layer '{name}' has none with act_dynamic; set that to false"
                )

    def fit_activations(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Fix the activation grids that training starts from; with the start ``best`` those of the first candidate."""
        if self.start == "paper":
            self.paper_activations(vlm, scheme, calibration)
        else:
            METHODS["minmax" if self.start == "best" else self.start].fit_activations(vlm, scheme, calibration)

    def fit_weight(self, layer: QuantizedLayer) -> None:
        """Fix the weight grid that training starts from."""
        if self.start == "paper":
            self.paper_weight(layer)
        else:
            METHODS[self.start].fit_weight(layer)

    def init_training(self, vlm: VLM) -> None:
        """Release the steps."""
        quantizers = [layer.weight_fake_quant for layer in weight_quantized_layers(vlm).values()]
        for quantizer in quantizers + [layer.act_fake_quant for layer in static_layers(vlm).values()]:
            quantizer.scale.requires_grad_(True)
            quantizer.scales_gradient = self.gradient_scale == "paper"

    def paper_activations(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Fix the activation grids that the paper starts from."""
        raise NotImplementedError

    def paper_weight(self, layer: QuantizedLayer) -> None:
        """Fix the weight grid that the paper starts from."""
        raise NotImplementedError


@register("lsq_contrastive")
@register("lsq_feature", distillation="feature")
@dataclass(frozen=True)
class LSQ(LearnedSteps):
    """LSQ (Esser et al. 2020, arXiv 1902.08153): steps learned with the weights.

    Gradients are Eq. 3 and 5 with the gradient scale of section 2.2. An asymmetric grid keeps a fixed integer zero point.
    By default steps start from min-max, or from the least squared error, as in LSQ+ (Bhalgat et al. 2020, section 3.2). The paper starts at
    ``2 <|v|> / sqrt(Qp)`` (section 2.1): a weight's from each of its blocks, an activation's from the calibration batches,
    of the signed grid where there are negative values and of the unsigned one elsewhere (section 2). A zero point taken
    from the minimum beside a step taken from the mean would leave one large value on one side with all the levels.
    torchao's range learning is not used for want of the gradient scale; see :mod:`~lightning_vlmq.quant.fake_quant`.

    Raises (from :meth:`prepare`):
        VLMQError: for dynamic activation ranges, which leave no activation step to learn.
    """

    def paper_activations(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Take each step from the mean magnitude of the layer's calibration inputs."""
        layers = static_layers(vlm)
        observers = {name: MagnitudeObserver(layer) for name, layer in layers.items()}
        calibrate(vlm, scheme, calibration, observers)
        for name, observer in observers.items():
            magnitude, minimum = observer.mean_magnitude.mean().view(1), observer.minimum.amin().view(1)
            set_paper_start(layers[name].act_fake_quant, magnitude, minimum)

    def paper_weight(self, layer: QuantizedLayer) -> None:
        """Take each step from the mean magnitude of its block."""
        quantizer = layer.weight_fake_quant
        blocks = to_blocks(layer.weight.detach(), quantizer.granularity).reshape(quantizer.scale.numel(), -1)
        set_paper_start(quantizer, blocks.abs().mean(1), blocks.amin(1))


def set_paper_start(quantizer: FakeQuantizer, magnitude: Tensor, minimum: Tensor) -> None:
    """Set a quantizer's initial LSQ step, ``2 <|v|> / sqrt(Qp)``.

    Args:
        quantizer: of a weight or an activation. A signed grid in an unsigned quantizer has its zero point in the middle.
        magnitude: mean absolute value of each block, ``[blocks]``.
        minimum: smallest value of each block, ``[blocks]``: whether the block is signed.
    """
    levels = quantizer.qmax - quantizer.qmin
    signed = torch.full_like(minimum, quantizer.symmetric, dtype=torch.bool) | (minimum < 0)
    largest = torch.where(signed, levels // 2, levels)
    zero_point = torch.where(signed, quantizer.qmin + levels // 2 + 1, quantizer.qmin).to(magnitude)
    quantizer.set_qparams(2 * magnitude / largest.to(magnitude).sqrt(), None if quantizer.symmetric else zero_point)
