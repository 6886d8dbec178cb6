"""One model under judgement: its features, classifiers, logit scales, and the records that batch after batch adds to them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lightning_vlmq.core.roles import ROLES
from lightning_vlmq.data.datamodule import ReliabilityDataModule
from lightning_vlmq.data.sets import EvalSet
from lightning_vlmq.evaluation.classifiers import zero_shot_classifiers
from lightning_vlmq.evaluation.classwise import Gaps
from lightning_vlmq.evaluation.features import FeatureCache
from lightning_vlmq.evaluation.set_features import SetFeatures
from lightning_vlmq.evaluation.tuning import encode_pairs, own_logit_scale, tune_logit_scale
from lightning_vlmq.metrics import (
    OOD_SCORES,
    RECORD_COLUMNS,
    ClasswiseGaps,
    LogitScale,
    OODScore,
    SampleRecords,
    ScoreInputs,
    kl_divergence,
    per_sample,
)
from lightning_vlmq.models import VLM, require_finite
from lightning_vlmq.models.local import encode_patches
from lightning_vlmq.quant.fake_quant import unused_steps
from lightning_vlmq.statistics import Statistics

log = logging.getLogger(__name__)

Records = dict[str, dict[str, Tensor]]
"""Columns of :class:`~lightning_vlmq.metrics.SampleRecords` by data set, on the CPU."""


class Variant:
    """A model with one of its logit scales, and what was recorded of it: to statistics, a run of its own.

    Args:
        scale: the logit scale (and bias).
        scores: names of the scores to record, of sets whose role is scored.
        classes: number of classes by set.
        sets: the evaluation sets.
        settings: bins and groups of class-wise errors.
        device: where batches are.
        pairs_nll: NLL of held-out calibration pairs under this scale, where it was tuned.
    """

    def __init__(
        self,
        scale: LogitScale,
        scores: Sequence[str],
        classes: Mapping[str, int],
        sets: Sequence[EvalSet],
        settings: Statistics,
        device: torch.device,
        pairs_nll: float | None = None,
    ) -> None:
        self.scale, self.pairs_nll, self.scores = scale, pairs_nll, tuple(scores)
        columns = {name: dtype for name, dtype in RECORD_COLUMNS.items() if name not in OOD_SCORES}
        scored = columns | dict.fromkeys(scores, torch.float32)
        self._collected = {
            s.name: SampleRecords(scored if ROLES[s.role].is_scored else columns).to(device) for s in sets
        }
        self._gaps = {
            s.name: ClasswiseGaps(classes[s.name], settings.n_bins, settings.n_groups).to(device)
            for s in sets
            if ROLES[s.role].is_classwise
        }
        self.records: Records = {}
        self.gaps: dict[str, Gaps] = {}

    def update(self, s: EvalSet, index: Tensor, logits: Tensor, target: Tensor, columns: Mapping[str, Tensor]) -> None:
        """Add a batch of one set."""
        self._collected[s.name].update(index=index, **columns)
        if s.name in self._gaps:
            self._gaps[s.name].update(index, logits, target)

    def gather(self) -> None:
        """Fill ``records`` and ``gaps`` with what all processes saw."""
        self.records = {
            name: {key: column.cpu() for key, column in found.compute().items()}
            for name, found in self._collected.items()
        }
        self.gaps = {
            name: {key: sums.cpu() for key, sums in gaps.compute().items()} for name, gaps in self._gaps.items()
        }


class Judged:
    """A VLM on a data module's sets.

    Args:
        vlm: the model, on the device to run on.
        data: the data module, set up.
        cache: where features are kept.
        towers: digest of each tower, see :func:`~.digests.tower_digest`.
        scores: OOD scores to record, by the name that results have, of sets whose role is scored.
        settings: the statistics' settings.
        tunes: whether it is also judged with its logit scale fitted on the caption pairs.

    Attributes:
        own: with the scale that it came with.
        tuned: with the tuned one, or ``None``.

    Raises:
        VLMQError: pairs are needed, and there are none; a weight is not finite or has exploded.
    """

    def __init__(
        self,
        vlm: VLM,
        data: ReliabilityDataModule,
        cache: FeatureCache,
        towers: Mapping[str, str],
        scores: Mapping[str, OODScore],
        settings: Statistics,
        tunes: bool = False,
    ) -> None:
        require_finite(vlm, unused_steps(vlm))
        self._cache = cache
        self.vlm, self._scores = vlm.eval(), dict(scores)
        needs = frozenset().union(*(score.needs for score in scores.values()))
        with torch.no_grad():
            self._classifiers = zero_shot_classifiers(vlm, data, cache, towers["text"])
        vision, sets = towers["vision"], data.eval_sets
        self._features = {s.name: SetFeatures(cache, vision, s) for s in sets}
        scored = [s for s in sets if ROLES[s.role].is_scored and "local_cosine" in needs]
        self._patches = {s.name: SetFeatures(cache, vision, s, "patches") for s in scored}
        pairs = encode_pairs(vlm, data, cache, towers) if tunes or "calibration_features" in needs else None
        self._pairs = pairs.images if pairs is not None and "calibration_features" in needs else None
        classes = {name: len(classifier) for name, classifier in self._classifiers.items()}
        about = (list(scores), classes, sets, settings, vlm.mean.device)
        self.own = Variant(own_logit_scale(vlm), *about)
        self.tuned: Variant | None = None
        if tunes and pairs is not None:
            found = tune_logit_scale(vlm, pairs)
            self.own.pairs_nll = found.nll_before
            self.tuned = Variant(found.scale, *about, found.nll_after)

    @property
    def variants(self) -> list[Variant]:
        """As it came, and tuned if it is."""
        return [self.own] if self.tuned is None else [self.own, self.tuned]

    def record(self, s: EvalSet, batch: Mapping[str, Any], reference: Tensor | None = None) -> ScoreInputs:
        """Add a batch.

        Args:
            s: the set that it is of.
            batch: ``image`` uint8 ``[b, 3, h, w]``, ``target`` and ``index`` int64 ``[b]``.
            reference: full precision's logits ``[b, C]`` of the same batch, which this returns there; ``None`` where this is it.

        Returns:
            What scores see of it: its features, and logits ``[b, C]`` with the scale that the model came with, among them.
        """
        inputs = self._inputs(s, batch)
        full = inputs.logits if reference is None else reference
        known: dict[str, Tensor] = {}
        for variant in self.variants:
            own = inputs if variant is self.own else replace(inputs, logits=variant.scale.logits(inputs.cosine))
            columns = self._columns(s, variant, own, batch["target"], known) | {"kl": kl_divergence(full, own.logits)}
            known = {name: columns[name] for name in _scores_of(variant, s) if "logits" not in self._scores[name].needs}
            variant.update(s, batch["index"], own.logits, batch["target"], columns)
        return inputs

    def columns(self, s: EvalSet, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The record columns of one batch that follow from this model alone (all but ``kl``), each ``[b]``."""
        return self._columns(s, self.own, self._inputs(s, batch), batch["target"])

    def features(self, s: EvalSet) -> Tensor | None:
        """Image features ``[n, dim]`` of a whole set, where this process has them; see :meth:`~.set_features.SetFeatures.whole`."""
        return self._features[s.name].whole()

    def classifier(self, s: EvalSet) -> Tensor:
        """Unit-norm class features ``[classes, dim]`` that a set is judged with."""
        return self._classifiers[s.name]

    def variant(self, sets: Sequence[EvalSet], settings: Statistics) -> Variant:
        """One more variant with the model's own scale, to be filled by :meth:`record_features`; without scores of patches."""
        classes = {name: len(classifier) for name, classifier in self._classifiers.items()}
        scores = [name for name, score in self._scores.items() if "local_cosine" not in score.needs]
        return Variant(self.own.scale, scores, classes, sets, settings, self.vlm.mean.device)

    def logits(self, s: EvalSet, features: Tensor) -> Tensor:
        """Logits ``[n, C]`` of unit-norm image features ``[n, dim]`` for a set's classes, with the model's own scale."""
        classifier = self._classifiers[s.name]
        return self.own.scale.logits(features.to(classifier) @ classifier.T)

    def record_features(
        self, variant: Variant, s: EvalSet, features: Tensor, target: Tensor, reference: Tensor
    ) -> None:
        """Add a whole set to a variant, from other image features than the model's.

        Args:
            variant: from :meth:`variant`.
            s: the set.
            features: unit-norm ``[n, dim]`` in sample order.
            target: int64 ``[n]``.
            reference: full precision's logits ``[n, C]``, see :meth:`logits`.
        """
        classifier = self._classifiers[s.name]
        features, target = features.to(classifier), target.to(classifier.device)
        cosine = features @ classifier.T
        pairs = None if self._pairs is None else self._pairs.to(cosine)
        inputs = ScoreInputs(cosine, variant.scale.logits(cosine), features, None, calibration_features=pairs)
        index = torch.arange(len(features), device=classifier.device)
        columns = self._columns(s, variant, inputs, target) | {"kl": kl_divergence(reference, inputs.logits)}
        variant.update(s, index, inputs.logits, target, columns)

    def gather(self) -> None:
        """Fill the variants' records with what all processes saw."""
        for variant in self.variants:
            variant.gather()

    def keep_features(self) -> None:
        """File what the cache did not know."""
        for features in (*self._features.values(), *self._patches.values()):
            features.keep()

    def share_features(self, process: int, processes: int, barrier: Callable[[], object]) -> None:
        """As :meth:`keep_features`, of several processes: each puts its share by, and the first joins them.

        Args:
            process: which of them this one is.
            processes: how many there are.
            barrier: returns when all have called it.
        """
        if self._cache.folder is None:
            return
        collected = (*self._features.values(), *self._patches.values())
        for features in collected:
            features.put_part(process)
        barrier()
        lost = [features.set.name for features in collected if process == 0 and not features.merge(processes)]
        if lost:
            log.warning(
                "features of %s are not kept: '%s' lacks some processes' parts of them; it has to be a folder that all share",
                *(", ".join(dict.fromkeys(lost)), self._cache.folder),
            )
        barrier()
        for features in collected:
            features.drop_part(process)

    def _columns(
        self,
        s: EvalSet,
        variant: Variant,
        inputs: ScoreInputs,
        target: Tensor,
        known: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> dict[str, Tensor]:
        """The columns of a variant's batch; ``known`` are scores that another logit scale leaves as they are."""
        columns = {"target": target, **per_sample(inputs.logits, target)}
        fresh = [name for name in _scores_of(variant, s) if name not in known]
        return columns | {name: self._scores[name](inputs) for name in fresh} | dict(known)

    def _inputs(self, s: EvalSet, batch: Mapping[str, Any]) -> ScoreInputs:
        classifier, image, local = self._classifiers[s.name], batch["image"], None
        rows = batch["rows"] if "rows" in batch else batch["index"].cpu().numpy()
        place = (rows, classifier.device)
        if len(rows) == 0:  # none of the batch's images could be read
            features, patches = classifier[:0], classifier[:0, None]
        else:
            features = self._features[s.name].of(*place, lambda: self.vlm.encode_image(image))
        if s.name in self._patches:
            if len(rows):
                patches = self._patches[s.name].of(*place, lambda: encode_patches(self.vlm, image))
            local = patches @ classifier.T
        cosine = features @ classifier.T
        pairs = None if self._pairs is None else self._pairs.to(cosine)
        return ScoreInputs(cosine, self.own.scale.logits(cosine), features, local, calibration_features=pairs)


def _scores_of(variant: Variant, s: EvalSet) -> Sequence[str]:
    """Names of the scores that are recorded of a set."""
    return variant.scores if ROLES[s.role].is_scored else ()
