"""One self-contained HTML page from a study's stored results; nothing is computed from models or data here.

Usage:
    python -m lightning_vlmq.study.report.page logs/demo
"""

from __future__ import annotations

import argparse
import os
import sys
from html import escape
from pathlib import Path
from string import Template

import numpy as np

from lightning_vlmq.core.atomic import write_text
from lightning_vlmq.core.errors import VLMQError, in_one_line
from lightning_vlmq.statistics import FALSE_DISCOVERY_RATE
from lightning_vlmq.study.analysis.comparison import StudyAnalysis, analyse
from lightning_vlmq.study.analysis.runs import StudyResults
from lightning_vlmq.study.report.figures.overview import overview
from lightning_vlmq.study.report.figures.style import as_png
from lightning_vlmq.study.report.numbers import numbers_file, write_numbers
from lightning_vlmq.study.report.sections import LINKS, sections

TEMPLATE = Path(__file__).with_name("page.html")


def build_report(root: str | os.PathLike[str], readme_figure: str | os.PathLike[str] | None = None) -> Path:
    """Analyse a study's store and write its report.

    Args:
        root: the study's folder, e.g. ``logs/demo``.
        readme_figure: where to save the overview figure as PNG too.

    Returns:
        ``<root>/report.html``; ``<root>/comparisons.csv`` (``.parquet`` of many) beside it holds every comparison as numbers.

    Raises:
        VLMQError: there are no results, or a part of the store cannot be read.
    """
    analysis = analyse(StudyResults.load(Path(root)))
    if readme_figure is not None:
        save_overview(analysis, Path(readme_figure))
    return write_report(analysis)


def save_overview(analysis: StudyAnalysis, path: Path) -> None:
    """Write the overview figure as PNG. Raises :class:`VLMQError` if there is nothing to compare."""
    figure = overview(analysis)
    if figure is None:
        raise VLMQError(f"'{analysis.results.root}' has no quantized run beside a full-precision one; nothing to draw")
    as_png(figure, path)


def write_report(analysis: StudyAnalysis) -> Path:
    """Write ``report.html`` and the comparisons as numbers into the study's folder; returns the page's path."""
    root = analysis.results.root
    write_numbers(analysis)
    page = root / "report.html"
    write_text(page, _page(analysis))
    return page


def _page(analysis: StudyAnalysis) -> str:
    name = escape(analysis.results.root.name)
    shown = [(anchor, title, body) for anchor, title, body in sections(analysis) if body]
    links = "".join(f"<a href='#{anchor}'>{LINKS.get(anchor, title)}</a>" for anchor, title, _ in shown)
    content = "".join(f"<section id='{anchor}'><h2>{title}</h2>{body}</section>" for anchor, title, body in shown)
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    parts = {"facts": _facts(analysis), "links": links, "content": _warnings(analysis) + content}
    return template.substitute(name=name, numbers=numbers_file(analysis), **parts)


def _facts(analysis: StudyAnalysis) -> str:
    results = analysis.results
    p_values, q_values = (
        analysis.comparisons.numbers[name][analysis.comparisons.stands_for_itself] for name in ("p_value", "q_value")
    )
    quantized = [setting for setting in results.settings if setting.is_quantization]
    others = len(results.settings) - len(quantized)
    tuned = sum(run.setting.is_tuned for run in results.runs)
    facts = {
        "runs": f"{len(results.runs) - tuned:,}",
        "VLMs": f"{len(results.vlms):,}",
        "evaluation runs": f"{results.evaluations:,}",
        "quantized settings": f"{len(quantized):,}",
        **({"controls and surgeries": f"{others:,}"} if others else {}),
        **({"logit scales tuned": f"{tuned:,}"} if tuned else {}),
        "result rows": f"{results.n_rows:,}",
        "comparisons tested": f"{analysis.n_tests:,}",
        "significant (5 % FDR)": f"{(q_values[~np.isnan(p_values)] < FALSE_DISCOVERY_RATE).sum():,}",
    }
    return "<dl>" + "".join(f"<div><dd>{value}</dd><dt>{title}</dt></div>" for title, value in facts.items()) + "</dl>"


def _warnings(analysis: StudyAnalysis) -> str:
    notes = [f"Left out: {escape(problem)}" for problem in analysis.results.problems]
    notes += map(escape, analysis.results.notes)
    if not analysis.results.takes_samples:
        notes.append(
            f"Made from the rows of {len(analysis.results.runs):,} runs alone, not from their samples: every value, change and test is as "
            "with them; means over VLMs have the widest interval that common images allow, and figures that need samples are left out, as "
            "are verdicts on controls."
        )
    if analysis.unreferenced:
        names = ", ".join(escape(vlm) for vlm in analysis.unreferenced)
        notes.append(f"No full-precision run of {names}: nothing of theirs is compared.")
    cells = len(analysis.vlms) * len(analysis.settings)
    present = analysis.comparisons.cells(analysis.settings)
    if present < cells:
        notes.append(f"{cells - present} of {cells} cells of the grid have no results yet; averages leave them out.")
    return "".join(f"<p class='warning'>{note}</p>" for note in notes)


def main(arguments: list[str] | None = None) -> None:
    """Command line: write the report of a study's folder."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_vlmq.study.report.page", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("root", help="the study's folder, e.g. logs/demo")
    parser.add_argument("--readme-figure", metavar="PNG", help="save the overview figure here too")
    options = parser.parse_args(arguments)
    try:
        print(build_report(options.root, options.readme_figure))
    except (VLMQError, OSError) as error:
        if (said := in_one_line(error)) is None:
            raise
        print(f"vlmq-study: error: {said}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
