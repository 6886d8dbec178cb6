"""Runs that lie in files of their own: three for each, found by name, each sound by itself and of the same run as the others."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

import pyarrow as pa

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.names import one_line
from lightning_vlmq.results.parts import DIGEST, PARTS, read_part
from lightning_vlmq.results.said import Said

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,149}")


class LooseRuns:
    """The runs of a store that are not packed.

    Args:
        root: the store's folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, kind: str, run_id: str) -> Path:
        """Where a run's part lies or would lie. Raises :class:`VLMQError` for what cannot be a run's file name."""
        if not self.is_name(run_id):
            raise VLMQError(f"'{run_id[:80]}' cannot be a run id; use up to 150 letters, digits, '.', '_' and '-'")
        return self.root / kind / f"{run_id}.parquet"

    @staticmethod
    def is_name(run_id: str) -> bool:
        """Whether this can be a run's file name."""
        return bool(_NAME.fullmatch(run_id))

    def ids(self) -> list[str]:
        """Run ids with a results file, sorted; files of foreign names are none, see :meth:`strays`."""
        return sorted(path.stem for path in (self.root / "results").glob("*.parquet") if self.is_name(path.stem))

    def has(self, run_id: str) -> bool:
        """Whether there is a results file of this name, sound or not."""
        return self.path("results", run_id).exists()

    def read(self, kind: str, run_id: str) -> pa.Table:
        """One part of a run. Raises :class:`VLMQError` where it is missing or does not hold what was written."""
        path = self.path(kind, run_id)
        if not path.exists():
            raise VLMQError(f"the store has no {kind} of run '{run_id}': {path} is missing; run it (again)")
        return read_part(path, PARTS[kind], f"delete {self.path('results', run_id)} and run the study again")

    def examine(self, run_id: str) -> tuple[list[str], list[str]]:
        """One line for each bad part of a run, with the file's path; and the runs without which it does not count either."""
        found: list[str] = []
        tables: dict[str, pa.Table] = {}
        for kind in PARTS:
            try:
                tables[kind] = self.read(kind, run_id)
            except VLMQError as error:
                if self.path(kind, run_id).exists() or not found:
                    found.append(str(error))  # what is missing beside a file that is no run's says nothing more
        if "results" not in tables:
            return found, []
        path, companions = self.path("results", run_id), list[str]()
        try:
            said = Said(tables["results"].schema.metadata, str(path))
            siblings, companions, _ = said.siblings, said.companions, said.written
            for kind in tables.keys() - {"results"}:
                if tables[kind].schema.metadata[DIGEST].decode() != siblings[kind]:
                    found.append(f"{self.path(kind, run_id)} is not of the same run as {path}; run '{run_id}' again")
        except (KeyError, ValueError, TypeError, VLMQError) as error:
            return [
                *found,
                f"{path} was not written by this version's results store ({type(error).__name__}: {error})",
            ], []
        names = set(tables["results"]["run_id"].to_pylist())
        if names != {run_id}:
            found.append(f"{path} holds {f'run {min(names)}' if names else 'no rows'}: it is a copy; delete it")
        return found, companions

    def strays(self, known: Collection[str]) -> list[str]:
        """One line for each file that is no part of a run: of a foreign name, or of a run that was never filed.

        Args:
            known: ids of runs that were filed, packed ones too.
        """
        bad = []
        for kind in PARTS:
            for path in sorted((self.root / kind).glob("[!.]*")):
                if path.suffix != ".parquet" or not self.is_name(path.stem):
                    bad.append(f"{one_line(str(path))} is no part of a results store; move it away")
                elif path.stem not in known:
                    bad.append(f"{path} belongs to no run that was filed; run '{path.stem}' again, or delete it")
        return bad

    def remove(self, run_id: str) -> None:
        """Delete a run's files, the results first: without them the others do not count."""
        for kind in PARTS:
            self.path(kind, run_id).unlink(missing_ok=True)
