"""Which ranks carry a model's accuracy: at its output and after every block, on full precision's basis and on its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_vlmq.models import VLM
from lightning_vlmq.quant.blocks import OUTPUTS, BlockWatcher, block_sites, features_with, is_rotated, run_tower
from lightning_vlmq.spectral import (
    MODES,
    PUBLISHED_BANDS,
    Band,
    band_directions,
    band_name,
    eigenbasis,
    project,
    random_subspace,
)
from lightning_vlmq.statistics.resamples import seeded_generator


@dataclass(frozen=True)
class BandAccuracy:
    """One accuracy.

    Attributes:
        site: ``vision/output`` or ``vision/block 3``.
        basis: ``full`` (full precision's directions), ``own`` (the quantized model's), or ``random`` (the control: a
            random subspace with the energy of the band on the model's own basis).
        mode: what became of the band, one of :data:`~lightning_vlmq.spectral.MODES`.
        band: the band's name.
        model: whose accuracy: ``full`` or ``quantized``.
        top1: fraction in [0, 1]; NaN for a band that starts beyond the last direction.
        n: images.
    """

    site: str
    basis: str
    mode: str
    band: str
    model: str
    top1: float
    n: int


@torch.no_grad()
def measure_bands(
    reference: VLM,
    vlm: VLM,
    batches: Sequence[Tensor],
    target: Tensor,
    classifiers: tuple[Tensor, Tensor],
    bands: Sequence[Band] = PUBLISHED_BANDS,
    has_blocks: bool = True,
    seed: int = 0,
) -> list[BandAccuracy]:
    """Accuracy when something becomes of each band: ``X <- mean + (X - mean) P``, then the rest of the network.

    At a block all tokens (pixels) share one mean and one basis. The network runs once for every number: about
    ``2 * bands * (bases * modes + 1)`` times over the images for each block.

    Args:
        reference: the full-precision model.
        vlm: the quantized one.
        batches: images, uint8 ``[b, 3, h, w]`` each.
        target: int64 ``[n]``, class of every image.
        classifiers: unit-norm class features ``[classes, dim]`` of the two models.
        bands: rank ranges.
        has_blocks: whether to look after every block too, and not at the output alone.
        seed: of the random subspaces.

    Raises:
        VLMQError: bands are empty, or the two models have other blocks.
    """
    watcher = BlockWatcher(reference, vlm, "vision", fourier=False)
    for images in batches:
        watcher.update(images)
    found = []
    for site, moments in watcher.moments.items():
        if site != OUTPUTS["vision"] and not has_blocks:
            continue
        second = {"full": moments.matrices()[0], "own": moments.quantized()}
        bases = {name: eigenbasis(moment)[1] for name, moment in second.items()}
        means = {"full": moments.mean_z, "quantized": moments.mean_z + moments.mean_d}
        for model, network, classifier in zip(("full", "quantized"), (reference, vlm), classifiers):
            own = second["full" if model == "full" else "own"]
            for basis, mode, band, directions in _cuts(bases, own, bands, model, seed):
                top1 = math.nan
                if directions is not None:
                    features = project_at(network, site, batches, directions, means[model], watcher)
                    hits = (features @ classifier.to(features).T).argmax(-1).cpu() == target.cpu()
                    top1 = float(hits.double().mean())
                found.append(BandAccuracy(site, basis, mode, band_name(band), model, top1, len(target)))
    return found


def _cuts(
    bases: dict[str, Tensor], own: Tensor, bands: Sequence[Band], model: str, seed: int
) -> Iterator[tuple[str, str, Band, Tensor | None]]:
    for name, directions in bases.items():
        if (model, name) == ("full", "own"):
            continue  # full precision's own basis is "full"
        for mode in MODES:
            for band in bands:
                exists = band[0] < directions.shape[1]
                yield name, mode, band, band_directions(directions, band, mode) if exists else None
    vectors = bases["full" if model == "full" else "own"]
    for stream, band in enumerate(bands):
        inside = band_directions(vectors, band)
        energy = max(float(((own @ inside) * inside).sum()), 0.0)  # rounding, where there is none
        if inside.shape[1]:
            yield "random", "keep", band, random_subspace(own, energy, seeded_generator(seed, stream))
        else:
            yield "random", "keep", band, None


def project_at(
    network: VLM, site: str, batches: Sequence[Tensor], directions: Tensor, mean: Tensor, watcher: BlockWatcher
) -> Tensor:
    """Image features ``[n, dim]`` with a site projected on directions around a mean, then the rest of the network run."""
    if site == OUTPUTS["vision"]:
        features = torch.cat([run_tower(network, "vision", images) for images in batches])
        return project(features, directions, mean)
    centres = is_rotated(watcher.vlm, "vision")

    def change(_: str, rows: Tensor) -> Tensor:
        shift = rows.mean(-1, keepdim=True) if centres else 0.0  # what the compared activations lack is left as it is
        return project(rows - shift, directions, mean) + shift

    return features_with(network, batches, {site: block_sites(network, "vision")[site]}, change)
