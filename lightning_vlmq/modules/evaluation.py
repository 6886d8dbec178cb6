"""Evaluation of one model, full precision or quantized, on every reliability dimension."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from lightning_vlmq.data.datamodule import EvalSet, ReliabilityDataModule
from lightning_vlmq.errors import VLMQError, unknown
from lightning_vlmq.metrics import OOD_SCORES, RECORD_COLUMNS, SampleRecords, ScoreInputs, per_sample
from lightning_vlmq.models import VLM, load_vlm
from lightning_vlmq.modules.evaluators import Evaluator, Row, default_evaluators, headline
from lightning_vlmq.modules.features import FeatureCache, tower_digest
from lightning_vlmq.quant import METHODS, CoverageReport, QuantScheme, load_quantized, quantize
from lightning_vlmq.store import FULL_PRECISION, RunKey


@dataclass(frozen=True)
class Quantization(QuantScheme):
    """How to quantize: a method, and a point of the grid (the scheme's fields).

    Attributes:
        method: a name of the methods' table, or ``fp32`` for the model as it is, whatever the scheme says.
        minimum_coverage: smallest share of the scope's matrix weights that has to be quantized.

    Raises:
        VLMQError: for an unknown method, or a value outside what :class:`~lightning_vlmq.quant.QuantScheme` takes.
    """

    method: str = FULL_PRECISION
    minimum_coverage: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method != FULL_PRECISION and self.method not in METHODS:
            raise unknown("method", self.method, [FULL_PRECISION, *METHODS])

    def scheme(self) -> QuantScheme | None:
        """The scheme alone, or ``None`` for full precision."""
        if self.method == FULL_PRECISION:
            return None
        return QuantScheme(**{f.name: getattr(self, f.name) for f in fields(QuantScheme)})


AS_IT_IS = Quantization()


class EvaluationModule(LightningModule):
    """Validates a VLM beside its full-precision reference.

    ``validate`` and ``test`` gather per-sample records of both models (``records``, ``reference_records``: data set name to columns) and
    turn them into result rows (``rows``), logged as ``<data set>/<score>/<metric>``, and into
    headline numbers (``<role>/<metric>``, for other callbacks to monitor); ``predict`` returns the columns of each batch.

    Args:
        vlm: a zoo model's or open_clip architecture's name.
        pretrained: an open_clip weights tag or a checkpoint file.
        quant: method and scheme; calibration runs in ``setup`` on the data module's caption pairs.
        checkpoint: folder of a saved quantized model, taken instead of quantizing afresh; ``quant`` is then read from it.
        scores: OOD scores to record.
        evaluators: what to make of the records; all dimensions by default.
        cache: folder for image features, shared by runs; ``None`` keeps none.

    Raises:
        VLMQError: unknown names, values out of range, damaged checkpoints, coverage below ``quant.minimum_coverage``.
    """

    def __init__(
        self,
        vlm: str,
        pretrained: str | None = None,
        quant: Quantization = AS_IT_IS,
        checkpoint: str | None = None,
        scores: Sequence[str] = ("mcm", "energy"),
        evaluators: list[Evaluator] | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["evaluators"])
        self.quant = quant
        self.scheme = self.quant.scheme()
        self.scores = {name: OOD_SCORES[name] for name in scores}
        self.evaluators = default_evaluators() if evaluators is None else evaluators
        self.cache = FeatureCache(cache)
        self.checkpoint = checkpoint
        self.vlm: VLM = load_vlm(vlm, pretrained)
        self.reference: VLM | None = None
        self.coverage: CoverageReport | None = None
        self._prepared = False
        self.rows: list[Row] = []
        self.records: dict[str, dict[str, Tensor]] = {}
        self.reference_records: dict[str, dict[str, Tensor]] | None = None

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
                f"{self.quant.method} is trained: run 'vlmq fit' with configs/qat.yaml first, or give its result by --model.checkpoint"
            )
        batches = [
            {"image": b["image"].to(device), "tokens": self.vlm.tokenize(b["caption"]).to(device)}
            for b in self.data.calibration_batches()
        ]
        self.coverage = quantize(self.vlm, self.quant.method, self.scheme, batches, self.quant.minimum_coverage)

    # validation, test and prediction -------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Build both zero-shot classifiers and see which features are known already."""
        self._models = {"model": self.vlm} | ({} if self.reference is None else {"reference": self.reference})
        columns = {name: dtype for name, dtype in RECORD_COLUMNS.items() if name not in OOD_SCORES}
        columns |= dict.fromkeys(self.scores, torch.float32)
        self._classifiers: dict[str, Tensor] = {}
        self._digests: dict[str, str] = {}
        self._known: dict[tuple[str, str], Tensor | None] = {}
        self._fresh: dict[tuple[str, str], list[Tensor]] = {}
        self._collected: dict[tuple[str, str], SampleRecords] = {}
        for which, vlm in self._models.items():
            vlm.eval()
            with torch.no_grad():
                self._classifiers[which] = vlm.class_features(self.data.class_names, self.data.templates)
            scheme, method = (
                (self.scheme, self.quant.method) if which == "model" and self.scheme else (None, FULL_PRECISION)
            )
            self._digests[which] = tower_digest(vlm, scheme, method)
            for s in self.eval_sets:
                key = which, s.name
                self._known[key] = self.cache.get(self._digests[which], s.digest)
                self._fresh[key] = []
                self._collected[key] = SampleRecords(columns).to(self.device)

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Record one batch of ``image`` uint8 ``[b, 3, h, w]``, ``target`` and ``index`` int64 ``[b]`` for both models."""
        name = self.eval_sets[dataloader_idx].name
        for which in self._models:
            columns = self._columns(which, name, batch)
            self._collected[which, name].update(index=batch["index"], **columns)

    def on_validation_epoch_end(self) -> None:
        """Gather the records of all processes, evaluate them, log the rows."""
        records: dict[str, dict[str, dict[str, Tensor]]] = {which: {} for which in self._models}
        for s in self.eval_sets:
            for which in self._models:
                columns = self._collected[which, s.name].compute()
                records[which][s.name] = {name: column.cpu() for name, column in columns.items()}
            self._check_complete(s, records["model"][s.name])
        self.records, self.reference_records = records["model"], records.get("reference")
        if self.trainer.sanity_checking:
            return
        self._keep_features()
        self.rows = [
            row for e in self.evaluators for row in e.rows(self.eval_sets, self.records, self.reference_records)
        ] + self._coverage_rows()
        everything = {"/".join(filter(None, (row.dataset, row.score, row.metric))): row.value for row in self.rows}
        for logger in self.loggers:
            logger.log_metrics(everything, self.global_step)
        self.log_dict(headline(self.rows), sync_dist=True)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end
    on_predict_epoch_start = on_validation_epoch_start

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """The record columns of one batch, ``index`` included, each ``[b]``."""
        return {"index": batch["index"], **self._columns("model", self.eval_sets[dataloader_idx].name, batch)}

    def _columns(self, which: str, name: str, batch: dict[str, Any]) -> dict[str, Tensor]:
        vlm, known = self._models[which], self._known[which, name]
        if known is not None:
            features = known[batch["index"].cpu()].to(self.device)
        else:
            features = vlm.encode_image(batch["image"])
            self._fresh[which, name].append(features.cpu())
        cosine = features @ self._classifiers[which].T
        logits = vlm.logit_scale() * cosine + vlm.logit_bias()
        inputs = ScoreInputs(cosine, logits, features)
        columns = {"target": batch["target"], **per_sample(logits, batch["target"])}
        return columns | {score: fn(inputs) for score, fn in self.scores.items()}

    def _check_complete(self, s: EvalSet, records: dict[str, Tensor]) -> None:
        limits = (self.trainer.limit_val_batches, self.trainer.limit_test_batches)
        if len(records["index"]) != len(s.images) and limits == (1.0, 1.0) and not self.trainer.sanity_checking:
            raise VLMQError(
                f"data set '{s.name}' has {len(s.images)} samples, {len(records['index'])} were evaluated; "
                "leave sharding to the data module (trainer.use_distributed_sampler: false)"
            )

    def _keep_features(self) -> None:
        """File features of this process if it saw whole sets; under DDP each process has only its share, which is not worth filing."""
        if self.trainer.world_size > 1:
            return
        for (which, name), batches in self._fresh.items():
            s = next(s for s in self.eval_sets if s.name == name)
            if sum(map(len, batches)) == len(s.images):
                self.cache.put(self._digests[which], s.digest, torch.cat(batches))

    def _coverage_rows(self) -> list[Row]:
        if self.coverage is None or self.scheme is None:
            return []
        inside = next(s for s in self.eval_sets if s.role == "id")
        shares = {
            "coverage_weights": self.coverage.weight_share(self.scheme.towers),
            "coverage_macs": self.coverage.mac_share(self.scheme.towers),
        }
        return [Row(inside.name, "id", metric, value, 0.0, 0) for metric, value in shares.items()]
