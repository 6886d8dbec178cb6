"""Every quantized setting against full precision: changes, intervals, and p-values corrected over the whole grid."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lightning_vlmq.evaluation.measures import Measure, dimensions
from lightning_vlmq.metrics.functional import TrajectoryBins
from lightning_vlmq.statistics import Statistics
from lightning_vlmq.study.analysis.change import FULL, Comparison, Pair, compare
from lightning_vlmq.study.analysis.columns import Comparisons, Key
from lightning_vlmq.study.analysis.diagnostics import Diagnostics, diagnose, merge, merge_trajectories, trajectory
from lightning_vlmq.study.analysis.runs import StudyResults, align, reference_of
from lightning_vlmq.study.analysis.setting import Setting
from lightning_vlmq.study.analysis.shown import shown_estimates
from lightning_vlmq.study.analysis.stored import comparisons_from_rows

AVERAGED = {(m.metric, m.role) for d in dimensions("") for m in (d.measure, d.measure.tested_by)}
AVERAGED |= {("vuln_add", "spurious")}
"""Metrics and roles whose effects' replicates are kept over all VLMs, see :func:`is_averaged`."""


@dataclass(frozen=True, eq=False)
class StudyAnalysis:
    """A study's comparisons.

    Attributes:
        results: what they were computed from.
        statistics: with which settings.
        comparisons: by VLM, setting (:data:`FULL` included) and measure; settings with a tuned logit scale have only those measures
            that follow it.
        diagnostics: by VLM and setting.
        trajectories: by VLM and setting, from full precision to the setting and on to its tuned one where there is one; of :data:`FULL`
            only where it has a tuned one.
        unreferenced: VLMs without a full-precision run; nothing of theirs can be compared.
        score: the OOD score that stands for detection in summaries.
    """

    results: StudyResults
    statistics: Statistics
    comparisons: Comparisons
    diagnostics: dict[tuple[str, Setting], Diagnostics]
    trajectories: dict[tuple[str, Setting], TrajectoryBins]
    unreferenced: list[str]
    score: str

    @property
    def vlms(self) -> list[str]:
        """VLMs that have something to compare."""
        return [vlm for vlm in self.results.vlms if vlm not in self.unreferenced]

    @property
    def settings(self) -> list[Setting]:
        """Quantized settings in display order, controls among them; error surgeries have tables of their own."""
        return [setting for setting in self.results.settings if not setting.surgery]

    @property
    def measures(self) -> list[Measure]:
        """Every measure that some comparison is of, in display order."""
        return self.comparisons.measures

    @property
    def n_tests(self) -> int:
        """Number of p-values that were corrected for each other."""
        tested = self.comparisons.numbers["p_value"][self.comparisons.stands_for_itself]
        return int((~np.isnan(tested)).sum())

    def changes(
        self, measure: Measure, vlm: str | None = None, is_tuned: bool = False, **setting: Any
    ) -> list[Comparison]:
        """Comparisons of a measure that have an effect: of all VLMs or one, of quantizations with the given fields.

        Controls and surgeries are none, and do not count.

        Args:
            measure: what is compared.
            vlm: one VLM, or ``None`` for all.
            is_tuned: settings with a tuned logit scale in place of those without.
            setting: fields of :class:`~lightning_vlmq.study.analysis.setting.Setting` and their values.
        """
        return [
            comparison
            for name, which, comparison in self.comparisons.of(measure)
            if vlm in (None, name)
            and which.is_tuned == is_tuned
            and which.is_quantization
            and all(getattr(which, attribute) == wanted for attribute, wanted in setting.items())
        ]

    @property
    def joint_measures(self) -> dict[str, list[Measure]]:
        """What gets better or worse together: ``top1``, ``ece`` and ``auroc``, each with the measures that it is the mean of."""
        auroc = [Measure("auroc", role, "", self.score) for role in ("near_ood", "far_ood")]
        return {"top1": [Measure("top1", "id")], "ece": [Measure("ece", "id")], "auroc": auroc}

    def joint_gains(self) -> dict[tuple[str, Setting], dict[str, float]]:
        """By how much ``top1``, ``ece`` and ``auroc`` (the mean of near- and far-OOD's) got better, together, each in its own unit.

        Of every VLM and quantization (no control), its logit scale as it came, that has all of these numbers.
        """
        parts = self.joint_measures
        found: dict[tuple[str, Setting], dict[str, float]] = {}
        for vlm, setting in itertools.product(self.vlms, [s for s in self.settings if s.is_quantization]):
            gains = {
                name: [m.info.gain(c.reference, c.value) for m in own if (c := self._changed(vlm, setting, m))]
                for name, own in parts.items()
            }
            if all(len(gains[name]) == len(own) for name, own in parts.items()):
                found[vlm, setting] = {name: float(np.mean(own)) for name, own in gains.items()}
        return found

    def _changed(self, vlm: str, setting: Setting, measure: Measure) -> Comparison | None:
        """A comparison that has an effect, or ``None``."""
        c = self.comparisons.get((vlm, setting, measure))
        return None if c is None or c.effect is None or np.isnan(c.effect.estimate) else c


def analyse(results: StudyResults) -> StudyAnalysis:
    """Compare every run of a study with the full-precision run of its VLM (of its seed, where there is one).

    Values and standard errors are those of the runs' rows: computed by the same functions, with the settings stored with the runs. The
    p-value of a change is that of z = change / standard error of the paired bootstrap. (Counting the resamples beyond zero has a floor,
    2 / (R + 1), that a correction over hundreds of comparisons does not get past.) The interval is 1.96 standard errors to either side:
    it holds what the test lets stand. The change of a calibration error is that of its debiased form, see
    :class:`~lightning_vlmq.evaluation.measures.Metric`.

    Args:
        results: the study's runs.

    Raises:
        VLMQError: a part of the store cannot be read, or a run saw other samples than full precision.
    """
    settings_of_all = results.statistics
    if not results.takes_samples:
        stored, unreferenced, notes = comparisons_from_rows(results)
        return _analysis(replace(results, notes=(*results.notes, *notes)), stored, {}, {}, unreferenced)
    comparisons: dict[Key, Comparison] = {}
    diagnostics: dict[tuple[str, Setting], list[Diagnostics]] = defaultdict(list)
    trajectories: dict[tuple[str, Setting], list[TrajectoryBins]] = defaultdict(list)
    unreferenced = []
    for vlm in results.vlms:
        references, quantized = results.runs_of(vlm)
        if not references:
            unreferenced.append(vlm)
        found: dict[tuple[Setting, Measure], list[Pair]] = defaultdict(list)
        for reference in references:
            runs = [reference, *(run for run in quantized if reference_of(run, references) is reference)]
            settings = [FULL, *(run.setting for run in runs[1:])]
            sets = align(runs)
            estimates = shown_estimates(sets, results, runs, settings_of_all)
            for measure, estimate in estimates.items():
                for position, setting in enumerate(settings):
                    if measure.follows_logit_scale or not setting.is_tuned:
                        found[setting, measure].append(Pair(estimate, position))
            tuned = {run.key: position for position, run in enumerate(runs)}
            for position, (run, setting) in enumerate(zip(runs, settings)):
                if setting.is_tuned:
                    continue
                if diagnosis := diagnose(sets, position, settings_of_all.n_bins):
                    diagnostics[vlm, setting].append(diagnosis)
                stages = dict.fromkeys([0, position, tuned.get(run.key.tuned, position)])
                if len(stages) > 1 and (followed := trajectory(sets, list(stages), settings_of_all.n_bins)):
                    trajectories[vlm, setting].append(followed)
        for (setting, measure), pairs in found.items():
            c = compare(setting, measure, pairs)
            comparisons[vlm, setting, measure] = c if is_averaged(measure) else replace(c, effects=np.empty(0))
    return _analysis(
        results,
        Comparisons.gathered({key: c for key, c in comparisons.items() if not np.isnan(c.value)}),
        {key: merge(seeds) for key, seeds in diagnostics.items()},
        {key: merge_trajectories(_alike(seeds)) for key, seeds in trajectories.items()},
        unreferenced,
    )


def is_averaged(measure: Measure) -> bool:
    """Whether a measure's effects are averaged over VLMs or judged together, which takes their replicates.

    It does of a reliability dimension, with what that is tested by, and of a published claim: nine of some fifty measures. With 1,000
    resamples their replicates take 72 kB a run.
    """
    return not measure.dataset and (measure.metric, measure.role) in AVERAGED


def _analysis(
    results: StudyResults,
    comparisons: Comparisons,
    diagnostics: dict[tuple[str, Setting], Diagnostics],
    trajectories: dict[tuple[str, Setting], TrajectoryBins],
    unreferenced: list[str],
) -> StudyAnalysis:
    return StudyAnalysis(
        results=results,
        statistics=results.statistics,
        comparisons=comparisons.corrected().with_tested_changes(),
        diagnostics=diagnostics,
        trajectories=trajectories,
        unreferenced=unreferenced,
        score=next((measure.score for measure in comparisons.measures if measure.score and not measure.dataset), ""),
    )


def _alike(seeds: list[TrajectoryBins]) -> list[TrajectoryBins]:
    """Those of the seeds that have all stages: a seed may lack the tuned run."""
    stages = max(len(bins.confidence) for bins in seeds)
    return [bins for bins in seeds if len(bins.confidence) == stages]
