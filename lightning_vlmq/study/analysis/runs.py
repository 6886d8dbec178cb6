"""A study's stored results, arranged for comparison: runs by VLM and setting, samples aligned across runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.compute as pc

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.evaluation.records import Columns, EvaluationSet, SampleMatrix
from lightning_vlmq.models.provenance import RANDOM
from lightning_vlmq.quant.scheme import FULL_PRECISION
from lightning_vlmq.results.counting import evaluations_in
from lightning_vlmq.results.schema import ROW_SCHEMA, RunKey
from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.statistics import Statistics
from lightning_vlmq.study.analysis.setting import Setting

MANY_RUNS = 600
"""With more runs, rows that no analysis needs are not read, see :func:`needed_rows`."""
MANY_OF_ONE_VLM = 600
"""With more runs of one VLM, a study is analysed from rows alone: samples of a VLM's runs are held together (of 600 runs on 20,000
images a gigabyte), and each run takes half a second."""
CLOCK_TOLERANCE = timedelta(days=1)
"""How far ahead of this machine's clock another's may be."""
SHIFT_SETS = ("imagenet_a", "imagenet_r", "imagenet_sketch")
"""Sets of semantic shift that the published study's claim is about."""
_DESCRIBES_SET = ("dataset", "role", "corruption", "severity")


@dataclass(frozen=True, eq=False)
class StoredRun:
    """One finished run.

    Attributes:
        key: what was evaluated.
        run_id: its name in the store.
        store: where its samples and curves lie.
    """

    key: RunKey
    run_id: str
    store: ResultsStore

    @property
    def setting(self) -> Setting:
        """The run's quantization, without model and seed."""
        key = self.key
        return Setting(key.method, key.weight_bits, key.act_bits, key.scope, key.variant, key.is_tuned)

    @property
    def sort_key(self) -> tuple[bool, tuple[int, str, bool, int, int, str, int], int]:
        """Full precision first, then by setting and seed."""
        return not self.key.is_full_precision, self.setting.sort_key, self.key.seed

    def samples(self) -> dict[EvaluationSet, Columns]:
        """Per-sample columns ``[n]`` by data set, sorted by sample index."""
        table = self.store.samples(self.run_id)
        if table.empty:
            return {}
        # One sort of plain arrays; grouping a frame costs more than all statistics together.
        codes = [table[name].cat.codes if table[name].dtype == "category" else table[name] for name in _DESCRIBES_SET]
        order = np.lexsort([table["index"].to_numpy(), *(code.to_numpy() for code in reversed(codes))])
        ordered = np.stack([code.to_numpy()[order] for code in codes])
        starts = np.flatnonzero(np.r_[True, (ordered[:, 1:] != ordered[:, :-1]).any(axis=0)])
        columns = {str(n): table[n].to_numpy()[order] for n in table.columns if n not in (*_DESCRIBES_SET, "group")}
        sets = {}
        for start, stop in zip(starts, [*starts[1:], len(order)]):
            first = table.iloc[int(order[start])]
            name, role, corruption, group = (str(first[key]) for key in ("dataset", "role", "corruption", "group"))
            where = EvaluationSet(name, role, corruption, int(first["severity"]), group)
            sets[where] = {name: column[start:stop] for name, column in columns.items()}
        return sets


@dataclass(frozen=True, eq=False)
class StudyResults:
    """Every run of a study that counts.

    Attributes:
        root: the study's folder.
        runs: full precision first, then by method, bits and scope; a run whose key was written again later is left out.
        rows: the results rows of these runs, text columns categorical; of more than :data:`MANY_RUNS` runs those of :func:`needed_rows`.
        n_rows: number of all their rows.
        superseded: how many runs were left out, not counting tuned ones: they come and go with the run they belong to.
        problems: one line for each part of the store that is damaged, incomplete or foreign, and left out.
        notes: one line for each run whose date lies in the future; it stays.
    """

    root: Path
    runs: tuple[StoredRun, ...]
    rows: pd.DataFrame
    n_rows: int
    superseded: int
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def load(cls, root: str | Path) -> StudyResults:
        """Read a study's store.

        Raises:
            VLMQError: there is nothing sound at ``root``.
        """
        store = ResultsStore(root)
        run_ids, problems = store.sound()
        if not run_ids:
            found = f" ({problems[0]})" if problems else ""
            raise VLMQError(f"no results in '{root}'{found}; run the study first, e.g. vlmq-study study=demo")
        table = store.table(run_ids, ROW_SCHEMA.names, None if len(run_ids) <= MANY_RUNS else needed_rows())
        rows = table.to_pandas()
        del table
        names = [field.name for field in fields(RunKey)]
        newest: dict[RunKey, StoredRun] = {}
        firsts = rows.drop_duplicates("run_id").set_index("run_id")[names]
        written = {run_id: store.written(run_id) for run_id in run_ids}
        latest = datetime.now(UTC) + CLOCK_TOLERANCE
        ahead = {run_id for run_id in run_ids if written[run_id].astimezone(UTC) > latest}
        notes = [
            f"Run '{run_id}' is dated {written[run_id]:%Y-%m-%d %H:%M}, which is yet to come; another of the same setting would count in "
            "its place. Set the clock right and run it again."
            for run_id in sorted(ahead)
        ]
        keys = {line[0]: RunKey(**dict(zip(names, line[1:]))) for line in firsts.itertuples(name=None)}
        for run_id in sorted(run_ids, key=lambda run_id: (run_id not in ahead, written[run_id].astimezone(UTC))):
            newest[keys[run_id]] = StoredRun(keys[run_id], run_id, store)
        alone = [key for key in newest if key.is_tuned and replace(key, is_tuned=False) not in newest]
        for key in alone:  # what is left of a run that is damaged
            del newest[key]
        if not newest:
            raise VLMQError(
                f"no whole run is left in '{root}' ({problems[0] if problems else 'tuned ones alone'}); run the study again"
            )
        runs = sorted(newest.values(), key=lambda run: run.sort_key)
        left = [run.run_id for run in runs]
        replaced = {run_id for run_id in run_ids if not keys[run_id].is_tuned} - set(left)
        if len(left) < len(run_ids):
            rows = rows[rows["run_id"].isin(left)].reset_index(drop=True)
        return cls(Path(root), tuple(runs), rows, store.n_rows(left), len(replaced), tuple(problems), tuple(notes))

    def about(self, *metrics: str) -> pd.DataFrame:
        """The rows of some metrics, text as it is."""
        own = self.rows[self.rows["metric"].isin(metrics)]
        return own.astype({name: object for name, kind in own.dtypes.items() if kind == "category"})

    @cached_property
    def statistics(self) -> Statistics:
        """The settings that every run's rows were computed with; the analysis goes on with them.

        Raises:
            VLMQError: the runs differ in them, or one does not say.
        """
        found: dict[Statistics, str] = {}
        for run in self.runs:
            found.setdefault(run.store.statistics(run.run_id), run.run_id)
        if len(found) > 1:
            (first, one), (second, other), *_ = found.items()
            raise VLMQError(
                f"runs '{one}' ({first}) and '{other}' ({second}) were evaluated with different statistics and cannot be compared; "
                "run one again with the other's, or keep them in separate studies"
            )
        return next(iter(found), Statistics())

    @cached_property
    def takes_samples(self) -> bool:
        """Whether comparisons are made from samples: where all runs kept theirs, and no VLM has more than :data:`MANY_OF_ONE_VLM`."""
        most = max(Counter(map(self.vlm_of, self.runs)).values(), default=0)
        return most <= MANY_OF_ONE_VLM and all(run.store.keeps_samples(run.run_id) for run in self.runs)

    @cached_property
    def evaluations(self) -> int:
        """Evaluation runs (model, data set, score) in these runs, see :mod:`lightning_vlmq.results.counting`."""
        counted = [run.store.facts(run.run_id).get("evaluations") for run in self.runs]
        return evaluations_in(self.rows) if None in counted else int(sum(filter(None, counted)))

    @cached_property
    def vlms(self) -> list[str]:
        """Names of the VLMs, with ``@weights`` only where one architecture comes with several weights. Sorted."""
        return sorted({self.vlm_of(run) for run in self.runs})

    @cached_property
    def _ambiguous(self) -> set[str]:
        weights = {(run.key.model, run.key.pretrained) for run in self.runs}
        models = [model for model, _ in weights]
        return {model for model in models if models.count(model) > 1}

    def vlm_of(self, run: StoredRun) -> str:
        """The name that tells the run's VLM from the study's others; random weights are always said."""
        key = run.key
        if key.pretrained == RANDOM:
            return f"{key.model} (random weights)"
        return f"{key.model}@{key.pretrained}" if key.model in self._ambiguous else key.model

    def runs_of(self, vlm: str) -> tuple[list[StoredRun], list[StoredRun]]:
        """Full-precision runs of a VLM, and all others: quantized ones, and those with a tuned logit scale."""
        own = [run for run in self.runs if self.vlm_of(run) == vlm]
        return [r for r in own if r.key.is_full_precision], [r for r in own if not r.key.is_full_precision]

    @cached_property
    def settings(self) -> list[Setting]:
        """Every quantized setting that some VLM was run with, in display order; without those that differ by the logit scale alone."""
        found = {run.setting for run in self.runs if not run.key.is_full_precision and not run.setting.is_tuned}
        return sorted(found, key=lambda s: s.sort_key)


def needed_rows() -> pc.Expression:
    """Which rows a study of many runs is analysed from.

    Those of whole roles, of the in-distribution set (what runs recorded about their spectra among them), of full precision, of AUROC, and
    of accuracy on :data:`SHIFT_SETS`.
    """
    is_full = (pc.field("method") == FULL_PRECISION) & ~pc.field("is_tuned")
    of_roles = (pc.field("dataset") == "") | (pc.field("role") == "id")
    is_shifted = pc.field("dataset").isin(list(SHIFT_SETS)) & (pc.field("metric") == "top1")
    return of_roles | is_full | is_shifted | pc.field("metric").isin(["auroc", "delta_auroc"])


def reference_of(run: StoredRun, references: list[StoredRun]) -> StoredRun | None:
    """The full-precision run to compare with: the one of the same seed, else the one of the smallest seed."""
    same = [reference for reference in references if reference.key.seed == run.key.seed]
    return next(iter(same or sorted(references, key=lambda reference: reference.key.seed)), None)


def align(runs: list[StoredRun]) -> dict[str, list[SampleMatrix]]:
    """Samples of several runs of one VLM side by side, by role. The first run says which data sets there are.

    Raises:
        VLMQError: a run was evaluated on other samples of a data set than the first.
    """
    loaded = [run.samples() for run in runs]
    matrices: dict[str, list[SampleMatrix]] = {}
    for where, first in loaded[0].items():
        tables: dict[int, Columns] = {}
        for number, samples in enumerate(loaded):
            if where not in samples:
                continue
            for column in ("index", "target"):
                if not np.array_equal(first[column], samples[where][column]):
                    raise VLMQError(
                        f"run '{runs[number].run_id}' has other samples of '{where.dataset}' than '{runs[0].run_id}'; "
                        "evaluate both on the same data (delete one and run the study again)"
                    )
            tables[number] = samples[where]
        matrices.setdefault(where.role, []).append(SampleMatrix(where, tables, len(runs)))
    return matrices
