"""Is the spectral filter the cause? Controls beside the quantization they imitate."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import numpy as np
import pandas as pd

from lightning_vlmq.evaluation.measures import Dimension, dimensions
from lightning_vlmq.quant.methods import METHODS
from lightning_vlmq.spectral.surgery import WHOLE
from lightning_vlmq.statistics.equivalence import Reproduction, over_seeds, reproduction
from lightning_vlmq.study.analysis.change import Comparison, beyond
from lightning_vlmq.study.analysis.comparison import StudyAnalysis
from lightning_vlmq.study.analysis.runs import MANY_OF_ONE_VLM
from lightning_vlmq.study.analysis.setting import Setting
from lightning_vlmq.study.analysis.tradeoffs import damage

LEAST_SEEDS = 5
"""Draws of noise below which a control that draws noise is not judged."""
MATCH_DB = 3.0
"""Difference of output SQNR, in dB, beyond which a control is no match: less than half or more than twice the noise."""
MATCHED = ("matched_noise", "rank_truncation")
"""Controls that are made as strong as what they imitate; ``spectral_shrink`` is as strong as the damping alone that it takes over."""
CONTROLS = tuple(name for name in METHODS if METHODS[name].is_control)
ALL_VLMS = "all VLMs"


@dataclass(frozen=True)
class Verdict:
    """One control beside the quantization it imitates, in one dimension.

    Attributes:
        vlm: a VLM, or :data:`ALL_VLMS` for the mean over those that have both.
        control: the control's method, with its options but pattern and seed; or the surgery on the quantization's error,
            ``"heal 0-8"``.
        quantized: the setting that it imitates.
        dimension: the reliability dimension.
        change: the quantization's effect; for a surgery that of the image features' whole error alone, of which it leaves a part.
        control_change: the control's, mean over seeds.
        n_seeds: independent draws of the control's noise: settings that differ by its own ``seed`` alone. Runs of one of them with several
            seeds of the study have the same noise, on other calibration data, and count once; so do those of a control without noise.
        n_vlms: VLMs averaged.
        found: the verdict, with the ratio of the two.
        is_surgery: whether it is a surgery.
        gap_db: the control's output SQNR (:data:`~lightning_vlmq.evaluation.about.OUTPUT_SQNR`) minus the quantization's, in dB: of
            its seeds and VLMs the one furthest from 0; NaN where it is not known.
    """

    vlm: str
    control: str
    quantized: Setting
    dimension: Dimension
    change: float
    control_change: float
    n_seeds: int
    n_vlms: int
    found: Reproduction
    is_surgery: bool = False
    gap_db: float = math.nan


def options_of(setting: Setting) -> dict[str, str]:
    """The method's options in a setting's variant, by name."""
    known = {field.name for field in fields(cast("Any", METHODS[setting.method]))}
    return {name: value for name, value in _words(setting) if name in known}


def _words(setting: Setting) -> list[tuple[str, str]]:
    split = [word.partition("=") for word in setting.variant.split(", ") if word]
    return [(name, value) for name, _, value in split]


def pattern_of(setting: Setting) -> Setting | None:
    """The quantized setting that a control imitates or a surgery starts from, under the same scheme; ``None`` for what is neither."""
    if setting.surgery:
        rest = replace(
            setting, variant=", ".join(w for w in setting.variant.split(", ") if not w.startswith("surgery="))
        )
        return rest if rest.is_quantization else None
    if not setting.is_control:
        return None
    own = options_of(setting)
    scheme = ", ".join(f"{name}={value}" if value else name for name, value in _words(setting) if name not in own)
    return replace(setting, method=own.get("pattern", "minmax"), variant=scheme)


def whole_of(setting: Setting) -> Setting:
    """The surgery that leaves the whole error of the image features, of which another surgery leaves a part."""
    return replace(setting, variant=setting.variant.removesuffix(setting.surgery) + WHOLE)


def control_name(setting: Setting) -> str:
    """A control's method with its options but pattern and seed, e.g. ``"rank_truncation(keep=bottom)"``; a surgery's name."""
    if setting.surgery:
        return setting.surgery
    own = {name: value for name, value in options_of(setting).items() if name not in ("pattern", "seed")}
    return setting.method + (f"({', '.join(f'{n}={v}' for n, v in own.items())})" if own else "")


def setting_name(setting: Setting) -> str:
    """The method; of a control with its options, and what it imitates."""
    pattern = pattern_of(setting) if setting.is_control else None
    return setting.method if pattern is None else f"{control_name(setting)} for {pattern.method}"


def first_rank(band: str) -> int:
    """The first rank of a band's name, ``"8-64"`` or ``"64+"``, by which bands are put in order."""
    return int(re.split(r"[-+]", band)[0])


def control_order(name: str) -> tuple[int, int, str]:
    """Key that puts controls first, then surgeries: those that heal, those that hurt, by rank, then the two parts of the error."""
    kinds = ("heal", "hurt", "coherent", "incoherent")
    kind, _, band = name.partition(" ")
    if kind not in kinds:
        return 0, CONTROLS.index(name.partition("(")[0]) if name.partition("(")[0] in CONTROLS else len(CONTROLS), name
    return 1 + kinds.index(kind), first_rank(band) if band else 0, name


def verdicts(analysis: StudyAnalysis, seed: int = 0) -> list[Verdict]:
    """Does each control, and each surgery, reproduce the change beside it? Paired bootstrap over samples and seeds of noise.

    Beside a control stands its quantization, beside a surgery the image features' whole error (without it the surgery is passed over).
    A control reproduces a change that it is equivalent to within half of it, see
    :func:`~lightning_vlmq.statistics.equivalence.reproduction`. One that draws noise needs :data:`LEAST_SEEDS` seeds of its
    own, else the verdict is "undecided"; VLMs with fewer (draws are refused that are no match) do not count among all VLMs. What
    replicates do not show of an effect's error is added to them as a draw of its own, the same for all VLMs. One of :data:`MATCHED` that
    is more than :data:`MATCH_DB` from the quantization's output SQNR is "no match", and does not count among all VLMs either.

    Args:
        analysis: a study with controls or surgeries and what they are compared with; settings of neither kind are passed over.
        seed: of the draws of seeds.

    Returns:
        By dimension, quantized setting and control: every VLM, then all of them together where there are several. None where the study
        is analysed from rows, see :func:`unjudged`.
    """
    found: list[Verdict] = []
    sqnr = damage(analysis)
    for dimension in dimensions(analysis.score):
        cells: dict[tuple[Setting, str], dict[str, _Cell]] = {}
        for vlm, setting, comparison in analysis.comparisons.of(dimension.measure):
            pattern = None if setting.is_tuned else pattern_of(setting)
            if pattern is None or setting.surgery == WHOLE:
                continue
            beside = whole_of(setting) if setting.surgery else pattern
            imitated = analysis.comparisons.get((vlm, beside, dimension.measure))
            if imitated is not None and imitated.effect is not None and len(comparison.effects):
                own = cells.setdefault((pattern, control_name(setting)), {}).setdefault(vlm, _Cell(imitated, [], []))
                own.controls.append(comparison)
                own.gaps_db.append(sqnr.get((vlm, setting), math.nan) - sqnr.get((vlm, pattern), math.nan))
        for (pattern, control), by_vlm in cells.items():
            found += [_verdict(vlm, control, pattern, dimension, [cell], seed) for vlm, cell in by_vlm.items()]
            if len(by_vlm) > 1:
                found.append(_verdict(ALL_VLMS, control, pattern, dimension, list(by_vlm.values()), seed))
    return found


def unjudged(analysis: StudyAnalysis) -> str:
    """Why a study with controls or surgeries has no verdicts on them, in a line; empty where it has, or has none of these."""
    if analysis.results.takes_samples or not any(pattern_of(setting) for setting in analysis.results.settings):
        return ""
    return (
        f"no verdicts on controls and surgeries: they take every run's samples, and of these runs some kept none, or one VLM has more than "
        f"{MANY_OF_ONE_VLM}"
    )


@dataclass(frozen=True)
class _Cell:
    """One VLM: the quantization, the control's seeds, and by how many dB the SQNR of each is off."""

    quantized: Comparison
    controls: list[Comparison]
    gaps_db: list[float]

    @property
    def n_seeds(self) -> int:
        return len(self.controls)

    @property
    def gap_db(self) -> float:
        return furthest(self.gaps_db)


def _verdict(
    vlm: str, control: str, pattern: Setting, dimension: Dimension, cells: Sequence[_Cell], seed: int
) -> Verdict:
    is_noise, is_matched = control.startswith("matched_noise"), control.startswith(MATCHED)
    if is_matched:  # of VLMs together, those that are a match, if any is
        cells = [cell for cell in cells if not abs(cell.gap_db) > MATCH_DB] or cells
    if is_noise:  # of VLMs together, those with enough seeds, if any has
        cells = [cell for cell in cells if cell.n_seeds >= LEAST_SEEDS] or cells
    change = float(np.mean([_effect(cell.quantized) for cell in cells]))
    control_change = float(np.mean([np.mean([_effect(c) for c in cell.controls]) for cell in cells]))
    drawn = np.mean([cell.quantized.effects for cell in cells], axis=0)
    seeds = np.mean([over_seeds(np.stack([c.effects for c in cell.controls], 1), seed) for cell in cells], axis=0)
    doubts = np.mean([[_doubt([cell.quantized]), _doubt(cell.controls)] for cell in cells], axis=0)
    doubted = doubts[:, None] * np.random.default_rng(seed).standard_normal((2, len(drawn)))
    found = reproduction(change, drawn + doubted[0], control_change, seeds + doubted[1])
    n_seeds = min(cell.n_seeds for cell in cells)
    if is_noise and n_seeds < LEAST_SEEDS and found.verdict != "nothing to reproduce":
        found = replace(found, verdict="undecided")
    gap = furthest([cell.gap_db for cell in cells])
    if is_matched and abs(gap) > MATCH_DB and found.verdict != "nothing to reproduce":
        found = replace(found, verdict="no match", low=math.nan, high=math.nan)
    is_surgery = not control.startswith(CONTROLS)
    return Verdict(
        vlm, control, pattern, dimension, change, control_change, n_seeds, len(cells), found, is_surgery, gap
    )


def furthest(gaps: Sequence[float]) -> float:
    """The one furthest from 0 of those that are known; NaN of none."""
    return max((gap for gap in gaps if not math.isnan(gap)), key=abs, default=math.nan)


def _effect(comparison: Comparison) -> float:
    assert comparison.effect is not None
    return comparison.effect.estimate


def _doubt(comparisons: Sequence[Comparison]) -> float:
    """Mean of what the replicates do not show of the effects' standard errors."""
    return float(np.mean([beyond(c.effects, c.effect.stderr) for c in comparisons if c.effect is not None]))


def verdict_frame(found: Sequence[Verdict]) -> pd.DataFrame:
    """Verdicts as plain columns, to be stored."""
    rows = [
        {
            "vlm": v.vlm,
            "dimension": v.dimension.title,
            "metric": v.dimension.measure.metric,
            "method": v.quantized.method,
            "bits": v.quantized.bits,
            "scope": v.quantized.scope,
            "variant": v.quantized.variant,
            "control": v.control,
            "is_surgery": v.is_surgery,
            "change": v.change,
            "control_change": v.control_change,
            "ratio": v.found.ratio,
            "ratio_low": v.found.low,
            "ratio_high": v.found.high,
            "verdict": v.found.verdict,
            "sqnr_gap_db": v.gap_db,
            "n_seeds": v.n_seeds,
            "n_vlms": v.n_vlms,
        }
        for v in found
    ]
    return pd.DataFrame(rows)
