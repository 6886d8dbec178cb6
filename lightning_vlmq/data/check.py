"""What of the data is there, complete and readable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from rich.markup import escape
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data.datamodule import ReliabilityDataModule
from lightning_vlmq.data.filedata import FileData
from lightning_vlmq.data.images import FileImages, UnreadableImage
from lightning_vlmq.data.overlap import require_disjoint
from lightning_vlmq.data.readers import Reader
from lightning_vlmq.data.readers.base import drawn_rows
from lightning_vlmq.data.sets import EvalSet, ImageSet, as_is


@dataclass(frozen=True)
class Finding:
    """What was found of one data set, or of all together.

    Attributes:
        name: the set, or the reader that found none.
        role: the set's role.
        n: number of images.
        tried: how many of them were decoded.
        problem: what is wrong, empty where nothing is.
    """

    name: str
    role: str = ""
    n: int = 0
    tried: int = 0
    problem: str = ""


def check(data: ReliabilityDataModule, sample: int = 16, full: bool = False) -> list[Finding]:
    """Look at every data set of a data module by itself, then at all together.

    Args:
        data: the data module, not set up.
        sample: how many images of each set to decode, drawn with a fixed seed.
        full: decode every image instead, in the loader's processes.

    Returns:
        A finding a set, in order; the caption pairs; and what is wrong with their combination, if anything.
    """
    tried = None if full else sample
    workers = data.num_workers if full else 0
    findings: list[Finding] = []
    sets: list[EvalSet] = []

    def attempt(name: str, step: Callable[[], None]) -> None:
        try:
            step()
        except VLMQError as error:
            findings.append(Finding(name, problem=str(error)))

    def look(found: Sequence[EvalSet]) -> None:
        sets.extend(found)
        findings.extend(_finding(s.name, s.role, s.images, tried, workers) for s in found)

    if not isinstance(data, FileData):
        attempt("data", partial(data.setup, "validate"))
        if not findings:
            look(data.eval_sets)
        return findings

    def read(reader: Reader) -> None:
        look(reader.read(data.reading))

    for reader in data.readers:
        attempt(getattr(reader, "name", type(reader).__name__), partial(read, reader))
    pairs: list[FileImages] = []
    if data.pair_reader is not None:
        attempt(type(data.pair_reader).__name__, lambda: pairs.append(data.read_pairs()))
    findings += [_finding("caption pairs", "", images, tried, workers) for images in pairs]
    if not any(finding.problem for finding in findings):
        attempt("together", lambda: data.take(sets))
        for images in pairs:
            attempt("together", partial(require_disjoint, images, sets))
    return findings or [Finding("data", problem="data.sets is empty; add a config, vlmq list data names them")]


def table(findings: Sequence[Finding]) -> Table:
    """The findings for a terminal."""
    result = Table("data set", "role", "images", "decoded", "", title="data sets")
    for f in findings:
        counts = (f"{f.n:,}", f"{f.tried:,}") if f.n else ("", "")
        result.add_row(escape(f.name), f.role, *counts, escape(f.problem) if f.problem else "[green]ok[/]")
    return result


def _finding(name: str, role: str, images: ImageSet, sample: int | None, workers: int) -> Finding:
    if not isinstance(images, FileImages):
        return Finding(name, role, len(images), len(images))  # in memory: decoded already
    n = len(images)
    drawn = drawn_rows(n, sample, seed=0)
    probe = DataLoader(_Probe(images.subset(drawn)), 64, num_workers=workers, collate_fn=as_is)
    bad = [problem for problems in probe for problem in problems]
    problem = bad[0] + (f" ({len(bad)} such images of {len(drawn)})" if len(bad) > 1 else "") if bad else ""
    return Finding(name, role, n, len(drawn), problem)


class _Probe(Dataset[list[str]]):
    """What is wrong with the images that cannot be read, a line each."""

    def __init__(self, images: FileImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, rows: list[int]) -> list[str]:
        problems = []
        for row in rows:
            try:
                self.images.decode(row)
            except UnreadableImage as error:
                problems.append(str(error))
        return problems
