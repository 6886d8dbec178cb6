"""Control: the damping of singular directions that a quantization amounts to, without its noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.calibrating import Batch
from lightning_vlmq.quant.imitated import Imitation, Pattern, imitate, quantized_twin
from lightning_vlmq.quant.layers import quantized_layers, swap_layers
from lightning_vlmq.quant.methods import PTQMethod, register
from lightning_vlmq.quant.scheme import QuantScheme
from lightning_vlmq.spectral import filter_gains, shrink_spectrum


@register("spectral_shrink")
@dataclass(frozen=True)
class SpectralShrink(PTQMethod):
    """``W' = U diag(clip(g, 0, 1) s) V^T`` with the gains that a quantization's weights have along W's own directions.

    ``g_k = u_k^T W_q v_k / s_k``, smoothed over log-spaced windows of ranks, see
    :func:`~lightning_vlmq.spectral.filter_gains`; never the ratio of singular values, which noise makes grow. Activations are
    left as they are. A grouped or depth-wise convolution has no singular directions across its channels and keeps its weight.

    Attributes:
        pattern: the quantization whose damping is taken over.
    """

    pattern: Pattern = "minmax"

    is_control = True
    has_integers = False

    def prepare(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> VLM:
        """As :meth:`PTQMethod.prepare`: change the weights. Raises what the pattern refuses."""
        twin = quantized_twin(vlm, self.pattern, scheme, calibration)
        swap_layers(vlm, scheme)
        with torch.no_grad():
            patterns = quantized_layers(twin)
            for name, layer in imitate(vlm, twin).items():
                assert isinstance(layer.weight_fake_quant, Imitation)
                changed = layer.weight
                if getattr(layer, "groups", 1) == 1:
                    gains, _ = filter_gains(layer.weight, patterns[name].effective_weight())
                    changed = shrink_spectrum(layer.weight, gains)
                layer.weight_fake_quant.change = changed - layer.weight
        return vlm
