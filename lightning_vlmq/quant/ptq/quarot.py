"""Rotate the residual stream, attended values and MLP inner inputs so that outliers spread over all channels (QuaRot)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.calibrating import Batch
from lightning_vlmq.quant.layers import quantized_layers
from lightning_vlmq.quant.methods import METHODS, PTQMethod
from lightning_vlmq.quant.rotation.rotate import rotate, rotate_input
from lightning_vlmq.quant.scheme import QuantScheme


class Rotated(PTQMethod):
    """The rotations of QuaRot (Ashkboos et al. 2024, arXiv 2404.00456, section 4, stages 1a to 1c), before anything else.

    The residual stream of each tower in scope is rotated by weights alone (stage 1a, Eq. 4), values within heads too
    (1c, Eq. 8); values across heads (1c, Eq. 9) and the inputs of an MLP's second layer (1b) are rotated at run time.
    Keys are not (1d): no cache of them is quantized here. A tower whose stream no rotation commutes with is rotated
    inside its blocks instead: every layer that mixes its input channels has its input rotated at run time. The coverage
    report says which it is.
    """

    def __init__(self) -> None:
        self._at_run_time: dict[str, nn.Module] = {}

    def transform_model(self, vlm: VLM, scheme: QuantScheme) -> None:
        """Rotate the streams of the towers in scope."""
        self._at_run_time = rotate(vlm, scheme.towers)

    def fit_transforms(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Put the remaining rotations before the layers that are quantized."""
        for name, layer in quantized_layers(vlm).items():
            if name in self._at_run_time:
                rotate_input(layer, self._at_run_time[name])


@METHODS.register("quarot")
class QuaRot(Rotated):
    """QuaRot's rotations, then min-max with round-to-nearest weights (the paper's RTN variant)."""
