"""Which ranks carry the accuracy of a quantized model and of full precision, measured in a run: the command line's way to ask."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from lightning import Callback, Trainer
from torch import Tensor

from lightning_vlmq.callbacks.activations import as_bands
from lightning_vlmq.callbacks.loggers import log_figure, takes_figures
from lightning_vlmq.callbacks.spectrum import CURVE_COLUMNS
from lightning_vlmq.core.errors import VLMQError, unknown
from lightning_vlmq.data.sets import EvalSet, in_distribution
from lightning_vlmq.evaluation.band_accuracy import BandAccuracy, measure_bands, measure_block_bands
from lightning_vlmq.plotting.bands import band_bars
from lightning_vlmq.quant.blocks import run_tower
from lightning_vlmq.spectral import CENTRES, PUBLISHED_BANDS, band_name

log = logging.getLogger(__name__)


class BandAccuracies(Callback):
    """Top-1 accuracy when a band of ranks is kept, dropped, or all up to it are kept.

    In every validation (but the sanity check) and test, on the first images of the in-distribution set, for both models, see
    :func:`~lightning_vlmq.evaluation.band_accuracy.measure_bands`::

        vlmq validate --config eval --config quant/gptq --trainer.callbacks+=BandAccuracies

    ``curves()`` holds, by site, kinds ``top1_<mode>_<basis>`` (around the mean) and ``top1_<mode>_<basis>_zero`` (around zero, as
    published) over the bands' first ranks, full precision's beside it where the basis is not the model's own. ``rows()`` holds the
    same as metrics ``<kind>_<band>``, full precision's ending in ``_full``; bands without energy have none. A figure per site,
    ``bands/<site>``, goes to the loggers. A model without a full-precision reference is passed over; so is, with a warning, a run of
    several processes.

    Args:
        n_images: images to look at.
        bands: rank ranges, ``[first, end]`` each, the end null for all that follow.
        has_blocks: whether to look after every block too, which runs the networks some forty times for each and each centre.
        seed: of the random subspaces of equal energy.
        centres: what is left of the other ranks, see :func:`~lightning_vlmq.spectral.own_band_accuracy`: ``mean``, ``zero``, or both.

    Attributes:
        found: the accuracies of the last validation or test.

    Raises:
        VLMQError: a band or centre that is none, or fewer than two images.
    """

    def __init__(
        self,
        n_images: int = 1000,
        bands: Sequence[Sequence[int | None]] = PUBLISHED_BANDS,
        has_blocks: bool = False,
        seed: int = 0,
        centres: Sequence[str] = CENTRES,
    ) -> None:
        if n_images < 2:
            raise VLMQError(f"n_images must be at least 2, got {n_images}")
        self.n_images, self.has_blocks, self.seed = n_images, has_blocks, seed
        self.bands, self.centres = as_bands(bands), tuple(dict.fromkeys(centres))
        for around in self.centres:
            if around not in CENTRES:
                raise unknown("centre", around, CENTRES)
        self.found: list[BandAccuracy] = []
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []

    def identity(self) -> dict[str, Any]:
        """What decides the rows and curves."""
        bands = [list(band) for band in self.bands]
        about = {"n_images": self.n_images, "bands": bands, "has_blocks": self.has_blocks, "seed": self.seed}
        return about | {"centres": self.centres}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begin anew."""
        self.found, self._batches = [], []
        self._inside: EvalSet | None = None
        if trainer.sanity_checking or getattr(pl_module, "reference", None) is None:
            return
        if trainer.world_size > 1:
            log.warning("no band accuracies: the images are spread over several processes; use one")
            return
        self._inside = in_distribution(pl_module.eval_sets)

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the batch's images while there are not enough."""
        left = self.n_images - sum(len(target) for _, target, _ in self._batches)
        if self._inside is not None and pl_module.eval_sets[dataloader_idx] is self._inside and left > 0:
            self._batches.append((batch["image"][:left], batch["target"][:left], batch["index"][:left]))

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Measure and draw."""
        kept = [part for part in self._batches if len(part[1])]
        self._batches = []
        if not kept:
            return
        judged, reference = pl_module.judged
        inside = in_distribution(pl_module.eval_sets)
        images, target = [part[0] for part in kept], torch.cat([part[1] for part in kept])
        index = torch.cat([part[2] for part in kept]).cpu()
        classifiers = reference.classifier(inside), judged.classifier(inside)
        models = pl_module.reference, pl_module.vlm
        features = [one.features(inside) for one in (reference, judged)]
        full, quantized = (
            whole[index] if whole is not None else torch.cat([run_tower(model, "vision", x) for x in images])
            for whole, model in zip(features, models)
        )
        how: dict[str, Any] = {"bands": self.bands, "seed": self.seed, "centres": self.centres}
        self.found = measure_bands((full, quantized), target, classifiers, **how)
        if self.has_blocks:
            self.found = measure_block_bands(*models, images, target, classifiers, **how) + self.found
        if takes_figures(trainer):
            for site in dict.fromkeys(one.site for one in self.found):
                own = [one for one in self.found if one.site == site]
                log_figure(trainer, f"bands/{site.replace('/', '_').replace(' ', '_')}", band_bars(own))

    on_test_epoch_end = on_validation_epoch_end

    def curves(self) -> pd.DataFrame:
        """Points by kind and site, columns as in the results store's curves; see the class."""
        first = {band_name(band): band[0] for band in self.bands}
        quantized = [one for one in self.found if one.model == "quantized"]
        full = {(o.site, o.kind, o.band): o.top1 for o in self.found if o.model == "full"}
        rows = [
            (
                one.kind,
                one.site,
                one.site.split("/")[0],
                first[one.band],
                one.top1,
                full.get((one.site, one.kind, one.band), float("nan")),
            )
            for one in quantized
        ]
        return pd.DataFrame(rows, columns=list(CURVE_COLUMNS))

    def rows(self) -> dict[str, dict[str, float]]:
        """Scalars by site; see the class."""
        found: dict[str, dict[str, float]] = {}
        for one in (one for one in self.found if not math.isnan(one.top1)):
            ending = "_full" if one.model == "full" else ""
            found.setdefault(one.site, {})[f"{one.kind}_{one.band}{ending}"] = one.top1
        return found
