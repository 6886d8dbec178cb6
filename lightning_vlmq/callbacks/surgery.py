"""Judges a quantized model with part of its error healed: the cheapest causal test, from the features of both models alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from lightning import Callback, Trainer
from torch.nn import functional as F

from lightning_vlmq.callbacks.activations import as_bands
from lightning_vlmq.data.sets import in_distribution
from lightning_vlmq.evaluation.judged import Records
from lightning_vlmq.evaluation.results import rows_by_variant
from lightning_vlmq.evaluation.rows import Row
from lightning_vlmq.spectral import PUBLISHED_BANDS, SecondMoments, Surgery
from lightning_vlmq.spectral.surgery import WHOLE

log = logging.getLogger(__name__)


class ErrorSurgery(Callback):
    """Every metric of every dimension, with the error of the image features healed or hurt in some ranks alone.

    Class features, logit scale and scores are full precision's, so that nothing but the image features' error is judged: with all of it
    healed the model is full precision, with all of it left (``whole``) it has the image tower's error alone, whatever else is quantized. A
    part's change is a share of that of ``whole``.

    Directions, gains and means are those of the in-distribution set; what is done there is done to every set, see
    :class:`~lightning_vlmq.spectral.Surgery`. Features are normalised anew, as the model does. The results writer files each as a run of
    its own, ``<run_id>.heal_0-8``, with ``surgery=heal 0-8`` in its variant, so that a study's report compares it like any other setting.

    Controls are passed over: surgery asks which part of a quantization's error does what. It needs all features in one process:
    under DDP, without a full-precision reference or on part of the data nothing is done, with a warning where that may
    surprise. Scores of patches (``gl_mcm``) cannot be had from features of whole images and are left out, which is said once.

    Args:
        bands: rank ranges, ``[first, end]`` each, the end null for all that follow.

    Attributes:
        surgeries: rows and records by what was done, of the last validation or test.

    Raises:
        VLMQError: a band that is none.
    """

    def __init__(self, bands: Sequence[Sequence[int | None]] = PUBLISHED_BANDS) -> None:
        self.bands = as_bands(bands)
        self.surgeries: dict[str, tuple[list[Row], Records]] = {}
        self._told: set[str] = set()

    def identity(self) -> dict[str, Any]:
        """What decides the rows of the surgeries, which are filed beside the run's own."""
        return {"bands": [list(band) for band in self.bands]}

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Operate and judge."""
        self.surgeries = {}
        judged, reference = pl_module.judged
        if trainer.sanity_checking or reference is None or pl_module.quant.chosen().is_control:
            return
        sets = pl_module.eval_sets
        features = {s.name: (reference.features(s), judged.features(s)) for s in sets}
        if trainer.world_size > 1 or any(part is None for both in features.values() for part in both):
            log.warning(
                "no error surgery: the features of all sets are not in this process (several processes, or part of the data)"
            )
            return
        inside = in_distribution(sets)
        full, quantized = features[inside.name]
        moments = SecondMoments(full.shape[1])
        moments.update(full, quantized)
        surgery = Surgery.learn(moments, self.bands)
        reference.own.gather()
        variants = {name: reference.variant(sets, pl_module.statistics) for name in surgery.names}
        self._tell_what_is_left_out(reference.own.scores, variants[WHOLE].scores)
        with torch.no_grad():
            for s in sets:
                target = reference.own.records[s.name]["target"]
                logits = reference.logits(s, features[s.name][0])
                for name, variant in variants.items():
                    operated = F.normalize(surgery.operate(name, *features[s.name]), dim=-1)
                    reference.record_features(variant, s, operated, target, logits)
        for variant in variants.values():
            variant.gather()
        # all together: what resampling costs is mostly the resamples, and full precision's are the same
        _, *rows = rows_by_variant(
            [reference.own, *variants.values()], sets, pl_module.evaluators, pl_module.statistics
        )
        self.surgeries = {name: (own, variants[name].records) for name, own in zip(variants, rows)}

    on_test_epoch_end = on_validation_epoch_end

    def _tell_what_is_left_out(self, all_scores: Sequence[str], scores: Sequence[str]) -> None:
        if left_out := sorted(set(all_scores) - set(scores) - self._told):
            log.warning("error surgery is not judged by %s: it needs features of patches", ", ".join(left_out))
            self._told |= set(left_out)
