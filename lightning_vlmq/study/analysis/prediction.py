"""Which spectral quantity of a quantized model foretells what quantization changes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from lightning_vlmq.evaluation.measures import Measure
from lightning_vlmq.statistics import benjamini_hochberg
from lightning_vlmq.statistics.equivalence import stratified_association
from lightning_vlmq.study.analysis.comparison import StudyAnalysis
from lightning_vlmq.study.analysis.mechanism import pattern_of, setting_name
from lightning_vlmq.study.analysis.setting import Setting

PREDICTORS: tuple[str, ...] = (
    "mean_sqnr_db",
    "noise_colour",
    "gain",
    "filter_share",
    "sqnr_db",
    "leading_angle",
    "participation_ratio",
)
PREDICTORS += ("effective_rank_singular", "effective_rank_eigen", "rankme", "alpha_req", "low_frequency_share")
BASELINES = ("bits", "mean_sqnr_db", "agreement")
"""What a spectral quantity has to do better than."""
OUTCOMES = {
    "ΔECE": ("ece", "id"),
    "ΔAUROC near": ("auroc", "near_ood"),
    "ΔAUROC far": ("auroc", "far_ood"),
    "Δcorruption": ("top1", "corruption"),
    "ΔRSG": ("rsg", "spurious"),
}
"""What is to be foretold: the change of a metric on a role's sets."""


def prediction_table(
    analysis: StudyAnalysis, site: str = "vision/output", n_resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Which spectral quantity of a quantized model foretells its changes.

    Spearman's correlation inside a VLM at one bit-width (bits themselves: inside a VLM), a bootstrap over VLMs, a sign-flip test over
    them, one VLM left out at a time, p-values adjusted over the table (Benjamini & Hochberg). Controls do not count.

    Args:
        analysis: a study whose runs recorded activations, see :class:`~lightning_vlmq.callbacks.ActivationSpectrum`.
        site: whose quantities are taken.
        n_resamples: of VLMs.
        seed: of the resamples.

    Returns:
        One row per outcome and predictor, the strongest first within an outcome; empty without such records.
    """
    table = predictor_frame(analysis, site)
    if table.empty:
        return table
    predictors = [
        c for c in table.columns if c.startswith(PREDICTORS) and not c.endswith("_full") and "stderr" not in c
    ]
    rows = []
    for outcome in (name for name in OUTCOMES if name in table):
        for predictor in dict.fromkeys([*BASELINES, *predictors]):
            if predictor not in table:
                continue
            strata = table["vlm"] if predictor == "bits" else table["vlm"] + table["bits_name"]
            columns = (_floats(table[predictor]), _floats(table[outcome]))
            groups = (table["vlm"].to_numpy(str), strata.to_numpy(str))
            found = stratified_association(*columns, *groups, n_resamples=n_resamples, seed=seed)
            is_baseline = predictor in BASELINES
            rows.append({"outcome": outcome, "predictor": predictor, "is_baseline": is_baseline, **vars(found)})
    made = pd.DataFrame(rows)
    made["q_value"] = benjamini_hochberg(torch.tensor(made["p_value"].to_numpy())).numpy()
    strength = made["rho"].abs().fillna(-1)
    return (
        made.assign(strength=strength)
        .sort_values(["outcome", "strength"], ascending=[True, False], kind="stable")
        .drop(columns="strength")
        .reset_index(drop=True)
    )


def predictor_frame(analysis: StudyAnalysis, site: str, controls: bool = False) -> pd.DataFrame:
    """One row per VLM and quantized setting: its changes, its spectral quantities at a site, bits and agreement.

    ``name`` is :func:`~.mechanism.setting_name`'s; ``variant`` what else sets the setting apart: of a control its scheme alone.

    Args:
        analysis: the study.
        site: whose quantities are taken.
        controls: rows of controls, each seed its own, in place of the quantizations'.
    """
    recorded = analysis.results.rows
    recorded = recorded[recorded["score"] == site]
    recorded = recorded.astype({"metric": object})  # not every metric has a group
    rows = []
    for vlm in analysis.vlms:
        _, runs = analysis.results.runs_of(vlm)
        by_setting: dict[Setting, list[str]] = {}
        for run in runs:
            own_kind = run.setting.is_control and not run.setting.surgery if controls else run.setting.is_quantization
            if not run.setting.is_tuned and own_kind:
                by_setting.setdefault(run.setting, []).append(run.run_id)
        for setting, run_ids in by_setting.items():
            own = recorded[recorded["run_id"].isin(run_ids)].groupby("metric")["value"].mean()
            if own.empty:
                continue
            names = {
                "setting": setting.label,
                "name": setting_name(setting),
                "bits_name": setting.bits,
                "scope": setting.scope,
                "variant": (pattern_of(setting) or setting).variant if controls else setting.variant,
            }
            row: dict[str, Any] = {"vlm": vlm, **names}
            row |= {"bits": setting.weight_bits, **own.to_dict()}
            row["agreement"] = _value(analysis, vlm, setting, Measure("agreement", "id"))
            for name, (metric, role) in OUTCOMES.items():
                score = analysis.score if metric == "auroc" else ""
                row[name] = _change(analysis, vlm, setting, Measure(metric, role, "", score))
            rows.append(row)
    return pd.DataFrame(rows)


def _value(analysis: StudyAnalysis, vlm: str, setting: Setting, measure: Measure) -> float:
    comparison = analysis.comparisons.get((vlm, setting, measure))
    return math.nan if comparison is None else comparison.value


def _change(analysis: StudyAnalysis, vlm: str, setting: Setting, measure: Measure) -> float:
    comparison = analysis.comparisons.get((vlm, setting, measure))
    return math.nan if comparison is None or comparison.change is None else comparison.change.estimate


def _floats(column: pd.Series) -> NDArray[np.float64]:
    return column.to_numpy(np.float64)
