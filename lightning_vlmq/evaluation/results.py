"""From the records of judged variants to result rows."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data.sets import EvalSet
from lightning_vlmq.evaluation.classwise import classwise_estimates
from lightning_vlmq.evaluation.evaluators import Evaluator, estimate_all
from lightning_vlmq.evaluation.judged import Judged, Records, Variant
from lightning_vlmq.evaluation.quantities import AlignedRuns
from lightning_vlmq.evaluation.records import EvaluationSet, SampleMatrix
from lightning_vlmq.evaluation.rows import Row, rows_of
from lightning_vlmq.quant import CoverageReport
from lightning_vlmq.quant.scheme import QuantScheme
from lightning_vlmq.statistics import Statistics

log = logging.getLogger(__name__)

OUTPUT_SQNR = "output_sqnr_db"
"""Of a quantized model: signal-to-quantization-noise ratio of its unit-norm image features of the in-distribution images against full
precision's, -10 log10 of the mean over images of ``|z_q - z|^2``, in dB; not there where they are equal."""

BITS_PER_WEIGHT = "bits_per_weight"
"""Of a quantized model: mean bits of a matrix weight of both towers, by the scheme's own width; scales and zero points not counted."""


class Outcome(NamedTuple):
    """What a validation found.

    Attributes:
        rows: the judged model's results, compared with full precision where there is one beside it.
        tuned_rows: the same with the logit scale tuned; empty where it was not.
        records: per-sample columns by data set.
        reference_records: full precision's, or ``None``.
        tuned_records: with the logit scale tuned, or ``None``.
    """

    rows: list[Row]
    tuned_rows: list[Row]
    records: Records
    reference_records: Records | None
    tuned_records: Records | None


def outcome(
    judged: Judged,
    reference: Judged | None,
    sets: Sequence[EvalSet],
    evaluators: Sequence[Evaluator],
    settings: Statistics,
) -> Outcome:
    """Rows of what a model and its full-precision reference have gathered."""
    variants = [*([reference.own] if reference else []), *judged.variants]
    rows = dict(zip(map(id, variants), rows_by_variant(variants, sets, evaluators, settings)))
    tuned = judged.tuned
    return Outcome(
        rows[id(judged.own)],
        [] if tuned is None else rows[id(tuned)],
        judged.own.records,
        None if reference is None else reference.own.records,
        None if tuned is None else tuned.records,
    )


def rows_by_variant(
    variants: Sequence[Variant], sets: Sequence[EvalSet], evaluators: Sequence[Evaluator], settings: Statistics
) -> list[list[Row]]:
    """The rows of each variant and its logit scale, all evaluated together; those after the first are compared with the first.

    Args:
        variants: gathered; the first is full precision as it came.
        sets: the evaluation sets.
        evaluators: what to make of the records.
        settings: the statistics' settings.
    """
    where = [EvaluationSet(s.name, s.role, s.corruption, s.severity, s.group) for s in sets]
    matrices = []
    for s in where:
        tables = [{name: column.numpy() for name, column in v.records[s.dataset].items()} for v in variants]
        matrices.append(SampleMatrix(s, dict(enumerate(tables)), len(variants)))
    estimates = estimate_all(AlignedRuns(matrices, settings), evaluators)
    estimates |= classwise_estimates(
        where, {name: [v.gaps[name] for v in variants] for name in variants[0].gaps}, settings
    )
    facts = [{"logit_scale": v.scale.scale, "logit_bias": v.scale.bias, "pairs_nll": v.pairs_nll} for v in variants]
    return [rows_of(estimates, run, is_compared=run > 0) + model_rows(sets, facts[run]) for run in range(len(variants))]


def coverage_rows(sets: Sequence[EvalSet], coverage: CoverageReport | None, scheme: QuantScheme | None) -> list[Row]:
    """Shares of the scope's matrix weights and multiply-accumulates that are quantized; none of a model in full precision."""
    if coverage is None or scheme is None:
        return []
    weights, macs = coverage.weight_share(scheme.towers), coverage.mac_share(scheme.towers)
    all_weights = coverage.weight_share()
    bits = all_weights * scheme.weight_bits + (1 - all_weights) * 32
    return model_rows(sets, {"coverage_weights": weights, "coverage_macs": macs, BITS_PER_WEIGHT: bits})


def damage_rows(sets: Sequence[EvalSet], noise: float) -> list[Row]:
    """:data:`OUTPUT_SQNR` from the mean over images of ``|z_q - z|^2``; none where the features are equal."""
    return model_rows(sets, {OUTPUT_SQNR: -10 * math.log10(noise)}) if noise > 0 else []


def require_complete(sets: Sequence[EvalSet], records: Records) -> None:
    """Warn of images that were left out because they cannot be read.

    Raises:
        VLMQError: samples are missing or doubled for any other reason, or all of a set's.
    """
    for s in sets:
        missing = len(s.images) - len(records[s.name]["index"])
        if missing == 0:
            continue
        if getattr(s.images, "on_bad_image", "error") != "skip" or missing < 0:
            raise VLMQError(
                f"data set '{s.name}' has {len(s.images)} samples, {len(records[s.name]['index'])} were evaluated; "
                "leave sharding to the data module (trainer.use_distributed_sampler: false)"
            )
        if missing == len(s.images):
            raise VLMQError(f"none of the {missing} images of data set '{s.name}' can be read; repair the files")
        log.warning("%d of %d images of '%s' cannot be read and are left out", missing, len(s.images), s.name)


def warn_of_collapse(judged: Judged, what: str, sets: Sequence[EvalSet]) -> None:
    """Warn where features are finite, of unit length, and all the same: the metrics of such a model look like any other's.

    Images are told by what was recorded of them: one prediction with one confidence and one value of each score.

    Args:
        judged: gathered.
        what: what the model is called in the warning.
        sets: the evaluation sets.
    """
    alike: dict[str, list[str]] = {}
    for s in sets:
        records, classifier = judged.own.records[s.name], judged.classifier(s)
        if len(classifier) < 2 or len(records["index"]) < 2:
            continue
        told = [column for name, column in records.items() if name in ("confidence", *judged.own.scores)]
        if float((classifier @ classifier[0]).min()) > 1 - 1e-6:
            alike.setdefault("classes", []).append(s.name)
        elif len(records["prediction"].unique()) == 1 and all(map(_is_constant, told)):
            alike.setdefault("images", []).append(s.name)
    for kind, names in alike.items():
        shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
        log.warning(
            "%s: all %s have one and the same feature on %d of %d data sets (%s); numbers of a collapsed model mean nothing: take more "
            "bits, another method, or other weights",
            *(what, kind, len(names), len(sets), shown),
        )


def _is_constant(column: Tensor) -> bool:
    return float(column.max() - column.min()) <= 1e-5 * float(column.abs().max())


def model_rows(sets: Sequence[EvalSet], values: Mapping[str, float | None]) -> list[Row]:
    """Numbers about the model alone, filed with the in-distribution set."""
    inside = next(s for s in sets if s.role == "id")
    return [Row(inside.name, "id", name, value, 0.0, 0) for name, value in values.items() if value is not None]
