"""Which ranks carry a model's accuracy: at its output and after every block, on full precision's basis and on its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_vlmq.models import VLM
from lightning_vlmq.quant.blocks import OUTPUTS, BlockWatcher, block_sites, features_with, is_rotated, run_tower
from lightning_vlmq.spectral import (
    CENTRES,
    MODES,
    PUBLISHED_BANDS,
    Band,
    SecondMoments,
    band_directions,
    band_name,
    eigenbasis,
    holds_energy,
    project,
    random_subspace,
)
from lightning_vlmq.statistics.resamples import seeded_generator


@dataclass(frozen=True)
class BandAccuracy:
    """One accuracy.

    Attributes:
        site: ``vision/output`` or ``vision/block 3``.
        around: what is left of the other ranks, one of :data:`~lightning_vlmq.spectral.CENTRES`.
        basis: ``full`` (full precision's directions), ``own`` (the quantized model's), or ``random`` (the control: a
            random subspace with the energy of the band on the model's own basis).
        mode: what became of the band, one of :data:`~lightning_vlmq.spectral.MODES`.
        band: the band's name.
        model: whose accuracy: ``full`` or ``quantized``.
        top1: fraction in [0, 1]; NaN for a band in which the model has no energy, as beyond its rank.
        n: images.
    """

    site: str
    around: str
    basis: str
    mode: str
    band: str
    model: str
    top1: float
    n: int

    @property
    def kind(self) -> str:
        """What rows and curves call it, e.g. ``top1_keep_full``, ``top1_keep_full_zero``."""
        return f"top1_{self.mode}_{self.basis}" + ("" if self.around == "mean" else f"_{self.around}")


@torch.no_grad()
def measure_bands(
    features: tuple[Tensor, Tensor],
    target: Tensor,
    classifiers: tuple[Tensor, Tensor],
    bands: Sequence[Band] = PUBLISHED_BANDS,
    seed: int = 0,
    centres: Sequence[str] = CENTRES,
) -> list[BandAccuracy]:
    """Accuracy when something becomes of each band of the image features, ``X <- c + (X - c) P``; no network is run.

    Args:
        features: unit-norm ``[n, dim]`` of full precision and of the quantized model, of the same images.
        target: int64 ``[n]``, class of every image.
        classifiers: unit-norm class features ``[classes, dim]`` of the two models.
        bands: rank ranges.
        seed: of the random subspaces.
        centres: the c above: the model's ``mean``, or ``zero``, see :func:`~lightning_vlmq.spectral.own_band_accuracy`.

    Raises:
        VLMQError: bands are empty, or features do not fit.
    """
    moments = SecondMoments(features[0].shape[1], features[0].device)
    moments.update(*features)

    def left(k: int, cut: _Cut) -> Tensor:
        return project(features[k], cut.directions, cut.mean)

    return _accuracies(OUTPUTS["vision"], moments, left, target, classifiers, bands, seed, centres)


@torch.no_grad()
def measure_block_bands(
    reference: VLM,
    vlm: VLM,
    batches: Sequence[Tensor],
    target: Tensor,
    classifiers: tuple[Tensor, Tensor],
    bands: Sequence[Band] = PUBLISHED_BANDS,
    seed: int = 0,
    centres: Sequence[str] = CENTRES,
) -> list[BandAccuracy]:
    """As :func:`measure_bands`, after every block, the rest of the network run on what is left.

    All tokens (pixels) of a block share one mean and one basis. The network runs once for every number: about
    ``2 * bands * (bases * modes + 1) * centres`` times over the images for each block.

    Args:
        reference: the full-precision model.
        vlm: the quantized one.
        batches: images, uint8 ``[b, 3, h, w]`` each.
        target: int64 ``[n]``.
        classifiers: as in :func:`measure_bands`.
        bands: rank ranges.
        seed: of the random subspaces.
        centres: as in :func:`measure_bands`.

    Raises:
        VLMQError: bands are empty, or the two models have other blocks.
    """
    watcher = BlockWatcher(reference, vlm, "vision", fourier=False)
    for images in batches:
        watcher.update(images)
    found = []
    for site, moments in watcher.moments.items():
        if site == OUTPUTS["vision"]:
            continue

        def left(k: int, cut: _Cut, site: str = site) -> Tensor:
            return project_at((reference, vlm)[k], site, batches, cut.directions, cut.mean, watcher)

        found += _accuracies(site, moments, left, target, classifiers, bands, seed, centres)
    return found


class _Cut(NamedTuple):
    """What is kept of one model's activations: orthonormal directions ``[d, m]`` around a mean."""

    basis: str
    mode: str
    band: Band
    directions: Tensor
    mean: Tensor | None


def _accuracies(
    site: str,
    moments: SecondMoments,
    left: Callable[[int, _Cut], Tensor],
    target: Tensor,
    classifiers: tuple[Tensor, Tensor],
    bands: Sequence[Band],
    seed: int,
    centres: Sequence[str],
) -> list[BandAccuracy]:
    """Every accuracy of a site; ``left(k, cut)`` gives the image features of model k with the site cut."""
    found = []
    for around in centres:
        is_centred = around == "mean"
        second = moments.matrices(is_centred)[0], moments.quantized(is_centred)
        bases = {"full": eigenbasis(second[0])[1], "own": eigenbasis(second[1])[1]}
        means = moments.mean_z, moments.mean_z + moments.mean_d
        for k, model in enumerate(("full", "quantized")):
            own = {"full": bases["full"]} if model == "full" else bases  # full precision's own basis is "full"
            for cut, has_energy in _cuts(own, second[k], means[k] if is_centred else None, bands, seed):
                top1 = math.nan
                if has_energy:
                    features = left(k, cut)
                    hits = (features @ classifiers[k].to(features).T).argmax(-1).cpu() == target.cpu()
                    top1 = float(hits.double().mean())
                about = (site, around, cut.basis, cut.mode, band_name(cut.band), model)
                found.append(BandAccuracy(*about, top1, len(target)))
    return found


def _cuts(
    bases: dict[str, Tensor], moment: Tensor, mean: Tensor | None, bands: Sequence[Band], seed: int
) -> Iterator[tuple[_Cut, bool]]:
    """Each basis, mode and band of one model with that second moment, and whether the band holds any of its energy.

    The last basis is the model's own, whose bands have random subspaces beside them.
    """
    for name, directions in bases.items():
        for mode in MODES:
            for band in bands:
                has_energy = holds_energy(moment, band_directions(directions, band))
                yield _Cut(name, mode, band, band_directions(directions, band, mode), mean), has_energy
    for stream, band in enumerate(bands):
        inside = band_directions(directions, band)
        energy = max(float(((moment @ inside) * inside).sum()), 0.0)  # rounding, where there is none
        random = random_subspace(moment, energy, seeded_generator(seed, stream))
        yield _Cut("random", "keep", band, random, mean), holds_energy(moment, inside)


def project_at(
    network: VLM, site: str, batches: Sequence[Tensor], directions: Tensor, mean: Tensor | None, watcher: BlockWatcher
) -> Tensor:
    """Image features ``[n, dim]`` with a site projected on directions around a mean (or zero), then the rest of the network run."""
    if site == OUTPUTS["vision"]:
        features = torch.cat([run_tower(network, "vision", images) for images in batches])
        return project(features, directions, mean)
    centres = is_rotated(watcher.vlm, "vision")

    def change(_: str, rows: Tensor) -> Tensor:
        shift = rows.mean(-1, keepdim=True) if centres else 0.0  # what the compared activations lack is left as it is
        return project(rows - shift, directions, mean) + shift

    return features_with(network, batches, {site: block_sites(network, "vision")[site]}, change)
