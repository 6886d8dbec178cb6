"""The results store: one Parquet part per run, appended atomically, read by the study's runner and report.

Three files belong to a run, under the store's root (``logs/<study>``):

* ``results/<run_id>.parquet``: long-form rows, one per data set, score and metric (:data:`ROW_SCHEMA`);
* ``samples/<run_id>.parquet``: per-sample records (:data:`SAMPLE_SCHEMA` and one float column per OOD score);
* ``curves/<run_id>.parquet``: curves such as singular-value spectra (:data:`CURVE_SCHEMA`).

Runs that :meth:`ResultsStore.compact` has packed lie in ``packs/``, many in one file, see :mod:`~lightning_vlmq.results.packs`; whoever
reads sees no difference.

Each is written under a temporary name and moved into place, the results last, with checksums of its pages and a digest of its
content: **a run is done if and only if all its files are there and hold what was written**. Writers need no lock, because no two
runs share a file.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lightning_vlmq.core.errors import VLMQError, unknown
from lightning_vlmq.core.identity import first_difference
from lightning_vlmq.core.roles import ROLES
from lightning_vlmq.results.counting import evaluations_in
from lightning_vlmq.results.loose import LooseRuns
from lightning_vlmq.results.packing import packing
from lightning_vlmq.results.packs import Packs
from lightning_vlmq.results.parts import PARTS, as_table, check_rows, write_part
from lightning_vlmq.results.said import Said, say
from lightning_vlmq.results.schema import CURVE_SCHEMA, ROW_SCHEMA, SAMPLE_SCHEMA
from lightning_vlmq.statistics import Statistics

log = logging.getLogger(__name__)

AS_PUBLISHED = Statistics()


class ResultsStore:
    """Append-only results of a study, one set of Parquet parts per run.

    Args:
        root: the study's folder, e.g. ``logs/demo``. It is created by the first write.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self._loose, self._packs = LooseRuns(self.root), Packs(self.root)

    def write(
        self,
        run_id: str,
        rows: pd.DataFrame,
        samples: pd.DataFrame,
        curves: pd.DataFrame,
        seconds: float | None = None,
        statistics: Statistics = AS_PUBLISHED,
        identity: Mapping[str, Any] | None = None,
        companions: Sequence[str] = (),
        facts: Mapping[str, float] | None = None,
        source: str = "",
    ) -> None:
        """File a finished run. Whoever is killed on the way leaves a run that does not count as done.

        Args:
            run_id: the run's file name, letters, digits, ``.``, ``_`` and ``-``.
            rows: results, columns as in :data:`ROW_SCHEMA` in any order, at least one row.
            samples: per-sample records, columns as in :data:`SAMPLE_SCHEMA` and one per OOD score; may be empty.
            curves: points, columns as in :data:`CURVE_SCHEMA`; may be empty.
            seconds: how long the model took to make, see :meth:`seconds`.
            statistics: the settings that the rows were computed with.
            identity: what decides the numbers, see :func:`~lightning_vlmq.results.identity.run_identity`.
            companions: runs filed before as parts of this one, without which it does not count as done.
            facts: numbers about the making of the run, see :meth:`facts`; its evaluation runs are counted here.
            source: where the weights came from, see :meth:`source`.

        Raises:
            VLMQError: a column is missing, unknown or of the wrong type, a row is there twice, a role is unknown, or
                the rows belong to another run or to several.
        """
        if rows.empty:
            raise VLMQError(f"run '{run_id}' has no results rows; a run without results is not stored")
        row_table = as_table(rows, ROW_SCHEMA, "results")
        scores = [pa.field(str(name), pa.float32()) for name in samples.columns if name not in SAMPLE_SCHEMA.names]
        sample_table = as_table(samples, pa.schema([*SAMPLE_SCHEMA, *scores]), "samples")
        curve_table = as_table(curves, CURVE_SCHEMA, "curves")
        check_rows(run_id, rows)
        sample_roles = set(samples["role"].unique()) if len(samples) else set()
        for role in sorted((set(rows["role"].unique()) - {""}) | sample_roles):
            if role not in ROLES:
                raise unknown("role", role, ROLES)
        siblings = {
            "samples": write_part(self._loose.path("samples", run_id), sample_table, {}),
            "curves": write_part(self._loose.path("curves", run_id), curve_table, {}),
        }
        counted = {**(facts or {}), "evaluations": evaluations_in(row_table)}
        said = say(statistics, identity, companions, siblings, counted, seconds, source)
        write_part(self._loose.path("results", run_id), row_table, said)

    def has(self, run_id: str) -> bool:
        """Whether the run is done: every part of it is there and holds what was written, also those of its companions.

        A part that does not (a full disk, a broken copy, a flipped bit) makes the run count as not done, so that running the
        study again replaces it and nothing else.
        """
        return not self.problems(run_id)

    def problems(self, run_id: str) -> list[str]:
        """Why a run does not count: one line for each part of it that is bad, with the file's path. Empty for a sound run."""
        found, packed = self._problems_loose(run_id), self._packs.runs().get(run_id)
        if packed is None or not found:
            return found
        own = [why] if (why := self._packs.problem_of(packed.pack)) else []
        return own + [why for name in Said(packed.said, run_id).companions for why in self.problems(name)]

    def _problems_loose(self, run_id: str) -> list[str]:
        own, companions = self._loose.examine(run_id)
        return own + [why for name in companions for why in self.problems(name)]

    def sound(self) -> tuple[list[str], list[str]]:
        """Run ids that count, sorted, and one line for each bad part of the others and for each foreign file."""
        ids = set(self.run_ids())
        runs, bad = list[str](), self._packs.problems() + self._loose.strays(ids)
        for run_id in sorted(ids):
            if why := self.problems(run_id):
                bad += why
            else:
                runs.append(run_id)
        return runs, list(dict.fromkeys(bad))

    def identity(self, run_id: str) -> dict[str, Any]:
        """What decided a run's numbers, as it was filed. Raises :class:`VLMQError` like :meth:`rows`."""
        return self._said(run_id).identity

    def require_same(self, run_id: str, identity: Any) -> None:
        """Check that a run of this name, if there is one, is the experiment with this identity: only then may it be written again.

        Raises:
            VLMQError: it is another; the message names the first difference.
        """
        if not self.has(run_id):
            return
        if (difference := first_difference(self.identity(run_id), identity)) is not None:
            raise VLMQError(
                f"'{self.root}' holds another run '{run_id}' ({difference}); choose another --results.run_id or --results.root, "
                f"or delete {self._loose.path('results', run_id)}"
            )

    def require_name(self, run_id: str) -> None:
        """Raise :class:`VLMQError` for what cannot be a run's file name."""
        self._loose.path("results", run_id)

    def run_ids(self) -> list[str]:
        """Run ids with a results file, sorted. Empty for a store nothing was written to."""
        return sorted({*self._loose.ids(), *self._packs.runs()})

    def compact(self, keeps_samples: bool = True) -> int:
        """Pack the runs that lie in files of their own; returns how many. Others may read and file runs meanwhile.

        What is damaged, or of a foreign name, stays where it is, and is named in the log where it is among the packs.

        Whoever is killed on the way leaves every run in its own files, in a pack, or in both, which counts once. A run that was packed
        without its samples and filed again is packed again, with them.

        Args:
            keeps_samples: whether per-sample records are packed too; without, a report takes what it can from the rows.

        Raises:
            VLMQError: the disk does not take it, or somebody else packs at this moment.
        """
        with packing(self._packs) as packer:
            loose = [run_id for run_id in self._loose.ids() if not self._problems_loose(run_id)]
            fresh = [run_id for run_id in loose if not self._is_packed(run_id, keeps_samples)]
            packer.pack(fresh, self._loose.read, keeps_samples)
            for run_id in self._loose.ids():
                if self._is_packed(run_id, keeps_samples and run_id in loose):  # a damaged one has no samples to lose
                    self._loose.remove(run_id)
            for kind in PARTS:  # what somebody who was killed here has left
                for path in (self.root / kind).glob("[!.]*.parquet"):
                    if self._is_packed(path.stem, keeps_samples) and not self._loose.has(path.stem):
                        path.unlink(missing_ok=True)
            for problem in self._packs.problems():
                log.warning("not packed: %s", problem)
        return len(fresh)

    def export(self, run_ids: Sequence[str], root: Path, keep: pc.Expression | None = None) -> None:
        """Pack the rows of runs, without samples, into the store at another root, where they then count as done.

        Numbers are rounded to float32's digits, which takes half the room.

        Args:
            run_ids: the runs.
            root: the other store's folder.
            keep: which rows, an expression over the columns; all if not given.

        Raises:
            VLMQError: like :meth:`rows`, or the disk does not take it.
        """

        def read(kind: str, run_id: str) -> pa.Table:
            table = self._read(kind, run_id)
            if kind != "results":
                return table
            table = table if keep is None else table.filter(keep)
            for name in ("value", "stderr"):
                rounded = table[name].cast(pa.float32(), safe=False).cast(pa.float64())
                table = table.set_column(table.column_names.index(name), name, rounded)
            return table

        with packing(ResultsStore(root)._packs) as packer:
            packer.pack(list(run_ids), read, keeps_samples=False)

    def _is_packed(self, run_id: str, with_samples: bool) -> bool:
        packed = self._packs.runs().get(run_id)
        if packed is None or self._packs.problem_of(packed.pack):
            return False
        return "samples" in packed.spans or not with_samples

    def written(self, run_id: str) -> datetime:
        """When the run was filed (UTC), by the clock of the machine that filed it. Raises :class:`VLMQError` like :meth:`rows`."""
        return self._said(run_id).written

    def statistics(self, run_id: str) -> Statistics:
        """The settings that a run's rows were computed with. Raises :class:`VLMQError` like :meth:`rows`, or where they are not said."""
        return self._said(run_id).statistics

    def seconds(self, run_id: str) -> tuple[float, int]:
        """How long a run's model took to quantize (and train), in seconds, and on how many CPU cores. Raises like :meth:`statistics`."""
        return self._said(run_id).seconds

    def source(self, run_id: str) -> str:
        """Where a run's weights came from (tag, file, repository with its commit); empty where it does not say. Raises likewise."""
        return self._said(run_id).source

    def facts(self, run_id: str) -> dict[str, float]:
        """Numbers about the making of a run, by name.

        ``evaluations`` (evaluation runs in its rows), ``written`` (when, seconds of the epoch), and what its
        writer counted and timed. Read from the file's end alone; whether the rest is sound is not looked at.

        Raises:
            VLMQError: the file is not there or damaged.
        """
        path = self._loose.path("results", run_id)
        packed = None if path.exists() else self._packs.runs().get(run_id)
        try:
            metadata = pq.read_schema(path).metadata or {} if packed is None else packed.said
            return Said(metadata, str(path)).facts
        except (pa.ArrowException, OSError, ValueError, TypeError, AttributeError) as error:
            raise VLMQError(f"{path} cannot be read ({type(error).__name__}); run the study again") from error

    def rows(self, run_ids: Iterable[str] | None = None) -> pd.DataFrame:
        """Results rows of the given runs (default: all that are sound, see :meth:`sound`), with the columns of :data:`ROW_SCHEMA`.

        Raises:
            VLMQError: a run is not there, or a part cannot be read (the message names the file to delete).
        """
        if run_ids is None:
            names, problems = self.sound()
            for problem in problems:
                log.warning("left out: %s", problem)
        else:
            names = list(run_ids)
        return self.table(names, ROW_SCHEMA.names).cast(ROW_SCHEMA).to_pandas()

    def table(self, run_ids: Sequence[str], columns: Sequence[str], keep: pc.Expression | None = None) -> pa.Table:
        """Columns of the rows of runs, text as dictionaries: what a large store is read by.

        Args:
            run_ids: the runs; those in files of their own come first, packed ones after them.
            columns: names of :data:`ROW_SCHEMA`.
            keep: which rows, an expression over any columns; all if not given.

        Raises:
            VLMQError: like :meth:`rows`.
        """
        packed = [run_id for run_id in run_ids if not self._loose.has(run_id) and run_id in self._packs.runs()]
        own = set(packed)
        names = [name for name in columns if pa.types.is_string(ROW_SCHEMA.field(name).type)]
        text = {name: pa.dictionary(pa.int32(), pa.string()) for name in names}
        schema = pa.schema([pa.field(name, text.get(name, ROW_SCHEMA.field(name).type)) for name in columns])
        tables = []
        for run_id in run_ids:
            if run_id not in own:
                table = self._read("results", run_id)
                tables.append((table if keep is None else table.filter(keep)).select(list(columns)))
        tables += self._packs.batches(packed, columns, keep)
        cast = [table.replace_schema_metadata(None).cast(schema) for table in tables]
        return pa.concat_tables(cast or [schema.empty_table()]).unify_dictionaries()

    def n_rows(self, run_ids: Iterable[str]) -> int:
        """Number of results rows of runs, from what their files say of themselves. Raises ``OSError`` where one cannot be read."""
        packed = self._packs.runs()
        total = 0
        for run_id in run_ids:
            if run_id in packed and not self._loose.has(run_id):
                start, stop = packed[run_id].spans["results"]
                total += stop - start
            else:
                total += pq.read_metadata(self._loose.path("results", run_id)).num_rows
        return total

    def keeps_samples(self, run_id: str) -> bool:
        """Whether the run's samples are there: packing may leave them out."""
        packed = None if self._loose.has(run_id) else self._packs.runs().get(run_id)
        return packed is None or "samples" in packed.spans

    def samples(self, run_id: str) -> pd.DataFrame:
        """Per-sample records of one run; text columns are categorical. Raises like :meth:`rows`."""
        return self._read("samples", run_id).to_pandas(strings_to_categorical=True)

    def curves(self, run_id: str) -> pd.DataFrame:
        """Curves of one run; text columns are categorical. Raises like :meth:`rows`."""
        return self._read("curves", run_id).to_pandas(strings_to_categorical=True)

    def _read(self, kind: str, run_id: str) -> pa.Table:
        if run_id in self._packs.runs() and (not self._loose.has(run_id) or self._problems_loose(run_id)):
            return self._packs.read(kind, run_id)
        return self._loose.read(kind, run_id)

    def _said(self, run_id: str) -> Said:
        packed = None if self._loose.has(run_id) else self._packs.runs().get(run_id)
        metadata = (self._read("results", run_id).schema.metadata or {}) if packed is None else packed.said
        return Said(metadata, f"run '{run_id}' in '{self.root}'")
