"""Quantize a VLM by method name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

import torch

from lightning_vlmq.errors import VLMQError
from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.calibration import Batch
from lightning_vlmq.quant.coverage import CoverageReport, assert_covered, measure_coverage
from lightning_vlmq.quant.fake_quant import all_finite
from lightning_vlmq.quant.layers import quantized_layers
from lightning_vlmq.quant.methods import METHODS
from lightning_vlmq.quant.scheme import QuantScheme


def quantize(
    vlm: VLM, method: str, scheme: QuantScheme, calibration: Iterable[Batch], minimum_coverage: float = 0.95
) -> CoverageReport:
    """Quantize a model in place, or set it up for quantization-aware training, and prove that it is covered.

    Args:
        vlm: full-precision model; changed in place.
        method: a name in :data:`METHODS`, e.g. ``"minmax"`` or ``"lsq_contrastive"``.
        scheme: bits, granularities and scope.
        calibration: batches ``{"image": uint8 [B, 3, H, W], "tokens": int64 [B, L]}``. A data loader or list is
            iterated as often as the method needs; a one-shot iterator is read into memory first.
        minimum_coverage: smallest share of the scope's matrix weights that has to be quantized.

    Returns:
        What is quantized.

    Raises:
        VLMQError: unknown method, weights or calibration data that are not finite, too little covered, or a scheme the
            method does not take.
    """
    chosen = METHODS[method]()
    repeatable = list(calibration) if isinstance(calibration, Iterator) else calibration
    chosen.prepare(vlm, scheme, cast("list[Batch]", repeatable))
    require_finite_layers(vlm)
    report = measure_coverage(vlm)
    assert_covered(report, scheme.scope, minimum_coverage)
    return report


def require_finite_layers(vlm: VLM) -> None:
    """Raise :class:`VLMQError` naming the first quantized layer whose weight or static grid is not finite."""
    with torch.no_grad():
        for name, layer in quantized_layers(vlm).items():
            act = layer.act_fake_quant
            static = act.enabled and not act.dynamic
            if not all_finite(layer.effective_weight()) or (static and not all_finite(act.scale)):
                raise VLMQError(
                    f"layer '{name}' is not finite after quantization; check the weights and the calibration data"
                )
