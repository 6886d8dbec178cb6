"""What decides an estimate and its error beside the samples: one set of settings for a run and for a study's report."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_vlmq.core.errors import VLMQError


@dataclass(frozen=True)
class Statistics:
    """Settings of every statistic; stored with a run, and read from there by whoever compares runs.

    Attributes:
        n_bins: bins of the calibration errors.
        risk: error rate at which coverage is reported, in [0, 1].
        n_resamples: bootstrap resamples of means, and of what follows from means.
        n_resamples_ranking: resamples where each one costs a pass over a ranking: AURC, AUGRC, coverage at risk, AUPR, FPR95; and of
            class-wise errors, whose resamples are of groups.
        n_groups: groups of samples that class-wise errors are resampled by.
        seed: seed of the resamples.

    Raises:
        VLMQError: a value out of its range.
    """

    n_bins: int = 15
    risk: float = 0.05
    n_resamples: int = 1000
    n_resamples_ranking: int = 200
    n_groups: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        lowest = {"n_bins": 1, "n_resamples": 2, "n_resamples_ranking": 2, "n_groups": 2, "seed": 0}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise VLMQError(f"statistics.{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.risk <= 1:
            raise VLMQError(f"statistics.risk is an error rate in [0, 1], got {self.risk}")
