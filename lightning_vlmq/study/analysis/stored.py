"""Comparisons from the rows of runs alone: of studies too large for all their samples, and of runs whose samples were not kept.

A row holds a measure and its standard error, its ``delta_`` row the change against full precision and its own, from the paired bootstrap
of the run itself; so values, intervals and tests are those of :func:`~.change.compare` (to first order where a change is relative, see
:func:`change_error`). What rows do not hold are the resamples, which say
how the estimates of several VLMs on the same images vary together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_vlmq.evaluation.estimates import Array
from lightning_vlmq.evaluation.measures import METRICS, Measure
from lightning_vlmq.statistics import p_values
from lightning_vlmq.study.analysis.change import FULL
from lightning_vlmq.study.analysis.columns import NUMBERS, Comparisons
from lightning_vlmq.study.analysis.runs import StudyResults, reference_of
from lightning_vlmq.study.analysis.setting import Setting

DELTA = "delta_"
"""What the name of a row begins with that holds a change."""


def comparisons_from_rows(results: StudyResults) -> tuple[Comparisons, list[str], list[str]]:
    """Every measure of a role, and AUROC of every set and score, of every setting beside full precision.

    Over seeds, values and changes are averaged; so are standard errors, as one test set's error is nearly the same in all.

    Returns:
        The comparisons, p-values not yet corrected; the VLMs that have no full-precision run; and a line where runs saw other samples than
        full precision.
    """
    measures, by_run = _by_run(results)
    cells, unreferenced = _cells(results)
    notes = _leave_out_others(results, measures, by_run, cells)
    order = np.argsort(cells.cell, kind="stable")
    run, cell = cells.run[order], cells.cell[order]
    starts = np.flatnonzero(np.r_[True, cell[1:] != cell[:-1]]) if len(cell) else np.empty(0, np.int64)
    means = {name: _means(column[run], starts) for name, column in by_run.items()}
    beside = {name: by_run[name][cells.reference[order]] for name in ("value", "stderr")}
    is_there = ~np.isnan(by_run["value"][run])  # full precision of the same runs, no others
    means |= {f"full_{name}": _means(np.where(is_there, column, np.nan), starts) for name, column in beside.items()}
    n_seeds = np.add.reduceat(~np.isnan(by_run["there"][run]), starts, axis=0) if len(starts) else means["value"]
    vlm, setting = cells.vlm[cell[starts]], cells.setting[cell[starts]]
    is_tuned = np.array([s.is_tuned for s in cells.settings], dtype=bool)[setting]
    is_full = np.array([s == FULL for s in cells.settings], dtype=bool)[setting]
    kept = (n_seeds > 0) & ~np.isnan(means["value"])
    kept &= ~(is_tuned[:, None] & ~np.array([m.follows_logit_scale for m in measures], dtype=bool))
    numbers = {name: np.full(kept.shape, np.nan) for name in NUMBERS}
    numbers |= {"value": means["value"], "stderr": means["stderr"], "n_seeds": n_seeds.astype(float)}
    numbers["reference"] = means["full_value"].copy()
    is_compared = np.zeros(kept.shape, dtype=bool)
    for k, measure in enumerate(measures):
        if measure.info.needs_reference and not measure.info.is_tested:
            continue
        is_compared[~is_full, k] = True
        _fill(measure, {name: column[~is_full, k] for name, column in means.items()}, numbers, (~is_full, k))
    numbers["p_value"] = p_values(numbers["change"], numbers["change_stderr"])
    numbers["q_value"] = np.full(kept.shape, np.nan)
    which, column = np.nonzero(kept)
    place = np.stack([vlm[which], setting[which], column], axis=1).astype(np.int32)
    plain = {name: numbers[name][kept] for name in NUMBERS}
    return (
        Comparisons((results.vlms, cells.settings, measures), place, plain, is_compared[kept], {}),
        unreferenced,
        notes,
    )


def _leave_out_others(
    results: StudyResults, measures: list[Measure], by_run: dict[str, Array], cells: _Cells
) -> list[str]:
    """Take away what was measured on another number of samples than full precision's; a line that says so, or none.

    With samples at hand other images are refused one by one (see :func:`~.runs.align`); rows say how many there were.
    """
    n = by_run.pop("n")
    own, full = n[cells.run], n[cells.reference]
    is_other = ~np.isnan(own) & ~np.isnan(full) & (own != full)
    line, column = np.nonzero(is_other)
    if not len(line):
        return []
    for numbers in by_run.values():
        numbers[cells.run[line], column] = np.nan
    run, reference = (results.runs[part[line[0]]].run_id for part in (cells.run, cells.reference))
    m = measures[column[0]]
    return [
        f"{len(np.unique(line)):,} runs saw other samples than full precision and are not compared where they did, e.g. '{run}': "
        f"{m.metric} on {m.role} from {own[line[0], column[0]]:,.0f} samples, {full[line[0], column[0]]:,.0f} in '{reference}'. "
        "Run them again on the same data."
    ]


def _fill(
    measure: Measure, own: dict[str, Array], numbers: dict[str, Array], place: tuple[NDArray[np.bool_], int]
) -> None:
    """Change and effect of one measure in all quantized cells."""
    info, n = measure.info, len(own["value"])
    if info.needs_reference:  # a comparison with full precision already
        change, error = own["value"], own["stderr"]
        effect, effect_error = change, error
        numbers["reference"][place] = 0.0
    else:
        effect, effect_error = own["delta_value"], own["delta_stderr"] if info.is_tested else np.full(n, np.nan)
        change, error = effect, effect_error
        if info.is_relative:
            change = own["value"] - own["full_value"]
            error = change_error(own["value"], own["stderr"], own["full_value"], own["full_stderr"], effect_error)
    for name, column in (
        ("change", change),
        ("change_stderr", error),
        ("effect", effect),
        ("effect_stderr", effect_error),
    ):
        numbers[name][place] = column


def _by_run(results: StudyResults) -> tuple[list[Measure], dict[str, Array]]:
    """The measures in the rows' order, and their numbers ``[runs, measures]``, NaN where a run has no row.

    ``there`` is 0 where a run has a row of the measure; ``value``, ``stderr``, ``n``, ``delta_value`` and ``delta_stderr`` are what it
    says.
    """
    rows = results.rows
    names = list(rows["metric"].cat.categories)
    metric = rows["metric"].cat.codes.to_numpy()
    bare = [name.removeprefix(DELTA) for name in names]
    known = {name: number for number, name in enumerate(dict.fromkeys(name for name in bare if name in METRICS))}
    base = np.array([known.get(name, -1) for name in bare], dtype=np.int64)[metric]
    is_delta = np.array([name.startswith(DELTA) for name in names], dtype=bool)[metric]
    runs = {run.run_id: number for number, run in enumerate(results.runs)}
    run = np.array([runs.get(name, -1) for name in rows["run_id"].cat.categories], dtype=np.int64)[
        rows["run_id"].cat.codes
    ]
    shown = (base >= 0) & (run >= 0)
    shown &= (rows["dataset"] == "").to_numpy() | (
        (base == known.get("auroc", -2)) & (rows["role"] != "spurious").to_numpy()
    )
    rows, base, is_delta, run = rows[shown], base[shown], is_delta[shown], run[shown]
    code = base
    for name in ("role", "dataset", "score"):
        code = code * len(rows[name].cat.categories) + rows[name].cat.codes.to_numpy()
    _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")  # the measures as they come
    column = np.argsort(order, kind="stable")[inverse]
    heads = rows.iloc[first[order]]
    measures = [
        Measure(name.removeprefix(DELTA), role, dataset, score)
        for name, role, dataset, score in heads[["metric", "role", "dataset", "score"]].itertuples(
            index=False, name=None
        )
    ]
    found = {
        name: np.full((len(runs), len(measures)), np.nan)
        for name in ("there", "value", "stderr", "n", "delta_value", "delta_stderr")
    }
    for prefix, which in (("", ~is_delta), (DELTA, is_delta)):
        for name in ("value", "stderr"):
            found[prefix + name][run[which], column[which]] = rows[name].to_numpy()[which]
    found["there"][run[~is_delta], column[~is_delta]] = 0.0
    found["n"][run[~is_delta], column[~is_delta]] = rows["n"].to_numpy()[~is_delta]
    return measures, found


@dataclass(frozen=True, eq=False)
class _Cells:
    """Which runs are averaged: those of one VLM and setting.

    Attributes:
        run: number of a run that is compared, ``[n]``.
        reference: number of the full-precision run beside it, ``[n]``.
        cell: number of its cell, ``[n]``.
        vlm: a cell's VLM, ``[cells]``.
        setting: a cell's setting, ``[cells]``.
        settings: what these count.
    """

    run: NDArray[np.int64]
    reference: NDArray[np.int64]
    cell: NDArray[np.int64]
    vlm: NDArray[np.int64]
    setting: NDArray[np.int64]
    settings: list[Setting]


def _cells(results: StudyResults) -> tuple[_Cells, list[str]]:
    """The cells in the order of VLMs and, full precision first, settings; and the VLMs without full precision."""
    numbers = {run.run_id: number for number, run in enumerate(results.runs)}
    settings: dict[Setting, int] = {FULL: 0}
    cells: dict[tuple[int, int], int] = {}
    lines, unreferenced = [], []
    for vlm, name in enumerate(results.vlms):
        references, others = results.runs_of(name)
        if not references:
            unreferenced.append(name)
        for run in [*references, *others]:
            reference = run if run.key.is_full_precision else reference_of(run, references)
            if reference is not None:
                setting = FULL if run.key.is_full_precision else run.setting
                place = vlm, settings.setdefault(setting, len(settings))
                lines.append((numbers[run.run_id], numbers[reference.run_id], cells.setdefault(place, len(cells))))
    run_of, reference_of_run, cell = np.array(lines, dtype=np.int64).reshape(-1, 3).T
    places = np.array(list(cells), dtype=np.int64).reshape(-1, 2).T
    return _Cells(run_of, reference_of_run, cell, places[0], places[1], list(settings)), unreferenced


def _means(columns: Array, starts: NDArray[np.int64]) -> Array:
    """Means over rows ``[runs, measures]`` from each start to the next, of what is not NaN."""
    if not len(starts):
        return columns[:0]
    there = ~np.isnan(columns)
    sums = np.add.reduceat(np.where(there, columns, 0.0), starts, axis=0)
    count = np.add.reduceat(there.astype(np.int64), starts, axis=0)
    return np.where(count > 0, sums / np.maximum(count, 1), np.nan)


def change_error(
    value: ArrayLike, stderr: ArrayLike, full: ArrayLike, full_stderr: ArrayLike, delta_stderr: ArrayLike
) -> Array:
    """Standard errors of ``value - full`` from those of ``delta = 1 - value / full`` and of the two, to first order, all ``[...]``.

    With ``r = value / full`` the delta method has ``full^2 var(delta) = var(value) + r^2 var(full) - 2 r cov``, which gives the
    covariance that ``var(value - full)`` needs.
    """
    value, stderr, full, full_stderr, delta_stderr = (
        np.asarray(column, np.float64) for column in (value, stderr, full, full_stderr, delta_stderr)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(full != 0, value / full, 0.0)
        variance = stderr**2 * (1 - 1 / ratio) + full_stderr**2 * (1 - ratio) + (full * delta_stderr) ** 2 / ratio
        return np.where(ratio > 0, np.sqrt(np.maximum(variance, 0.0)), delta_stderr * np.abs(full))
