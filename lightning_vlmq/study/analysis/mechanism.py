"""Is the spectral filter the cause? Controls beside the quantization they imitate."""

from __future__ import annotations

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
from lightning_vlmq.study.analysis.change import Comparison
from lightning_vlmq.study.analysis.comparison import StudyAnalysis
from lightning_vlmq.study.analysis.setting import Setting

LEAST_SEEDS = 5
"""Seeds below which a control that draws noise is not judged."""
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
        n_seeds: seeds of the control.
        n_vlms: VLMs averaged.
        found: the verdict, with the ratio of the two.
        is_surgery: whether it is a surgery.
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
    """Does each control, and each surgery, reproduce the change beside it? Paired bootstrap over samples and seeds.

    Beside a control stands its quantization, beside a surgery the image features' whole error (without it the surgery is passed over).
    A control reproduces a change that it is equivalent to within half of it, see
    :func:`~lightning_vlmq.statistics.equivalence.reproduction`. One that draws noise needs :data:`LEAST_SEEDS` seeds, else
    the verdict is "undecided"; VLMs with fewer (draws are refused that are no match) do not count among all VLMs.

    Args:
        analysis: a study with controls or surgeries and what they are compared with; settings of neither kind are passed over.
        seed: of the draws of seeds.

    Returns:
        By dimension, quantized setting and control: every VLM, then all of them together where there are several.
    """
    found: list[Verdict] = []
    for dimension in dimensions(analysis.score):
        cells: dict[tuple[Setting, str], dict[str, _Cell]] = {}
        for vlm, setting, comparison in analysis.comparisons.of(dimension.measure):
            pattern = None if setting.is_tuned else pattern_of(setting)
            if pattern is None or setting.surgery == WHOLE:
                continue
            beside = whole_of(setting) if setting.surgery else pattern
            imitated = analysis.comparisons.get((vlm, beside, dimension.measure))
            if imitated is not None and imitated.effect is not None and len(comparison.effects):
                own = cells.setdefault((pattern, control_name(setting)), {}).setdefault(vlm, _Cell(imitated, []))
                own.controls.append(comparison)
        for (pattern, control), by_vlm in cells.items():
            found += [_verdict(vlm, control, pattern, dimension, [cell], seed) for vlm, cell in by_vlm.items()]
            if len(by_vlm) > 1:
                found.append(_verdict(ALL_VLMS, control, pattern, dimension, list(by_vlm.values()), seed))
    return found


@dataclass(frozen=True)
class _Cell:
    """One VLM: the quantization, and the control's seeds."""

    quantized: Comparison
    controls: list[Comparison]

    @property
    def n_seeds(self) -> int:
        return sum(control.n_seeds for control in self.controls)


def _verdict(
    vlm: str, control: str, pattern: Setting, dimension: Dimension, cells: Sequence[_Cell], seed: int
) -> Verdict:
    is_noise = control.startswith("matched_noise")
    if is_noise:  # of VLMs together, those with enough seeds, if any has
        cells = [cell for cell in cells if cell.n_seeds >= LEAST_SEEDS] or cells
    change = float(np.mean([_effect(cell.quantized) for cell in cells]))
    control_change = float(np.mean([np.mean([_effect(c) for c in cell.controls]) for cell in cells]))
    drawn = np.mean([cell.quantized.effects for cell in cells], axis=0)
    seeds = [over_seeds(np.stack([c.effects for c in cell.controls], 1), seed) for cell in cells]
    found = reproduction(change, drawn, control_change, np.mean(seeds, axis=0))
    n_seeds = min(cell.n_seeds for cell in cells)
    if is_noise and n_seeds < LEAST_SEEDS and found.verdict != "nothing to reproduce":
        found = replace(found, verdict="undecided")
    is_surgery = not control.startswith(CONTROLS)
    return Verdict(vlm, control, pattern, dimension, change, control_change, n_seeds, len(cells), found, is_surgery)


def _effect(comparison: Comparison) -> float:
    assert comparison.effect is not None
    return comparison.effect.estimate


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
            "control": v.control,
            "is_surgery": v.is_surgery,
            "change": v.change,
            "control_change": v.control_change,
            "ratio": v.found.ratio,
            "ratio_low": v.found.low,
            "ratio_high": v.found.high,
            "verdict": v.found.verdict,
            "n_seeds": v.n_seeds,
            "n_vlms": v.n_vlms,
        }
        for v in found
    ]
    return pd.DataFrame(rows)
