"""Numbers about a model alone, filed with the in-distribution set: how much of it is quantized, in how many bits, with what noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torchmetrics import MeanMetric

from lightning_vlmq.data.sets import EvalSet, in_distribution
from lightning_vlmq.evaluation.rows import Row
from lightning_vlmq.metrics import ScoreInputs
from lightning_vlmq.models import VLM
from lightning_vlmq.quant import CoverageReport, quantized_layers
from lightning_vlmq.quant.scheme import QuantScheme

OUTPUT_SQNR = "output_sqnr_db"
"""Of a quantized model: signal-to-quantization-noise ratio of its unit-norm image features of the in-distribution images against full
precision's, -10 log10 of the mean over images of ``|z_q - z|^2``, in dB; not there where they are equal."""

BITS_PER_WEIGHT = "bits_per_weight"
"""Of a quantized model: mean bits of a matrix weight of both towers, with what a method keeps beside its integers; steps not counted."""


CLIPPED_LAYERS = "clipped_layers"
"""Of a quantized model: number of layers that clip more than is worth telling, see
:class:`~lightning_vlmq.quant.clipping.ClippedGrid`."""


def model_rows(sets: Sequence[EvalSet], values: Mapping[str, float | None]) -> list[Row]:
    """Numbers about the model alone, filed with the in-distribution set."""
    inside = in_distribution(sets)
    return [Row(inside.name, "id", name, value, 0.0, 0) for name, value in values.items() if value is not None]


def coverage_rows(
    sets: Sequence[EvalSet], coverage: CoverageReport | None, scheme: QuantScheme | None, vlm: VLM
) -> list[Row]:
    """Shares of the scope's matrix weights and MACs that are quantized, mean bits, layers that clip; none in full precision.

    Bits per matrix weight of both towers are those that each layer has, by rules and mixed precision too, with what a method keeps beside
    its integers; weights that are not quantized have 32. Steps and offsets are not counted.
    """
    if coverage is None or scheme is None:
        return []
    weights, macs = coverage.weight_share(scheme.towers), coverage.mac_share(scheme.towers)
    total = sum(row.weights for row in coverage.rows)
    quantizers = [(layer.weight.numel(), layer.weight_fake_quant) for layer in quantized_layers(vlm).values()]
    kept = [(n, n * q.bits + q.extra_bits) for n, q in quantizers if q.quantizes]
    bits = (sum(own for _, own in kept) + 32 * (total - sum(n for n, _ in kept))) / max(total, 1)
    told = {
        "coverage_weights": weights,
        "coverage_macs": macs,
        BITS_PER_WEIGHT: bits,
        CLIPPED_LAYERS: coverage.clipped_layers,
    }
    return model_rows(sets, told)


class OutputNoise(MeanMetric):
    """Mean over in-distribution images of the noise that quantization puts on their features, |z_q - z|^2 / |z|^2."""

    def look(self, s: EvalSet, inputs: ScoreInputs, full: ScoreInputs) -> None:
        """Take in a batch of a set, of the quantized model and of full precision; of other sets than the ``id`` one nothing."""
        if s.role == "id" and len(full.cosine):
            assert full.features is not None and inputs.features is not None
            self.update((inputs.features - full.features).square().sum(-1) / full.features.square().sum(-1))

    def rows(self, sets: Sequence[EvalSet]) -> list[Row]:
        """:data:`OUTPUT_SQNR`, over all processes, each of which has to call this; none where the features are equal."""
        noise = float(self.compute())
        return model_rows(sets, {OUTPUT_SQNR: -10 * math.log10(noise)}) if noise > 0 else []
