"""Control: singular directions of the weights taken away, without any quantization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.calibrating import Batch
from lightning_vlmq.quant.imitated import Imitation, Pattern, imitate, observe_errors, quantized_twin
from lightning_vlmq.quant.layers import swap_layers
from lightning_vlmq.quant.methods import PTQMethod, register
from lightning_vlmq.quant.observers import second_moments
from lightning_vlmq.quant.scheme import QuantScheme
from lightning_vlmq.spectral import RankCut


@register("rank_truncation")
@dataclass(frozen=True)
class RankTruncation(PTQMethod):
    """The spectral filter alone: every layer loses ranks until its output error is that of a quantization.

    How many is decided layer by layer on full-precision inputs of the calibration data; the nearest number on a log scale, at
    least one. Activations are left as they are, their rounding being part of the error that is matched. A grouped or
    depth-wise convolution has no singular directions across its channels and keeps its weight.

    Attributes:
        pattern: the quantization whose error is matched.
        weighting: ``plain``: directions of the weight; ``activation``: directions of its outputs on the calibration data, which
            lose the least output error for their number (as in LQER and QERA, Zhang et al. 2024).
        keep: ``top``: the high ranks are taken away, as the published explanation has it; ``bottom``: the leading ones.
    """

    pattern: Pattern = "minmax"
    weighting: Literal["plain", "activation"] = "plain"
    keep: Literal["top", "bottom"] = "top"

    is_control = True
    has_integers = False

    def prepare(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> VLM:
        """As :meth:`PTQMethod.prepare`: change the weights. Raises what the pattern refuses."""
        twin = quantized_twin(vlm, self.pattern, scheme, calibration)
        swap_layers(vlm, scheme)
        with torch.no_grad():
            weights = {name: m.weight for name, m in vlm.named_modules() if hasattr(m, "weight_fake_quant")}
            errors = observe_errors(twin, weights, scheme, calibration)
            cuts = {}
            for name, layer, moment in second_moments(vlm, scheme, calibration):
                if len(moment) == 1:
                    cut = RankCut(layer.weight, moment[0], self.weighting == "activation")
                    dropped = cut.nearest(errors[name].output_error, self.keep == "bottom")
                    kept = cut.keep(dropped) if self.keep == "bottom" else cut.keep(0, len(cut) - dropped)
                    cuts[name] = kept - layer.weight
            for name, layer in imitate(vlm, twin).items():
                assert isinstance(layer.weight_fake_quant, Imitation)
                layer.weight_fake_quant.change = cuts.get(name, torch.zeros_like(layer.weight))
        return vlm
