"""Write a study's results into docs/results.md, with figures, and keep its rows in a compact store from which a later run goes on.

Usage:
    vlmq-study study=embedded                       # as long as there is time for; the same command goes on
    python scripts/make_results_page.py logs/embedded docs/results.md

Beside the page: data/<study>/packs/*.parquet, the rows that a large study is analysed from (numbers with float32's digits), and
images/results_*.png. Copied to logs/<study>, the packs count as done runs: the same command, code and libraries run what they lack.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.names import bits_text
from lightning_vlmq.core.roles import ROLES
from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.study.analysis.claims import Claim
from lightning_vlmq.study.analysis.comparison import StudyAnalysis, analyse
from lightning_vlmq.study.analysis.groups import GroupEffect, group_effects
from lightning_vlmq.study.analysis.published import held_against
from lightning_vlmq.study.analysis.runs import StudyResults, needed_rows
from lightning_vlmq.study.analysis.training import WORTH_HEAD, WORTH_NOTE, worth_by_setting, worth_cells
from lightning_vlmq.study.report.figures.damage import effects_over_damage
from lightning_vlmq.study.report.figures.overview import overview, spurious_gap_slopes
from lightning_vlmq.study.report.figures.robustness import corruption_changes
from lightning_vlmq.study.report.figures.style import as_png
from lightning_vlmq.study.report.markdown import END, START, around_results, code_of, hardware, worked
from lightning_vlmq.study.report.notation import percent_interval

MOST_BYTES = 15e6
"""The compact store may be as large as this."""


def claims_text(claims: Sequence[Claim]) -> list[str]:
    """The claims table in Markdown."""
    lines = ["| claim | published | here | verdict | from |", "|---|---|---|---|---|"]
    for c in claims:
        estimate, interval = percent_interval(c.found.estimate, c.found.low, c.found.high)
        where = f"{c.query}; {c.n_cells:,} models of {c.found.n_clusters} VLMs"
        lines.append(f"| {c.claim} | {c.published} | {estimate} {c.unit} {interval} | **{c.verdict}** | {where} |")
    return lines


def groups_text(found: Sequence[GroupEffect]) -> list[str]:
    """Effects by group in Markdown."""
    shown = list(dict.fromkeys(e.dimension for e in found))
    by_cell = {(e.grouping, e.group, e.dimension): e for e in found}
    lines = ["| settings | " + " | ".join(f"{d.title}: {d.effect}" for d in shown) + " | pairs |"]
    lines.append("|---|" + "---|" * (len(shown) + 1))
    for grouping, group in dict.fromkeys((e.grouping, e.group) for e in found):
        own = [by_cell.get((grouping, group, dimension)) for dimension in shown]
        cells = ["–" if e is None else " ".join(percent_interval(e.found.estimate, *e.found[2:4])) for e in own]
        pairs = max(e.n_cells for e in own if e is not None)
        lines.append(f"| {grouping} {group} | " + " | ".join(cells) + f" | {pairs:,} |")
    return lines


def training_text(results: StudyResults) -> list[str]:
    """What training was worth in Markdown; nothing where nothing was trained."""
    found = worth_by_setting(results)
    if not found:
        return []
    return [
        "## What training was worth",
        "",
        WORTH_NOTE,
        "",
        f"| setting | {' | '.join(WORTH_HEAD)} |",
        f"|---|{'---:|' * len(WORTH_HEAD)}",
        *(
            f"| {bits_text(w, a)} {scope} | {' | '.join(worth_cells(worth))} |"
            for (w, a, scope), worth in found.items()
        ),
        "",
    ]


def results_text(analysis: StudyAnalysis, command: str, images: Sequence[str], data: str) -> str:
    """The page's section between its markers."""
    results = analysis.results
    bare = [run for run in results.runs if not run.key.is_tuned]
    seeds = sorted({run.key.seed for run in bare})
    lines = [
        f"`{command}` on {hardware()}: {len(bare):,} runs, {results.evaluations:,} evaluation runs, {worked(results)} of work "
        f"(h:m:s, of one process), by version {code_of(results)}; {len(results.vlms)} VLMs ({', '.join(f'`{v}`' for v in results.vlms)}), "
        f"{len(results.settings)} quantized settings, seed {', '.join(map(str, seeds))}. The rows are in `{data}`.",
        "",
        "## Beside the published results",
        "",
        "The published figures are of ten large VLMs on other data; agreement is not expected of any line. Means over VLMs, each with "
        "the mean over its settings, and 95 % intervals for other VLMs and other images; the verdict is where the interval lies, see "
        "[metrics](metrics.md#published-claims). Only the published grid counts: its sixteen methods at W8A8, W6A8 and W4A8, no planted "
        "outliers. The speed of real INT8 encoders is not among the claims: runs imitate integers, and their store holds no such time; "
        "see [benchmarks](benchmarks.md).",
        "",
        *claims_text(held_against(analysis)),
        "",
        "## Effects by kind of method, bits, scope, architecture and pre-training",
        "",
        *groups_text(group_effects(analysis)),
        "",
        *training_text(results),
        *(f"![{name.replace('_', ' ')}](images/results_{name}.png)\n" for name in images),
    ]
    return "\n".join([START, "", *lines, END])


def keep_rows(results: StudyResults, folder: Path) -> float:
    """Make a store of the rows that runs are compared by in ``folder``, in place of what is there; returns its bytes.

    Raises:
        VLMQError: it would be larger than :data:`MOST_BYTES`; nothing is changed then.
    """
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    ResultsStore(results.root).export([run.run_id for run in results.runs], fresh, needed_rows())
    size = sum(path.stat().st_size for path in fresh.rglob("*.parquet"))
    if size > MOST_BYTES:
        shutil.rmtree(fresh)
        fit = int(len(results.runs) * MOST_BYTES / size)
        raise VLMQError(
            f"the rows of {len(results.runs):,} models take {size / 1e6:.1f} MB, more than {MOST_BYTES / 1e6:.0f}; keep a beginning of the "
            f"study (about {fit:,} models fit)"
        )
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    return size


def write(root: Path, page: Path) -> list[Path]:
    """Write page, figures and compact store; returns what was written.

    Raises:
        VLMQError: the page has no markers, the store has no results, or its rows are too many.
    """
    before, after = around_results(page)
    analysis = analyse(StudyResults.load(root))
    if not any(ROLES[m.role].is_scored for m in analysis.measures):
        raise VLMQError(f"'{root}' compares nothing with full precision yet; run more of the study")
    data = page.parent / "data" / root.name
    data.parent.mkdir(parents=True, exist_ok=True)
    keep_rows(analysis.results, data)
    drawn = {"overview": overview(analysis), "damage": effects_over_damage(analysis)}
    drawn |= {"spurious": spurious_gap_slopes(analysis), "corruption": corruption_changes(analysis)}
    (page.parent / "images").mkdir(exist_ok=True)
    images = {name: figure for name, figure in drawn.items() if figure is not None}
    written = [page.parent / "images" / f"results_{name}.png" for name in images]
    for path, figure in zip(written, images.values()):
        as_png(figure, path, dpi=80)
    section = results_text(analysis, f"vlmq-study study={root.name}", list(images), f"data/{root.name}")
    page.write_text(before + section + after, encoding="utf-8")
    return [*written, data, page]


def main() -> None:
    """Command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("root", type=Path, help="the study's folder, e.g. logs/embedded")
    parser.add_argument("page", type=Path, help="the Markdown page, docs/results.md")
    options = parser.parse_args()
    try:
        written = write(options.root, options.page)
    except (VLMQError, OSError) as error:
        print(f"make_results_page: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(*written, sep="\n")


if __name__ == "__main__":
    main()
