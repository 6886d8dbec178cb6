"""Spectra of weights and activations: pure functions on tensors that know nothing of the rest of the package."""

from lightning_vlmq.spectral.bands import (
    CENTRES,
    MODES,
    PUBLISHED_BANDS,
    Band,
    band_accuracy,
    band_directions,
    band_name,
    holds_energy,
    own_band_accuracy,
    project,
    random_subspace,
)
from lightning_vlmq.spectral.controls import (
    DISTRIBUTIONS,
    RankCut,
    draw_noise,
    filter_gains,
    matched_noise,
    shrink_spectrum,
    square_roots,
)
from lightning_vlmq.spectral.dimension import (
    PowerLaw,
    alpha_req,
    effective_rank,
    participation_ratio,
    power_law_tail,
    principal_angles,
    rankme,
)
from lightning_vlmq.spectral.fourier import RadialSpectrum, fourier_spectrum_2d
from lightning_vlmq.spectral.layers import LayerSpectrum, layer_group, matrix_weights, weight_spectra
from lightning_vlmq.spectral.moments import EIGENVALUE_FLOOR, SecondMoments, TotalMoments, eigenbasis
from lightning_vlmq.spectral.ranks import RankTable, rank_table
from lightning_vlmq.spectral.surgery import Surgery
from lightning_vlmq.spectral.weights import Spectrum, as_matrix, log_ratio, singular_values, stacked_singular_values

__all__ = [
    "CENTRES",
    "DISTRIBUTIONS",
    "EIGENVALUE_FLOOR",
    "MODES",
    "PUBLISHED_BANDS",
    "Band",
    "LayerSpectrum",
    "PowerLaw",
    "RadialSpectrum",
    "RankCut",
    "RankTable",
    "SecondMoments",
    "Spectrum",
    "Surgery",
    "TotalMoments",
    "alpha_req",
    "as_matrix",
    "band_accuracy",
    "band_directions",
    "band_name",
    "draw_noise",
    "effective_rank",
    "eigenbasis",
    "filter_gains",
    "fourier_spectrum_2d",
    "holds_energy",
    "layer_group",
    "log_ratio",
    "matched_noise",
    "matrix_weights",
    "own_band_accuracy",
    "participation_ratio",
    "power_law_tail",
    "principal_angles",
    "project",
    "random_subspace",
    "rank_table",
    "rankme",
    "shrink_spectrum",
    "singular_values",
    "square_roots",
    "stacked_singular_values",
    "weight_spectra",
]
