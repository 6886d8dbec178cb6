"""Pure statistics: bootstrap, replicates of whole metrics, significance."""

from lightning_vlmq.statistics.bootstrap import (
    BootstrapResult,
    bootstrap,
    bootstrap_standard_error,
    difference,
    paired_bootstrap,
    summarise,
)
from lightning_vlmq.statistics.clusters import ClusteredMean, clustered_mean
from lightning_vlmq.statistics.planning import samples_needed
from lightning_vlmq.statistics.replicates import (
    RankingMetrics,
    SelectiveMetrics,
    ranking_metrics,
    resample_counts,
    selective_metrics,
)
from lightning_vlmq.statistics.resamples import bootstrap_indices, bootstrap_means, bootstrap_replicates
from lightning_vlmq.statistics.settings import Statistics
from lightning_vlmq.statistics.significance import (
    FALSE_DISCOVERY_RATE,
    Z95,
    DeLongResult,
    Interval,
    ShareImproved,
    benjamini_hochberg,
    delong,
    delong_standard_error,
    p_values,
    share_improved,
    standard_error_of_mean,
)

__all__ = [
    "FALSE_DISCOVERY_RATE",
    "Z95",
    "BootstrapResult",
    "ClusteredMean",
    "DeLongResult",
    "Interval",
    "RankingMetrics",
    "SelectiveMetrics",
    "ShareImproved",
    "Statistics",
    "benjamini_hochberg",
    "bootstrap",
    "bootstrap_indices",
    "bootstrap_means",
    "bootstrap_replicates",
    "bootstrap_standard_error",
    "clustered_mean",
    "delong",
    "delong_standard_error",
    "difference",
    "p_values",
    "paired_bootstrap",
    "ranking_metrics",
    "resample_counts",
    "samples_needed",
    "selective_metrics",
    "share_improved",
    "standard_error_of_mean",
    "summarise",
]
