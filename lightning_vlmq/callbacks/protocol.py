"""What callbacks read from a module that evaluates."""

from __future__ import annotations

from typing import Any, Protocol, cast

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data.sets import EvalSet
from lightning_vlmq.evaluation.features import FeatureCache
from lightning_vlmq.evaluation.judged import Records
from lightning_vlmq.evaluation.rows import Row
from lightning_vlmq.models import VLM
from lightning_vlmq.quant import CoverageReport, Quantization, Quantized
from lightning_vlmq.quant.scheme import QuantScheme
from lightning_vlmq.results.schema import RunKey
from lightning_vlmq.statistics import Statistics


class Evaluating(Protocol):
    """A module as callbacks see it; :class:`~lightning_vlmq.modules.EvaluationModule` is one.

    Attributes:
        vlm: the model.
        reference: full precision beside it, or ``None`` where the model is that itself.
        quant: how it is quantized.
        scheme: the scheme, ``None`` in full precision.
        quantized: what came of it, once it was.
        statistics: the settings behind ``rows``.
        cache: where features are kept.
        rows: results of the last validation or test.
        tuned_rows: the same with the logit scale tuned; empty where it was not.
        records: per-sample columns by data set.
        reference_records: full precision's, or ``None``.
        tuned_records: with the logit scale tuned, or ``None``.
    """

    vlm: VLM
    reference: VLM | None
    quant: Quantization
    scheme: QuantScheme | None
    quantized: Quantized | None
    statistics: Statistics
    cache: FeatureCache
    rows: list[Row]
    tuned_rows: list[Row]
    records: Records
    reference_records: Records | None
    tuned_records: Records | None

    @property
    def coverage(self) -> CoverageReport | None:
        """What was quantized, once it was."""
        ...

    @property
    def run_key(self) -> RunKey:
        """What is evaluated, as results name it."""
        ...

    @property
    def eval_sets(self) -> list[EvalSet]:
        """The evaluation sets, in the order of the loaders."""
        ...


def evaluating(pl_module: Any, callback: object) -> Evaluating:
    """The module, which has to be one that evaluates.

    Raises:
        VLMQError: it is not; the message names the callback to leave out.
    """
    lacks = [name for name in Evaluating.__annotations__ if not hasattr(pl_module, name)]
    if lacks:
        raise VLMQError(
            f"{type(pl_module).__name__} has no {', '.join(lacks)}; remove {type(callback).__name__}, or use EvaluationModule"
        )
    return cast(Evaluating, pl_module)
