"""Evaluation of one model, full precision or quantized, on every reliability dimension."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.roles import ROLES
from lightning_vlmq.data.datamodule import ReliabilityDataModule
from lightning_vlmq.data.sets import EvalSet
from lightning_vlmq.evaluation.classifiers import warn_of_twin_classes, zero_shot_classifiers
from lightning_vlmq.evaluation.evaluators import classwise_rows, default_evaluators, headline
from lightning_vlmq.evaluation.features import FeatureCache, SetFeatures, tower_digest
from lightning_vlmq.evaluation.quantities import Evaluator, Row
from lightning_vlmq.evaluation.tuning import PairFeatures, encode_pairs, own_logit_scale, tuned_logit_scale
from lightning_vlmq.metrics import (
    OOD_SCORES,
    PAIR_SCORES,
    PATCH_SCORES,
    RECORD_COLUMNS,
    ClasswiseJackknife,
    LogitScale,
    SampleRecords,
    ScoreInputs,
    ood_score,
    per_sample,
)
from lightning_vlmq.models import VLM, load_vlm
from lightning_vlmq.models.local import encode_patches
from lightning_vlmq.models.openclip import Activation
from lightning_vlmq.models.vlm import TOWERS
from lightning_vlmq.quant import METHODS, CoverageReport, load_quantized, quantize
from lightning_vlmq.quant.methods import Quantization
from lightning_vlmq.quant.scheme import FULL_PRECISION
from lightning_vlmq.results.schema import RunKey

log = logging.getLogger(__name__)


AS_IT_IS = Quantization()


class EvaluationModule(LightningModule):
    """Validates a VLM beside its full-precision reference, and beside itself with its logit scale tuned (LST).

    ``validate`` and ``test`` gather per-sample records of all of them (``records``, ``reference_records``, ``tuned_records``: data set
    name to columns) and turn them into result rows (``rows``, ``tuned_rows``) and into
    headline numbers, which are logged (``<role>/<metric>``, for other callbacks to monitor); ``predict`` returns the columns of each batch.

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
        cache: folder for image features, shared by runs; ``None`` keeps none.

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
        trained_like: str | None = None,
        activation: Activation | None = None,
    ) -> None:
        super().__init__()
        named = isinstance(vlm, str)
        self.save_hyperparameters(ignore=["evaluators"] if named else ["evaluators", "vlm"])
        self.quant = quant
        self.scheme = self.quant.scheme()
        self.scores = {text: ood_score(text) for text in scores}
        self.lst = lst
        self.evaluators = default_evaluators() if evaluators is None else evaluators
        self.cache = FeatureCache(cache)
        self.checkpoint = checkpoint
        self.vlm: VLM = load_vlm(vlm, pretrained, trained_like, activation) if isinstance(vlm, str) else vlm
        self.reference: VLM | None = None
        self.coverage: CoverageReport | None = None
        self._prepared = False
        self.rows: list[Row] = []
        self.tuned_rows: list[Row] = []
        self.records: dict[str, dict[str, Tensor]] = {}
        self.reference_records: dict[str, dict[str, Tensor]] | None = None
        self.tuned_records: dict[str, dict[str, Tensor]] | None = None

    @property
    def run_key(self) -> RunKey:
        """What is evaluated, as results name it."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))  # where Lightning keeps seed_everything's
        if self.scheme is None:
            return RunKey(self.vlm.name, self.vlm.pretrained, "none", FULL_PRECISION, 32, 32, seed)
        scheme = self.scheme
        return RunKey(
            self.vlm.name,
            self.vlm.pretrained,
            scheme.scope,
            self.quant.method,
            scheme.weight_bits,
            scheme.act_bits,
            seed,
            scheme.variant,
        )

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
        device = self.trainer.strategy.root_device
        self.reference = copy.deepcopy(self.vlm).requires_grad_(False)
        self.vlm.to(device)
        if self.checkpoint is not None:
            saved = load_quantized(self.vlm, self.checkpoint)
            self.quant = replace(self.quant, method=saved.method, **asdict(saved.scheme))
            self.scheme, self.coverage = saved.scheme, saved.coverage
            return
        assert self.scheme is not None
        if METHODS[self.quant.method].needs_training and stage != "fit":
            raise VLMQError(
                f"{self.quant.method} is trained: run 'vlmq fit --config qat' first, or give its result by --model.checkpoint"
            )
        batches = [
            {"image": b["image"].to(device), "tokens": self.vlm.tokenize(b["caption"]).to(device)}
            for b in self.data.calibration_batches()
        ]
        self.coverage = quantize(self.vlm, self.quant.method, self.scheme, batches, self.quant.minimum_coverage)

    def take(self, vlm: VLM, reference: VLM, quantization: Quantization, coverage: CoverageReport) -> None:
        """Judge a model that is quantized already, beside its full-precision one."""
        self.vlm, self.reference, self.coverage = vlm, copy.deepcopy(reference).requires_grad_(False), coverage
        self.quant, self.scheme, self._prepared = quantization, quantization.scheme(), True

    # validation, test and prediction -------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Build the models' zero-shot classifiers, tune the logit scale, and see which features are known already."""
        self._models = {"model": self.vlm} | ({} if self.reference is None else {"reference": self.reference})
        self._classifiers: dict[str, dict[str, Tensor]] = {}
        self._features: dict[tuple[str, str], SetFeatures] = {}
        self._patches: dict[tuple[str, str], SetFeatures] = {}
        self._pairs: dict[str, PairFeatures] = {}
        # Logit scales by model: each scale, by its name, is a model of its own to the evaluators.
        self._scales: dict[str, dict[str, LogitScale]] = {}
        tunes = self.lst and not (self.trainer.sanity_checking or self.trainer.predicting)
        kinds = {score.name for score in self.scores.values()}
        for which, vlm in self._models.items():
            vlm.eval()
            quantized = which == "model" and self.scheme is not None
            how = (self.scheme, self.quant.method) if quantized else (None, FULL_PRECISION)
            towers = {tower: tower_digest(vlm, *how, tower) for tower in TOWERS}
            with torch.no_grad():
                self._classifiers[which] = zero_shot_classifiers(vlm, self.data, self.cache, towers["text"])
            for s in self.eval_sets:
                self._features[which, s.name] = SetFeatures(self.cache, towers["vision"], s)
                if kinds & PATCH_SCORES:
                    self._patches[which, s.name] = SetFeatures(self.cache, towers["vision"], s, "patches")
            self._scales[which] = {which: own_logit_scale(vlm)}
            if (tunes and which == "model") or kinds & PAIR_SCORES:
                self._pairs[which] = encode_pairs(vlm, self.data, self.cache, towers)
        if tunes:
            self._scales["model"]["tuned"] = tuned_logit_scale(self.vlm, self._pairs["model"])
        columns = {name: dtype for name, dtype in RECORD_COLUMNS.items() if name not in OOD_SCORES}
        columns |= dict.fromkeys(self.scores, torch.float32)
        self._collected: dict[tuple[str, str], SampleRecords] = {}
        self._classwise: dict[tuple[str, str], ClasswiseJackknife] = {}
        for which, scales in self._scales.items():
            for key in ((name, s.name) for name in scales for s in self.eval_sets):
                self._collected[key] = SampleRecords(columns).to(self.device)
            for s in self.eval_sets:
                if ROLES[s.role].is_classwise:
                    n_classes = len(self._classifiers[which][s.name])
                    self._classwise |= {
                        (name, s.name): ClasswiseJackknife(n_classes).to(self.device) for name in scales
                    }

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Record one batch of ``image`` uint8 ``[b, 3, h, w]``, ``target`` and ``index`` int64 ``[b]`` for every model."""
        s = self.eval_sets[dataloader_idx]
        for which, scales in self._scales.items():
            inputs = self._score_inputs(which, s.name, batch)
            for name, scale in scales.items():
                own = inputs if name == which else replace(inputs, logits=scale.logits(inputs.cosine))
                self._collected[name, s.name].update(index=batch["index"], **self._columns(own, batch["target"]))
                if (name, s.name) in self._classwise:
                    self._classwise[name, s.name].update(batch["index"], own.logits, batch["target"])

    def on_validation_epoch_end(self) -> None:
        """Gather the records of all processes, evaluate them, log the rows."""
        records: dict[str, dict[str, dict[str, Tensor]]] = {}
        for (name, dataset), collected in self._collected.items():
            columns = {key: column.cpu() for key, column in collected.compute().items()}
            records.setdefault(name, {})[dataset] = columns
        classwise: dict[str, dict[str, Tensor]] = {name: {} for name in records}
        for (name, dataset), metric in self._classwise.items():
            classwise[name][dataset] = metric.compute().cpu()
        for s in self.eval_sets:
            self._check_complete(s, records["model"][s.name])
        self.records, self.reference_records = records["model"], records.get("reference")
        self.tuned_records = records.get("tuned")
        if self.trainer.sanity_checking:
            return
        if self.trainer.world_size == 1:  # under DDP each process has only its share, which is not worth filing
            for features in (*self._features.values(), *self._patches.values()):
                features.keep()
        rows: dict[str, list[Row]] = {}
        for name, scale in self._scales["model"].items():
            rows[name] = classwise_rows(self.eval_sets, classwise[name], classwise.get("reference"))
            rows[name] += [
                row for e in self.evaluators for row in e.rows(self.eval_sets, records[name], self.reference_records)
            ]
            rows[name] += self._model_rows({"logit_scale": scale.scale, "logit_bias": scale.bias})
        self.rows, self.tuned_rows = rows["model"] + self._coverage_rows(), rows.get("tuned", [])
        self.log_dict(headline(self.rows), sync_dist=True)
        self.log_dict({f"lst/{name}": value for name, value in headline(self.tuned_rows).items()}, sync_dist=True)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end
    on_predict_epoch_start = on_validation_epoch_start

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """The record columns of one batch, ``index`` included, each ``[b]``."""
        inputs = self._score_inputs("model", self.eval_sets[dataloader_idx].name, batch)
        return {"index": batch["index"], **self._columns(inputs, batch["target"])}

    def _score_inputs(self, which: str, name: str, batch: dict[str, Any]) -> ScoreInputs:
        vlm, classifier = self._models[which], self._classifiers[which][name]
        index, image, local = batch["index"], batch["image"], None
        if len(index) == 0:  # none of the batch's images could be read
            features, patches = classifier[:0], classifier[:0, None]
        else:
            features = self._features[which, name].of(index, lambda: vlm.encode_image(image))
        if (which, name) in self._patches:
            if len(index):
                patches = self._patches[which, name].of(index, lambda: encode_patches(vlm, image))
            local = patches @ classifier.T
        cosine = features @ classifier.T
        pairs = self._pairs[which].images.to(cosine) if which in self._pairs else None
        logits = self._scales[which][which].logits(cosine)
        return ScoreInputs(cosine, logits, features, local, calibration_features=pairs)

    def _columns(self, inputs: ScoreInputs, target: Tensor) -> dict[str, Tensor]:
        columns = {"target": target, **per_sample(inputs.logits, target)}
        return columns | {score: fn(inputs) for score, fn in self.scores.items()}

    def _check_complete(self, s: EvalSet, records: dict[str, Tensor]) -> None:
        limits = (self.trainer.limit_val_batches, self.trainer.limit_test_batches)
        missing = len(s.images) - len(records["index"])
        if missing == 0 or limits != (1.0, 1.0) or self.trainer.sanity_checking:
            return
        if getattr(s.images, "on_bad_image", "error") == "skip" and missing > 0:
            if missing == len(s.images):
                raise VLMQError(f"none of the {missing} images of data set '{s.name}' can be read; repair the files")
            log.warning("%d of %d images of '%s' cannot be read and are left out", missing, len(s.images), s.name)
        else:
            raise VLMQError(
                f"data set '{s.name}' has {len(s.images)} samples, {len(records['index'])} were evaluated; "
                "leave sharding to the data module (trainer.use_distributed_sampler: false)"
            )

    def _coverage_rows(self) -> list[Row]:
        if self.coverage is None or self.scheme is None:
            return []
        shares = {
            "coverage_weights": self.coverage.weight_share(self.scheme.towers),
            "coverage_macs": self.coverage.mac_share(self.scheme.towers),
        }
        return self._model_rows(shares)

    def _model_rows(self, values: Mapping[str, float | None]) -> list[Row]:
        """Numbers about the model alone, filed with the in-distribution set."""
        inside = next(s for s in self.eval_sets if s.role == "id")
        return [Row(inside.name, "id", name, value, 0.0, 0) for name, value in values.items() if value is not None]
