"""Spectra of weights and features: pure functions on tensors that know nothing of the rest of the package."""

from lightning_vlmq.spectral.controls import matched_noise, truncate_rank
from lightning_vlmq.spectral.features import (
    PUBLISHED_BANDS,
    Band,
    band_accuracy,
    band_projection,
    principal_directions,
    sqnr_db_per_rank,
)
from lightning_vlmq.spectral.fourier import RadialSpectrum, fourier_spectrum_2d
from lightning_vlmq.spectral.layers import LayerSpectrum, layer_group, matrix_weights, weight_spectra
from lightning_vlmq.spectral.weights import Spectrum, as_matrix, log_ratio, singular_values

__all__ = [
    "PUBLISHED_BANDS",
    "Band",
    "LayerSpectrum",
    "RadialSpectrum",
    "Spectrum",
    "as_matrix",
    "band_accuracy",
    "band_projection",
    "fourier_spectrum_2d",
    "layer_group",
    "log_ratio",
    "matched_noise",
    "matrix_weights",
    "principal_directions",
    "singular_values",
    "sqnr_db_per_rank",
    "truncate_rank",
    "weight_spectra",
]
