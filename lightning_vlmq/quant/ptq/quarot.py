"""Rotate the residual stream, attended values and MLP inner inputs so that outliers spread over all channels (QuaRot)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.calibrating import Batch
from lightning_vlmq.quant.layers import quantized_layers, static_layers, swap_layers
from lightning_vlmq.quant.methods import METHODS, PTQMethod, register, within
from lightning_vlmq.quant.rotation.rotate import rotate, rotate_input
from lightning_vlmq.quant.scheme import QuantScheme


@dataclass(frozen=True)
class Rotated(PTQMethod):
    """The rotations of QuaRot (Ashkboos et al. 2024, arXiv 2404.00456, section 4, stages 1a to 1c), before anything else.

    The residual stream of each tower in scope is rotated by weights alone (stage 1a, Eq. 4), values within heads too
    (1c, Eq. 8); values across heads (1c, Eq. 9) and the inputs of an MLP's second layer (1b) are rotated at run time.
    Keys are not (1d): no cache of them is quantized here. A tower whose stream no rotation commutes with is rotated
    inside its blocks instead: every layer that mixes its input channels has its input rotated at run time. The coverage
    report says which it is.
    """

    def install(self, vlm: VLM, scheme: QuantScheme) -> None:
        """Rotate the streams of the towers in scope, and put the remaining rotations before the layers that get quantized."""
        at_run_time = rotate(vlm, scheme.towers)
        swap_layers(vlm, scheme)
        for name, layer in quantized_layers(vlm).items():
            if name in at_run_time:
                rotate_input(layer, at_run_time[name])


@register("quarot")
@dataclass(frozen=True)
class QuaRot(Rotated):
    """QuaRot's rotations, then min-max ranges.

    Attributes:
        weights: ``rtn`` rounds to nearest (the paper's RTN variant), ``gptq`` by GPTQ (its main variant).
        clip_ratio: what static activation ranges are multiplied with; 0.9 in the paper's 4-bit runs (section 5), which leaves
            nothing out where the rotation has spread the outliers.
    """

    weights: Literal["rtn", "gptq"] = "rtn"
    clip_ratio: float = within(1.0, 0.1, 1)

    def fit_activations(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Fix the activation grids; a share of the extreme values."""
        super().fit_activations(vlm, scheme, calibration)
        for layer in static_layers(vlm).values():
            quantizer = layer.act_fake_quant
            quantizer.set_qparams(quantizer.scale.detach() * self.clip_ratio, quantizer.zero_point)

    def fit_weights(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Round the weights, or leave that to the quantizers."""
        if self.weights == "gptq":
            METHODS["gptq"].fit_weights(vlm, scheme, calibration)
        else:
            super().fit_weights(vlm, scheme, calibration)
