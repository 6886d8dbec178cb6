"""Evaluation of one model, full precision or quantized, on every reliability dimension."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

from lightning import LightningModule
from torch import Tensor

from lightning_vlmq.data.datamodule import ReliabilityDataModule
from lightning_vlmq.data.sets import EvalSet
from lightning_vlmq.evaluation.about import OutputNoise, coverage_rows
from lightning_vlmq.evaluation.classifiers import warn_of_twin_classes
from lightning_vlmq.evaluation.digests import tower_digests
from lightning_vlmq.evaluation.evaluators import Evaluator, default_evaluators
from lightning_vlmq.evaluation.features import FeatureCache, Kept
from lightning_vlmq.evaluation.gathering import gather
from lightning_vlmq.evaluation.judged import Judged, Records
from lightning_vlmq.evaluation.results import outcome
from lightning_vlmq.evaluation.rows import Row, headline
from lightning_vlmq.evaluation.subject import quantized, restored, run_key
from lightning_vlmq.metrics import ood_score
from lightning_vlmq.models import VLM, load_vlm
from lightning_vlmq.models.recipes import Activation
from lightning_vlmq.quant import CoverageReport, Quantization, Quantized
from lightning_vlmq.quant.outliers import with_outliers
from lightning_vlmq.quant.scheme import FULL_PRECISION, QuantScheme
from lightning_vlmq.results.identity import file_digest
from lightning_vlmq.results.schema import RunKey
from lightning_vlmq.statistics import Statistics

AS_IT_IS = Quantization()
AS_PUBLISHED = Statistics()


class EvaluationModule(LightningModule):
    """Validates a VLM beside its full-precision reference, and beside itself with its logit scale tuned (LST).

    ``validate`` and ``test`` gather per-sample records of all of them and turn them into result rows (see
    :class:`~lightning_vlmq.evaluation.results.Outcome`) and headline numbers, which are logged (``<role>/<metric>``, for other callbacks to
    monitor); ``predict`` returns the columns of each batch.

    Args:
        vlm: a zoo model's or open_clip architecture's name, ``local-dir:<folder>`` or ``hf-hub:<owner>/<repository>``; in code a VLM too.
        pretrained: an open_clip weights tag, a file of weights, or ``none`` for random ones; open_clip's architectures need one.
        trained_like: for a file, the tag whose activation and preprocessing it shares, or ``architecture``.
        activation: ``gelu`` or ``quick_gelu``, where neither tag nor config is to decide.
        quant: method and scheme; calibration runs in ``setup`` on the data module's caption pairs.
        checkpoint: folder of a saved quantized model, taken instead of quantizing afresh; ``quant`` is then read from it.
        scores: OOD scores to record, with parameters where they are not the published ones: ``mcm(temperature=0.5)``.
        lst: whether to also judge the model with its logit scale fitted on the data module's caption pairs, all else as it is.
        evaluators: what to make of the records; all dimensions by default.
        outliers: factor by which a few channels of every normalised layer input are made larger, full precision's outputs staying
            what they are: see :func:`~lightning_vlmq.models.outliers.plant_outliers`; or ``stream`` for outlier channels in the residual
            streams, :func:`~lightning_vlmq.quant.rotation.concentrate.concentrate_streams`. The model is then called
            ``<name>+outliers<factor>``; 1 leaves it as it is.
        statistics: bins, resamples and seed of every statistic; stored with the run, for whoever compares it with others.
        cache: folder for features, shared by runs; ``None`` takes that of the results, if any are filed.
        kept_features: which image features stay there: ``all``, full precision's (``reference``), or ``none``; moves no number.

    Raises:
        VLMQError: unknown names, values out of range, damaged checkpoints, coverage below ``quant.minimum_coverage``.
    """

    def __init__(
        self,
        vlm: str | VLM,
        pretrained: str | None = None,
        quant: Quantization = AS_IT_IS,
        checkpoint: str | None = None,
        scores: Sequence[str] = ("mcm", "msp", "maxlogit", "energy", "entropy"),
        lst: bool = False,
        evaluators: list[Evaluator] | None = None,
        cache: str | None = None,
        kept_features: Kept = "all",
        trained_like: str | None = None,
        activation: Activation | None = None,
        outliers: float | Literal["stream"] = 1.0,
        statistics: Statistics = AS_PUBLISHED,
    ) -> None:
        super().__init__()
        named = isinstance(vlm, str)
        self.save_hyperparameters(ignore=["evaluators"] if named else ["evaluators", "vlm"])
        self.quant = quant
        self.scheme = self.quant.scheme()
        self.scores = {text: ood_score(text) for text in scores}
        self.lst = lst
        self.evaluators = default_evaluators() if evaluators is None else evaluators
        self.statistics = statistics
        self.cache = FeatureCache(cache, kept_features)
        self.checkpoint = checkpoint
        loaded = load_vlm(vlm, pretrained, trained_like, activation) if isinstance(vlm, str) else vlm
        self.vlm, self.outliers = with_outliers(loaded, outliers), outliers
        self.reference: VLM | None = None
        self.quantized: Quantized | None = None
        self._prepared = False
        self.rows: list[Row] = []
        self.tuned_rows: list[Row] = []
        self.records: Records = {}
        self.reference_records: Records | None = None
        self.tuned_records: Records | None = None

    @property
    def run_key(self) -> RunKey:
        """What is evaluated, as results name it."""
        return run_key(self.vlm, self.quant, self.scheme)

    def identity(self) -> dict[str, Any]:
        """What decides this module's numbers: the model and its weights, how it is quantized, scores, evaluators, statistics."""
        return {
            "vlm": self.vlm,
            "outliers": self.outliers,
            "quant": FULL_PRECISION if self.checkpoint is None and self.scheme is None else self.quant,
            "checkpoint": None if self.checkpoint is None else file_digest(self.checkpoint),
            "scores": list(self.scores),
            "lst": self.lst,
            "evaluators": list(self.evaluators),
            "statistics": self.statistics,
        }

    @property
    def sees_batches(self) -> bool:
        """Whether numbers depend on how the images are dealt out to batches."""
        return self.scheme is not None and self.quant.chosen().sees_batches

    @property
    def coverage(self) -> CoverageReport | None:
        """What is quantized, once the model is."""
        return None if self.quantized is None else self.quantized.coverage

    @property
    def data(self) -> ReliabilityDataModule:
        """The data module of this run."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def eval_sets(self) -> list[EvalSet]:
        """The evaluation sets, in the order of the loaders."""
        return self.data.eval_sets

    def setup(self, stage: str) -> None:
        """Quantize (or load the quantized model), once, on the device that the run will use."""
        if self._prepared:
            return
        self._prepared = True
        if self.trainer.is_global_zero:
            warn_of_twin_classes(self.vlm, self.data)
        if self.checkpoint is None and self.scheme is None:
            return
        self.reference = copy.deepcopy(self.vlm).requires_grad_(False)
        self.vlm.to(self.trainer.strategy.root_device)
        if self.checkpoint is not None:
            self.quant, self.quantized = restored(self.vlm, self.quant, self.checkpoint)
            self.scheme = self.quantized.scheme
        else:
            self.quantized = quantized(self.vlm, self.quant, self.data, may_train=stage == "fit")

    def take(self, vlm: VLM, reference: VLM, quantization: Quantization, quantized: Quantized) -> None:
        """Judge a model that is quantized already, beside its full-precision one."""
        self.vlm, self.reference, self.quantized = vlm, copy.deepcopy(reference).requires_grad_(False), quantized
        self.quant, self.scheme, self._prepared = quantization, quantization.scheme(), True

    def on_validation_epoch_start(self) -> None:
        """Take the models under judgement: the model itself, and its full-precision reference where there is one."""
        tunes = self.lst and not (self.trainer.sanity_checking or self.trainer.predicting)
        self._noise = OutputNoise().to(self.vlm.mean.device)
        self._judged = self._judge(self.vlm, self.scheme, self.quant.text, tunes)
        self._reference = None if self.reference is None else self._judge(self.reference, None, FULL_PRECISION, False)

    @property
    def judged(self) -> tuple[Judged, Judged | None]:
        """The model under judgement and its full-precision reference, while a validation or test runs and after it."""
        return self._judged, self._reference

    def _judge(self, vlm: VLM, scheme: QuantScheme | None, method: str, tunes: bool) -> Judged:
        towers = tower_digests(vlm, scheme, FULL_PRECISION if scheme is None else method, self.trainer)
        if scheme is None:
            self.cache.lasting |= set(towers.values())
        return Judged(vlm, self.data, self.cache, towers, self.scores, self.statistics, tunes)

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Record one batch of ``image`` uint8 ``[b, 3, h, w]``, ``target`` and ``index`` int64 ``[b]`` for every model."""
        s = self.eval_sets[dataloader_idx]
        full = None if self._reference is None else self._reference.record(s, batch)
        own = self._judged.record(s, batch, None if full is None else full.logits)
        if full is not None:
            self._noise.look(s, own, full)

    def on_validation_epoch_end(self) -> None:
        """Gather the records of all processes, evaluate them, log the rows."""
        if self.trainer.sanity_checking:
            return
        judged, reference = self.judged
        models = {f"'{self.vlm.name}'": judged} | ({} if reference is None else {"full precision": reference})
        gather(self.trainer, models, self.eval_sets)
        found = outcome(judged, reference, self.eval_sets, self.evaluators, self.statistics)
        self.rows, self.tuned_rows, self.records, self.reference_records, self.tuned_records = found
        self.rows = self.rows + coverage_rows(self.eval_sets, self.coverage, self.scheme, self.vlm)
        if reference is not None:
            self.rows = self.rows + self._noise.rows(self.eval_sets)
        self.log_dict(headline(self.rows), sync_dist=True)
        self.log_dict({f"lst/{name}": value for name, value in headline(self.tuned_rows).items()}, sync_dist=True)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end
    on_predict_epoch_start = on_validation_epoch_start

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """The record columns of one batch, ``index`` included, each ``[b]``."""
        return {"index": batch["index"], **self._judged.columns(self.eval_sets[dataloader_idx], batch)}
