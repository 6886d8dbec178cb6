"""Watches what quantization does to the activations after every block: signal, noise and damping per rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning import Callback, Trainer

from lightning_vlmq.callbacks.loggers import log_figure, takes_figures
from lightning_vlmq.callbacks.sharing import dealt_out
from lightning_vlmq.callbacks.spectrum import CURVE_COLUMNS
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.identity import tensors_digest
from lightning_vlmq.data.sets import in_distribution
from lightning_vlmq.evaluation.digests import SPECTRA
from lightning_vlmq.evaluation.features import FeatureCache
from lightning_vlmq.plotting.activations import rank_curves, rank_maps
from lightning_vlmq.quant.blocks import BlockWatcher, KeptActivations
from lightning_vlmq.spectral import (
    PUBLISHED_BANDS,
    Band,
    RadialSpectrum,
    RankTable,
    SecondMoments,
    alpha_req,
    band_name,
    effective_rank,
    eigenbasis,
    participation_ratio,
    power_law_tail,
    principal_angles,
    rank_table,
    rankme,
)

LEADING = 8
"""Directions of the leading subspaces whose angles are reported."""


class ActivationSpectrum(Callback):
    """Gain, SQNR and noise per rank after every block of a quantized model, beside full precision on the same images.

    In every validation (but the sanity check) and test, the first images of the in-distribution set go through both models,
    and the text prompts of its classes where the text tower is quantized. Only second moments are kept. Under DDP every
    process takes its share of the images, the sums are added up, and each decomposes its share of the sites.

    ``curves()`` holds, by site, kinds ``sqnr_db``, ``gain`` (with its standard error as kind ``gain_stderr``),
    ``eigenvalues`` (quantized beside full precision) over rank and ``fourier_power`` over frequency in cycles per patch;
    ``rows()`` holds scalars. Figures ``activations/curves_<tower>`` and ``activations/map_<tower>`` go to the loggers.
    A model without a full-precision reference is passed over.

    Full precision's side is computed once: its activations are kept in memory from one validation of a fit to the next where they take
    no more than :data:`~lightning_vlmq.quant.blocks.KEPT_BYTES`, its eigenvectors and what is told of its spectrum beside the features, by
    content, for every run on the same images.

    Args:
        n_images: images (and prompts) to look at.
        bands: rank ranges whose pooled gain, SQNR and filter share are among the scalars.

    Raises:
        VLMQError: if there is nothing to look at, or a band is empty.
    """

    def __init__(self, n_images: int = 256, bands: Sequence[Sequence[int | None]] = PUBLISHED_BANDS) -> None:
        if n_images < 2:
            raise VLMQError(f"n_images must be at least 2, got {n_images}")
        self.n_images = n_images
        self.bands = as_bands(bands)
        self._watchers: dict[str, BlockWatcher] = {}
        self._full: dict[str, KeptActivations] = {}
        self._found: dict[str, SiteSpectra] = {}
        self._reference: Any = None
        self._images = 0

    def identity(self) -> dict[str, Any]:
        """What decides the rows and curves."""
        return {"n_images": self.n_images, "bands": [list(band) for band in self.bands]}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begin anew."""
        self._watchers, self._images, self._found = {}, 0, {}
        reference = getattr(pl_module, "reference", None)
        if trainer.sanity_checking or reference is None:
            return
        if reference is not self._reference:
            self._full, self._reference = {}, reference
        self._inside = in_distribution(pl_module.eval_sets)
        self._watchers = {
            tower: BlockWatcher(reference, pl_module.vlm, tower, full=self._full.setdefault(tower, KeptActivations()))
            for tower in pl_module.scheme.towers
        }

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
        """Look at the batch's images while there are not enough."""
        share = -(-self.n_images // trainer.world_size)
        if "vision" in self._watchers and pl_module.eval_sets[dataloader_idx] is self._inside and self._images < share:
            images = batch["image"][: share - self._images]
            self._watchers["vision"].update(images)
            self._images += len(images)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Look at the prompts, add up over processes, draw."""
        if not self._watchers:
            return
        if "text" in self._watchers:
            self._watchers["text"].update(self._prompts(trainer, pl_module))
        for watcher in self._watchers.values():
            watcher.synchronise()
        moments = {site: own for watcher in self._watchers.values() for site, own in watcher.moments.items()}
        self._found = shared_site_spectra(moments, getattr(pl_module, "cache", FeatureCache(None)))
        if trainer.is_global_zero and takes_figures(trainer):
            tables = self.tables()
            for tower in self._watchers:
                own = {site: table for site, table in tables.items() if site.startswith(f"{tower}/")}
                title = f"activations of the {tower} tower, step {trainer.global_step}"
                log_figure(trainer, f"activations/curves_{tower}", rank_curves(own, title))
                log_figure(trainer, f"activations/map_{tower}", rank_maps(own, title))

    on_test_epoch_end = on_validation_epoch_end

    def _prompts(self, trainer: Trainer, pl_module: Any) -> torch.Tensor:
        names = self._inside.class_names or pl_module.data.class_names
        templates = self._inside.templates or pl_module.data.templates
        prompts = [template.format(name) for template in templates for name in names][: self.n_images]
        own = prompts[trainer.global_rank :: trainer.world_size] or prompts[:1]
        return pl_module.vlm.tokenize(own)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Let full precision's activations go: no further validation sees them."""
        self._full = {}

    def tables(self) -> dict[str, RankTable]:
        """The table of ranks of every site, around the mean; empty for a model without a reference."""
        return {site: found.table for site, found in self._found.items()}

    def _fourier(self) -> dict[str, tuple[RadialSpectrum, RadialSpectrum]]:
        return {s: both for watcher in self._watchers.values() for s, both in watcher.fourier_spectra().items()}

    def curves(self) -> pd.DataFrame:
        """Points by kind and site, columns as in the results store's curves; see the class."""
        parts: list[pd.DataFrame] = []

        def add(kind: str, site: str, x: Any, y: Any, reference: Any = np.nan) -> None:
            columns = (kind, site, site.split("/")[0], x, y, reference)
            parts.append(pd.DataFrame(dict(zip(CURVE_COLUMNS, columns, strict=True))))

        for site, found in self._found.items():
            table = found.table
            rank = np.arange(1, len(table) + 1)
            for kind in ("sqnr_db", "gain", "gain_stderr"):
                add(kind, site, rank, getattr(table, kind).cpu().numpy())
            own = found.eigenvalues.cpu().numpy()
            add("eigenvalues", site, rank, own[: len(table)], table.energy.cpu().numpy())
        for site, (full, quantized) in self._fourier().items():
            add("fourier_power", site, full.frequency.numpy(), quantized.power.numpy(), full.power.numpy())
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(CURVE_COLUMNS))

    def rows(self) -> dict[str, dict[str, float]]:
        """Scalars by site.

        ``mean_sqnr_db``, ``noise_colour``; ``sqnr_db_<band>``, ``gain_<band>``, ``gain_stderr_<band>`` and
        ``filter_share_<band>``; of the quantized activations (and, ending in ``_full``, of full precision's)
        ``participation_ratio``, ``effective_rank_singular``, ``effective_rank_eigen``, ``rankme`` (around the mean),
        ``alpha_req``, ``power_law_exponent``, ``power_law_stderr``; ``leading_angle``, the largest angle in degrees between
        the two models' subspaces of the 8 leading directions; ``low_frequency_share`` of power below a quarter cycle per
        patch, where rows lie on a grid.
        """
        found: dict[str, dict[str, float]] = {}
        for site, spectra in self._found.items():
            table = spectra.table
            scalars = {"mean_sqnr_db": table.mean_sqnr_db, "noise_colour": table.colour}
            for band in self.bands:
                for metric, value in zip(("sqnr_db", "gain", "gain_stderr", "filter_share"), table.pooled(*band)):
                    scalars[f"{metric}_{band_name(band)}"] = value
            for ending, dimensions in (("_full", spectra.full_dimensions), ("", spectra.dimensions)):
                scalars |= {f"{name}{ending}": value for name, value in dimensions.items()}
            found[site] = scalars | {"leading_angle": spectra.leading_angle}
        for site, both in self._fourier().items():
            for ending, spectrum in zip(("_full", ""), both):
                low = float(spectrum.power[spectrum.frequency < 0.25].sum())
                found[site][f"low_frequency_share{ending}"] = low / float(spectrum.power.sum())
        return found


@dataclass(frozen=True, eq=False)
class SiteSpectra:
    """What is told of one site, on the CPU.

    Attributes:
        table: by rank, around the mean.
        eigenvalues: float64 ``[d]``, of the quantized activations.
        leading_angle: in degrees, see :meth:`ActivationSpectrum.rows`.
        dimensions: of the quantized activations' spectrum, by name.
        full_dimensions: of full precision's.
    """

    table: RankTable
    eigenvalues: torch.Tensor
    leading_angle: float
    dimensions: dict[str, float]
    full_dimensions: dict[str, float]

    @classmethod
    def of(cls, moments: SecondMoments, cache: FeatureCache) -> SiteSpectra:
        """From the moments of a site; full precision's side from the cache where it has been there."""
        zz = moments.matrices()[0]
        full_dimensions, basis = _full_side(zz, cache)
        values, vectors = eigenbasis(moments.quantized())
        k = min(LEADING, moments.dim)
        angle = math.degrees(float(principal_angles(basis[:, :k], vectors[:, :k])[0]))
        table = rank_table(moments, basis=basis).on_cpu()
        return cls(table, values.cpu(), angle, _dimensions(values), full_dimensions)


def shared_site_spectra(moments: Mapping[str, SecondMoments], cache: FeatureCache) -> dict[str, SiteSpectra]:
    """What is told of every site, each process of the default group decomposing its share of them.

    Args:
        moments: by site, those of all processes.
        cache: where full precision's side is kept.
    """
    sizes = {site: own.dim**3 for site, own in moments.items()}
    return dealt_out(sizes, lambda sites: {site: SiteSpectra.of(moments[site], cache) for site in sites})


def _full_side(moment: torch.Tensor, cache: FeatureCache) -> tuple[dict[str, float], torch.Tensor]:
    """Dimensions and eigenvectors of full precision's second moment, kept under its digest."""
    digest = tensors_digest({"moment": moment})
    kept = cache.get(digest, f"{SPECTRA}activations", len(moment) + 1)
    if kept is not None:
        eigenvalues, vectors = kept[0], kept[1:]
    else:
        eigenvalues, vectors = eigenbasis(moment)
        cache.put(digest, f"{SPECTRA}activations", torch.cat([eigenvalues[None], vectors]))
    return _dimensions(eigenvalues), vectors.to(moment)


def _dimensions(eigenvalues: torch.Tensor) -> dict[str, float]:
    singular = eigenvalues.sqrt()
    tail = power_law_tail(eigenvalues)
    return {
        "participation_ratio": participation_ratio(eigenvalues),
        "effective_rank_singular": effective_rank(singular),
        "effective_rank_eigen": effective_rank(eigenvalues),
        "rankme": rankme(singular),
        "alpha_req": alpha_req(eigenvalues),
        "power_law_exponent": tail.exponent,
        "power_law_stderr": tail.stderr,
    }


def as_bands(bands: Sequence[Sequence[int | None]]) -> tuple[Band, ...]:
    """Rank ranges from a config, where they are lists ``[first, end]``. Raises :class:`VLMQError` for what is none."""
    made: list[Band] = []
    for band in bands:
        if len(band) != 2 or band[0] is None:
            raise VLMQError(f"a band is [first rank, end], the end null for all that follow; got {list(band)}")
        made.append((band[0], band[1]))
        band_name(made[-1])
    if not made:
        raise VLMQError("give at least one band, e.g. [[0, 8], [8, 64], [64, null]]")
    return tuple(made)
