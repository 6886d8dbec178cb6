"""Where in the spectrum of a model's features quantization noise falls, and which ranks carry the accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError

Band = tuple[int, int | None]
"""Half-open range of ranks, 0-based: ``(8, 64)`` is the 9th to the 64th direction, ``(64, None)`` all from the 65th."""

PUBLISHED_BANDS: tuple[Band, ...] = ((0, 8), (8, 64), (64, None))
"""The bands of arXiv 2509.21173."""


def _check_features(features: Tensor) -> None:
    if features.ndim != 2 or features.numel() == 0 or not features.is_floating_point():
        raise VLMQError(
            f"features must be a non-empty float matrix [n, d], not {features.dtype} of shape {list(features.shape)}"
        )
    if not torch.isfinite(features).all():
        raise VLMQError("features hold NaN or infinity; check the model that made them")


def principal_directions(features: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values and right singular vectors of a feature matrix, ``Z = U S V^T``, without centring.

    Args:
        features: float ``[n, d]``.

    Returns:
        ``S`` float64 ``[r]``, largest first, and ``V`` float64 ``[d, r]``, its columns orthonormal. ``r`` is the
        numerical rank: directions below ``max(n, d) * eps(features.dtype) * S[0]`` are left out, as in
        ``torch.linalg.matrix_rank``.

    Raises:
        VLMQError: if the features are not a finite, non-empty float matrix.
    """
    _check_features(features)
    _, values, directions = torch.linalg.svd(features.detach().double(), full_matrices=False)
    tolerance = max(features.shape) * torch.finfo(features.dtype).eps * values[0]
    rank = int((values > tolerance).sum())
    return values[:rank], directions[:rank].mT


def sqnr_db_per_rank(features: Tensor, quantized_features: Tensor) -> Tensor:
    """Signal-to-quantization-noise ratio along each principal direction of the full-precision features.

    ``SQNR_k = |Z v_k|^2 / |(Z_q - Z) v_k|^2`` with ``v_k`` from the SVD of ``Z`` (arXiv 2509.21173).

    Args:
        features: float ``[n, d]``, full precision, Z.
        quantized_features: float ``[n, d]``, the quantized model's features of the same samples, Z_q.

    Returns:
        float64 ``[r]`` in decibels, r the numerical rank of Z; ``inf`` where quantization changed nothing.

    Raises:
        VLMQError: if the shapes differ or either is not a finite, non-empty float matrix.
    """
    if features.shape != quantized_features.shape:
        raise VLMQError(
            f"features {list(features.shape)} and quantized features {list(quantized_features.shape)} differ in shape; "
            "pass both models' features of the same samples"
        )
    _check_features(quantized_features)
    values, directions = principal_directions(features)
    noise = (quantized_features.detach().double() - features.detach().double()) @ directions
    return 10 * (values.square() / noise.square().sum(0)).log10()


def _columns(band: Band, rank: int) -> slice:
    start, stop = band
    if start < 0 or (stop is not None and stop <= start):
        raise VLMQError(f"band ({start}, {stop}) is empty; a band is (first rank, end) with 0 <= first < end")
    return slice(min(start, rank), rank if stop is None else min(stop, rank))


def band_projection(
    features: Tensor, bands: Sequence[Band] = PUBLISHED_BANDS, directions: Tensor | None = None
) -> list[Tensor]:
    """Split features into the parts that lie in ranges of their principal directions.

    Args:
        features: float ``[n, d]``.
        bands: rank ranges, see :data:`Band`; they need not cover all ranks.
        directions: float ``[d, r]`` with orthonormal columns, e.g. the full-precision model's; without it the
            features' own (SVD done anew, as in arXiv 2509.21173).

    Returns:
        one ``[n, d]`` tensor in the features' dtype per band. Bands that cover all ranks sum to the features; a band
        that starts beyond the rank of the features is zero.

    Raises:
        VLMQError: if the features are no finite float matrix, a band is empty, or the directions do not fit.
    """
    if directions is None:
        directions = principal_directions(features)[1]
    else:
        _check_features(features)
        if directions.ndim != 2 or len(directions) != features.shape[1]:
            raise VLMQError(
                f"directions of shape {list(directions.shape)} do not fit features of width {features.shape[1]}"
            )
    wide, basis = features.detach().double(), directions.double()
    parts = []
    for band in bands:
        kept = basis[:, _columns(band, basis.shape[1])]
        parts.append((wide @ kept @ kept.mT).to(features.dtype))
    return parts


def band_accuracy(
    features: Tensor,
    class_embeddings: Tensor,
    target: Tensor,
    bands: Sequence[Band] = PUBLISHED_BANDS,
    directions: Tensor | None = None,
) -> list[float]:
    """Zero-shot top-1 accuracy of what each band of ranks holds, by inner product with the class embeddings.

    The embeddings are not normalised anew inside a band, so that the logits of bands that cover all ranks add up to
    the model's own (up to the logit scale).

    Args:
        features: float ``[n, d]``, image embeddings of the model under test.
        class_embeddings: float ``[classes, d]``, text embeddings of the same model.
        target: int ``[n]``, class indices.
        bands: rank ranges, see :data:`Band`.
        directions: see :func:`band_projection`; the default is the SVD of ``features`` themselves.

    Returns:
        one fraction in [0, 1] per band; NaN for a band that starts beyond the rank of the features.

    Raises:
        VLMQError: if shapes do not fit, features or embeddings are not finite, or a target is no class index.
    """
    _check_features(class_embeddings)
    if class_embeddings.shape[1] != features.shape[-1] or target.shape != features.shape[:1]:
        raise VLMQError(
            f"features {list(features.shape)}, class embeddings {list(class_embeddings.shape)} and target "
            f"{list(target.shape)} do not fit; pass [n, d], [classes, d] and [n]"
        )
    if ((target < 0) | (target >= len(class_embeddings))).any():
        raise VLMQError(f"targets must be class indices from 0 to {len(class_embeddings) - 1}")
    if directions is None:
        directions = principal_directions(features)[1]
    accuracies = []
    for (start, _), part in zip(bands, band_projection(features, bands, directions), strict=True):
        hits = (part @ class_embeddings.to(part.dtype).mT).argmax(-1) == target
        accuracies.append(float(hits.double().mean()) if start < directions.shape[1] else math.nan)
    return accuracies
