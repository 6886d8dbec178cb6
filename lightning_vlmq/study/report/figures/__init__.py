"""The report's figures: each a function of the analysis that returns a matplotlib figure, or ``None`` without data."""

from lightning_vlmq.study.report.figures.damage import effects_over_damage
from lightning_vlmq.study.report.figures.mechanism import verdict_overview, verdict_summary
from lightning_vlmq.study.report.figures.overview import overview, spurious_gap_slopes
from lightning_vlmq.study.report.figures.ranks import rank_curves, rank_maps
from lightning_vlmq.study.report.figures.reliability import reliability_diagrams, reliability_trajectories
from lightning_vlmq.study.report.figures.robustness import corruption_changes, corruption_curves, prediction_flips
from lightning_vlmq.study.report.figures.spectra import singular_value_heatmaps, singular_value_ratios
from lightning_vlmq.study.report.figures.style import as_html, as_png, as_svg

__all__ = [
    "as_html",
    "as_png",
    "as_svg",
    "corruption_changes",
    "corruption_curves",
    "effects_over_damage",
    "overview",
    "prediction_flips",
    "rank_curves",
    "rank_maps",
    "reliability_diagrams",
    "reliability_trajectories",
    "singular_value_heatmaps",
    "singular_value_ratios",
    "spurious_gap_slopes",
    "verdict_overview",
    "verdict_summary",
]
