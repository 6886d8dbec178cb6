"""Ranges of ranks: activations reduced to them or freed of them, and a random subspace to hold them against."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from scipy.optimize import brentq
from torch import Tensor

from lightning_vlmq.core.deterministic import running_sum
from lightning_vlmq.core.errors import VLMQError, unknown
from lightning_vlmq.spectral.moments import eigenbasis

Band = tuple[int, int | None]
"""Half-open range of ranks, 0-based: ``(8, 64)`` is the 9th to the 64th direction, ``(64, None)`` all from the 65th."""

PUBLISHED_BANDS: tuple[Band, ...] = ((0, 8), (8, 64), (64, None))
"""The bands of arXiv 2509.21173."""

MODES = ("keep", "drop", "cumulative")
"""What becomes of a band: it alone is kept, it alone is dropped, or everything up to its end is kept."""

CENTRES = ("mean", "zero")
"""What is left of the other ranks: their mean, on the basis of the variance; or nothing, on that of the energy, as in arXiv 2509.21173."""

NO_ENERGY = 1e-13
"""Share of all energy below which a band holds rounding alone: single precision's, squared, over as many directions as towers have."""


def band_name(band: Band) -> str:
    """A band in writing: ``"8-64"`` holds ranks 8 to 63, ``"64+"`` all from 64 on.

    Raises:
        VLMQError: if the band is empty.
    """
    start, stop = band
    if start < 0 or (stop is not None and stop <= start):
        raise VLMQError(f"band ({start}, {stop}) is empty; a band is (first rank, end) with 0 <= first < end")
    return f"{start}+" if stop is None else f"{start}-{stop}"


def band_directions(directions: Tensor, band: Band, mode: str = "keep") -> Tensor:
    """The directions that are left when something becomes of a band.

    Args:
        directions: float ``[d, r]``, orthonormal columns by falling energy. With all d of them, a band without an end
            holds everything beyond its start, and all bands together are the whole space.
        band: which ranks.
        mode: one of :data:`MODES`.

    Returns:
        ``[d, m]``; m is 0 where the band starts beyond the last direction and is kept alone.

    Raises:
        VLMQError: empty band or unknown mode.
    """
    band_name(band)
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    start, stop = band
    if mode == "cumulative":
        return directions[:, :stop]
    if mode == "keep":
        return directions[:, start:stop]
    return torch.cat([directions[:, :start], directions[:, directions.shape[1] if stop is None else stop :]], 1)


def project(x: Tensor, directions: Tensor, mean: Tensor | None = None) -> Tensor:
    """``mean + (x - mean) P`` with P the projection onto the directions: what lies outside them is set to its mean.

    Args:
        x: float ``[..., d]``.
        directions: float ``[d, m]``, orthonormal columns; m may be 0.
        mean: float ``[d]``; zero if not given.

    Returns:
        ``[..., d]`` in the dtype of ``x``, computed in float64.

    Raises:
        VLMQError: if the directions do not fit.
    """
    if directions.ndim != 2 or len(directions) != x.shape[-1]:
        raise VLMQError(f"directions of shape {list(directions.shape)} do not fit activations of width {x.shape[-1]}")
    basis = directions.to(x.device, torch.float64)
    centre = torch.zeros((), dtype=torch.float64, device=x.device) if mean is None else mean.to(basis)
    return ((x.double() - centre) @ basis @ basis.mT + centre).to(x.dtype)


def random_subspace(moment: Tensor, energy: float, generator: torch.Generator) -> Tensor:
    """Random orthonormal directions that together hold a given energy: the control of a band.

    A uniformly random subspace of the dimension whose energy comes nearest is turned towards the directions of most (or
    least) energy, as little as it takes. The energy is then exact, unless no subspace of that dimension has it, as may
    be where less than the weakest direction is wanted or missing from all; the nearest one is then returned.

    Args:
        moment: float64 ``[d, d]``, second moment of the activations.
        energy: ``trace(R^T moment R)`` to reach, from 0 to the moment's trace.
        generator: CPU generator; the same seed gives the same directions on every device.

    Returns:
        float64 ``[d, m]``, orthonormal columns; m is rarely the number of directions in the band.

    Raises:
        VLMQError: an energy that the activations do not have.
    """
    dim, total = len(moment), float(moment.trace())
    if not 0 <= energy <= total * (1 + 1e-9):
        raise VLMQError(f"a random subspace cannot hold an energy of {energy:g} of {total:g}")
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q.to(moment)
    held = running_sum(((moment @ basis) * basis).sum(0))
    if energy == 0 or energy >= total * (1 - 1e-12) or dim == 1:
        return basis[:, : 0 if energy < total / 2 else dim]
    m = 1 + int((held[:-1] - energy).abs().argmin())
    start = basis[:, :m]
    vectors = eigenbasis(moment)[1]
    extreme = vectors[:, :m] if held[m - 1] < energy else vectors[:, dim - m :]
    left, _, right = torch.linalg.svd(extreme.mT @ start)
    extreme = extreme @ left @ right  # the same subspace, its axes as near to those of the start as they come

    def turned(share: float) -> Tensor:
        return torch.linalg.qr((1 - share) * start + share * extreme).Q

    def missing(share: float) -> float:
        directions = turned(share)
        return float(((moment @ directions) * directions).sum()) - energy

    ends = missing(0.0), missing(1.0)
    if ends[0] * ends[1] >= 0:  # the energy is continuous along the way; here no point of it has the wanted one
        return turned(float(abs(ends[1]) < abs(ends[0])))
    return turned(brentq(missing, 0.0, 1.0, xtol=1e-15, rtol=1e-14))


def own_band_accuracy(
    features: Tensor,
    class_embeddings: Tensor,
    target: Tensor,
    bands: Sequence[Band] = PUBLISHED_BANDS,
    mode: str = "keep",
    around: str = "mean",
) -> list[float]:
    """As :func:`band_accuracy`, on the features' own principal directions.

    The two centres answer different questions. Image features lie in a narrow cone, whose axis prefers some classes to others by
    more than high ranks can tell them apart. Around the ``mean`` that preference stays in every prediction, so that a band scores where it
    can overrule it. Around ``zero`` the axis is about the first direction and goes with the other ranks, so that the band decides alone.

    Args:
        features: float ``[n, d]``.
        class_embeddings: float ``[classes, d]``.
        target: int ``[n]``.
        bands: which ranks.
        mode: one of :data:`MODES`.
        around: one of :data:`CENTRES`; ``zero`` is the published measure.

    Returns:
        One fraction in [0, 1] per band; NaN for one without energy.

    Raises:
        VLMQError: as :func:`band_accuracy`, or an unknown centre.
    """
    if around not in CENTRES:
        raise unknown("centre", around, CENTRES)
    wide = features.detach().double()
    mean = wide.mean(0) if around == "mean" else None
    centred = wide if mean is None else wide - mean
    directions = eigenbasis(centred.mT @ centred)[1]
    return band_accuracy(features, class_embeddings, target, directions, bands, mode, mean)


def band_accuracy(
    features: Tensor,
    class_embeddings: Tensor,
    target: Tensor,
    directions: Tensor,
    bands: Sequence[Band] = PUBLISHED_BANDS,
    mode: str = "keep",
    mean: Tensor | None = None,
) -> list[float]:
    """Zero-shot top-1 accuracy when something becomes of each band, by inner product with the class embeddings.

    Features are not normalised anew, so that the logits of bands that cover all ranks add up to the model's own (up to
    the logit scale).

    Args:
        features: float ``[n, d]``, image embeddings of the model under test.
        class_embeddings: float ``[classes, d]``, text embeddings of the same model.
        target: int ``[n]``, class indices.
        directions: float ``[d, r]``: full precision's or the model's own, see :func:`band_directions`.
        bands: which ranks.
        mode: one of :data:`MODES`.
        mean: what the rest is set to, see :func:`project`; zero, as in arXiv 2509.21173, if not given.

    Returns:
        One fraction in [0, 1] per band; NaN for a band in which the features have no energy (:data:`NO_ENERGY`), as beyond their rank.

    Raises:
        VLMQError: if shapes do not fit, features or embeddings are not finite, or a target is no class index.
    """
    for what, tensor in (("features", features), ("class embeddings", class_embeddings)):
        if tensor.ndim != 2 or tensor.numel() == 0 or not torch.isfinite(tensor).all():
            raise VLMQError(f"{what} must be a finite, non-empty matrix, not of shape {list(tensor.shape)}")
    if class_embeddings.shape[1] != features.shape[1] or target.shape != features.shape[:1]:
        raise VLMQError(
            f"features {list(features.shape)}, class embeddings {list(class_embeddings.shape)} and target "
            f"{list(target.shape)} do not fit; pass [n, d], [classes, d] and [n]"
        )
    if ((target < 0) | (target >= len(class_embeddings))).any():
        raise VLMQError(f"targets must be class indices from 0 to {len(class_embeddings) - 1}")
    centred = features.double() if mean is None else features.double() - mean.to(features.device, torch.float64)
    moment = centred.mT @ centred
    accuracies = []
    for band in bands:
        kept = band_directions(directions, band, mode)
        hits = (project(features, kept, mean) @ class_embeddings.to(features).mT).argmax(-1) == target
        has_energy = holds_energy(moment, band_directions(directions, band))
        accuracies.append(float(hits.double().mean()) if has_energy else math.nan)
    return accuracies


def holds_energy(moment: Tensor, directions: Tensor) -> bool:
    """Whether activations of a second moment ``[d, d]`` have more energy in directions ``[d, m]`` than rounding leaves."""
    inside = directions.to(moment)
    return float(((moment @ inside) * inside).sum()) > NO_ENERGY * float(moment.trace())
