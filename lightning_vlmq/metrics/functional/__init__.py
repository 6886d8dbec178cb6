"""Metrics as pure functions on tensors; record-level ones take any leading batch dimensions."""

from lightning_vlmq.metrics.functional.calibration import (
    BinSums,
    bin_gaps,
    calibration_error,
    classwise_bin_sums,
    classwise_ece,
    equal_mass_bin_sums,
    equal_width_bin_sums,
    equal_width_bins,
    signed_calibration_error,
)
from lightning_vlmq.metrics.functional.change import added_vulnerability, relative_change, relative_spurious_gap
from lightning_vlmq.metrics.functional.classification import (
    agreement,
    confidence_and_correct,
    kl_divergence,
    per_sample,
)
from lightning_vlmq.metrics.functional.corruption import (
    ALEXNET_CLEAN_ERROR,
    ALEXNET_ERRORS,
    mean_corruption_error,
    relative_mean_corruption_error,
)
from lightning_vlmq.metrics.functional.debiased import (
    bias_doubt,
    debiased_error,
    debiased_magnitude,
    gap_variances,
    remaining_bias,
)
from lightning_vlmq.metrics.functional.diagrams import (
    ReliabilityBins,
    TrajectoryBins,
    reliability_bins,
    trajectory_bins,
)
from lightning_vlmq.metrics.functional.logit_scale import LogitScale, fit_logit_scale, pairs_nll
from lightning_vlmq.metrics.functional.ood import aupr_in, aupr_out, auroc, fpr95, fpr95_openood, placements
from lightning_vlmq.metrics.functional.selective import augrc, aurc, coverage_at_risk, risk_at_coverage
from lightning_vlmq.metrics.functional.temperature import fit_temperature, temperature_scaled_ece

__all__ = [
    "ALEXNET_CLEAN_ERROR",
    "ALEXNET_ERRORS",
    "BinSums",
    "LogitScale",
    "ReliabilityBins",
    "TrajectoryBins",
    "added_vulnerability",
    "agreement",
    "augrc",
    "aupr_in",
    "aupr_out",
    "aurc",
    "auroc",
    "bias_doubt",
    "bin_gaps",
    "calibration_error",
    "classwise_bin_sums",
    "classwise_ece",
    "confidence_and_correct",
    "coverage_at_risk",
    "debiased_error",
    "debiased_magnitude",
    "equal_mass_bin_sums",
    "equal_width_bin_sums",
    "equal_width_bins",
    "fit_logit_scale",
    "fit_temperature",
    "fpr95",
    "fpr95_openood",
    "gap_variances",
    "kl_divergence",
    "mean_corruption_error",
    "pairs_nll",
    "per_sample",
    "placements",
    "relative_change",
    "relative_mean_corruption_error",
    "relative_spurious_gap",
    "reliability_bins",
    "remaining_bias",
    "risk_at_coverage",
    "signed_calibration_error",
    "temperature_scaled_ece",
    "trajectory_bins",
]
