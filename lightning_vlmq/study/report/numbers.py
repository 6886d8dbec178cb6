"""Every comparison of a study as numbers, in one file beside the page: CSV, or Parquet where there are too many of them."""

from __future__ import annotations

from lightning_vlmq.core.atomic import replacing, write_text
from lightning_vlmq.study.analysis.comparison import StudyAnalysis
from lightning_vlmq.study.report.notation import csv_text

MOST_CELLS = 20_000
"""With more comparisons, the page leaves the tables of all of them to the file beside it, and that is Parquet, a tenth as large."""


def are_many(analysis: StudyAnalysis) -> bool:
    """Whether there are more comparisons than a page shows one by one."""
    return len(analysis.comparisons) > MOST_CELLS


def numbers_file(analysis: StudyAnalysis) -> str:
    """The file's name, in the study's folder."""
    return f"comparisons.{'parquet' if are_many(analysis) else 'csv'}"


def write_numbers(analysis: StudyAnalysis) -> None:
    """Write the file, and take away one of the other kind, which an earlier report left."""
    root, name, table = analysis.results.root, numbers_file(analysis), analysis.comparisons.table()
    if are_many(analysis):
        with replacing(root / name) as partial:
            table.to_parquet(partial, compression="zstd", index=False)
    else:
        write_text(root / name, csv_text(table))
    for other in {"comparisons.csv", "comparisons.parquet"} - {name}:
        (root / other).unlink(missing_ok=True)
