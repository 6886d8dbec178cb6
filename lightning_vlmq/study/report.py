"""One self-contained HTML page from a study's stored results; nothing is computed from models or data here.

Usage:
    python -m lightning_vlmq.study.report logs/demo
"""

from __future__ import annotations

import argparse
import base64
import os
import sys
from html import escape
from pathlib import Path
from string import Template

from matplotlib.figure import Figure

from lightning_vlmq.errors import VLMQError
from lightning_vlmq.study import figures, tables
from lightning_vlmq.study.comparison import StudyAnalysis, analyse
from lightning_vlmq.study.figures.calibration import MIN_COUNT
from lightning_vlmq.study.figures.spectra import read_spectra
from lightning_vlmq.study.measures import N_BINS, N_RESAMPLES, N_RESAMPLES_SLOW
from lightning_vlmq.study.published import compare_with_published
from lightning_vlmq.study.results import StudyResults

TEMPLATE = Path(__file__).with_name("report.html")


def build_report(root: str | os.PathLike[str], readme_figure: str | os.PathLike[str] | None = None) -> Path:
    """Analyse a study's store and write its report.

    Args:
        root: the study's folder, e.g. ``logs/demo``.
        readme_figure: where to save the overview figure as PNG too.

    Returns:
        ``<root>/report.html``; ``<root>/comparisons.csv`` beside it holds every comparison as numbers.

    Raises:
        VLMQError: there are no results, or a part of the store cannot be read.
    """
    analysis = analyse(StudyResults.load(Path(root)))
    if readme_figure is not None:
        save_overview(analysis, Path(readme_figure))
    return write_report(analysis)


def save_overview(analysis: StudyAnalysis, path: Path) -> None:
    """Write the overview figure as PNG. Raises :class:`VLMQError` if there is nothing to compare."""
    figure = figures.overview(analysis)
    if figure is None:
        raise VLMQError(f"'{analysis.results.root}' has no quantized run beside a full-precision one; nothing to draw")
    figures.as_png(figure, path)


def write_report(analysis: StudyAnalysis) -> Path:
    """Write ``report.html`` and ``comparisons.csv`` into the study's folder; returns the page's path."""
    root = analysis.results.root
    _replace(root / "comparisons.csv", analysis.table().to_csv(index=False))
    page = root / "report.html"
    _replace(page, _page(analysis))
    return page


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _page(analysis: StudyAnalysis) -> str:
    name = escape(analysis.results.root.name)
    sections = [*_figure_sections(analysis), *_table_sections(analysis), _provenance(analysis)]
    shown = [(anchor, title, body) for anchor, title, body in sections if body]
    links = "".join(f"<a href='#{anchor}'>{_LINKS.get(anchor, title)}</a>" for anchor, title, _ in shown)
    content = "".join(f"<section id='{anchor}'><h2>{title}</h2>{body}</section>" for anchor, title, body in shown)
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(name=name, facts=_facts(analysis), links=links, content=_warnings(analysis) + content)


def _facts(analysis: StudyAnalysis) -> str:
    results = analysis.results
    tested = [c for c in analysis.comparisons.values() if c.p_value == c.p_value]
    significant = sum(c.q_value < 0.05 for c in tested)
    facts = {
        "runs": f"{len(results.runs):,}",
        "VLMs": f"{len(results.vlms):,}",
        "quantized settings": f"{len(results.settings):,}",
        "result rows": f"{len(results.rows):,}",
        "comparisons tested": f"{len(tested):,}",
        "significant (5 % FDR)": f"{significant:,}",
    }
    return "<dl>" + "".join(f"<div><dd>{value}</dd><dt>{title}</dt></div>" for title, value in facts.items()) + "</dl>"


def _warnings(analysis: StudyAnalysis) -> str:
    notes = []
    if analysis.unreferenced:
        names = ", ".join(escape(vlm) for vlm in analysis.unreferenced)
        notes.append(f"No full-precision run of {names}: nothing of theirs is compared.")
    cells = len(analysis.vlms) * len(analysis.settings)
    present = {(vlm, setting) for vlm, setting, _ in analysis.comparisons if setting in set(analysis.settings)}
    if len(present) < cells:
        notes.append(
            f"{cells - len(present)} of {cells} cells of the grid have no results yet; averages leave them out."
        )
    return "".join(f"<p class='warning'>{note}</p>" for note in notes)


def _figure(figure: Figure | None, alternative: str, caption: str) -> str:
    if figure is None:
        return ""
    # As an image, not inline: identifiers inside one figure's SVG must not meet those of another.
    data = base64.b64encode(figures.as_svg(figure).encode()).decode()
    width = round(100 * figure.get_figwidth())  # pixels at which the smallest labels read well
    least = min(width, 720) if width < 1400 else round(0.8 * width)  # what is wider than the page is scrolled
    style = f"width:{width}px;min-width:{least}px"
    image = f"<img alt='{escape(alternative, quote=True)}' style='{style}' src='data:image/svg+xml;base64,{data}'>"
    return f"<figure><div class='scroll'>{image}</div><figcaption>{caption}</figcaption></figure>"


Section = tuple[str, str, str]
"""Anchor, heading, and content; without content the section is left out."""

_LINKS = {"spurious": "Spurious", "tables": "Tables", "published": "Published", "zero-shot": "Zero-shot"}
_LINKS |= {"coverage": "Coverage", "how": "How"}


def _figure_sections(analysis: StudyAnalysis) -> list[Section]:
    overview = _figure(
        figures.overview(analysis),
        "Change against full precision in each reliability dimension, by setting and VLM",
        "Change against full precision, one panel a dimension. δ = (A<sub>FP32</sub> − A<sub>quantized</sub>) / "
        "A<sub>FP32</sub>; every panel is turned so that <b>right is worse</b>. Small marks: one VLM each; diamonds: mean "
        "over VLMs; lines: 95 % paired bootstrap intervals over test images.",
    )
    slopes = _figure(
        figures.spurious_gap_slopes(analysis),
        "Relative spurious gap of full precision and each quantized setting",
        "Relative spurious gap, RSG = (accuracy on common − on counter backgrounds) / accuracy on common. Bars: 95 % "
        "intervals of the change. Filled marks: the change is significant after correction.",
    )
    reliability = _figure(
        figures.reliability_diagrams(analysis),
        "Reliability diagrams of full precision and quantized models",
        f"Accuracy over mean confidence in {N_BINS} equal-width bins of the in-distribution images (bins of fewer than "
        f"{MIN_COUNT} left out). Below the diagonal: overconfident; above: underconfident.",
    )
    curves = _figure(
        figures.corruption_curves(analysis),
        "Accuracy over corruption severity",
        "Top-1 accuracy over severity, mean over corruptions; severity 0 is the in-distribution set. Band: 95 % interval of "
        "full precision alone; changes are paired and known more precisely, see the tables.",
    )
    changes = _figure(
        figures.corruption_changes(analysis),
        "Accuracy change by corruption and setting",
        "Change of top-1 accuracy by corruption in points, mean over severities and VLMs.",
    )
    flips = _figure(
        figures.prediction_flips(analysis),
        "Share of changed predictions by kind",
        "Predictions on in-distribution images that quantization changes. The rest agrees with full precision.",
    )
    return [
        ("overview", "Overview", overview + _averages(analysis) if overview else ""),
        ("calibration", "Calibration", reliability),
        ("spectra", "Spectra", _spectra(analysis)),
        ("spurious", "Spurious correlation", slopes),
        ("corruption", "Corruption", curves + changes),
        ("flips", "Flips", flips),
    ]


def _averages(analysis: StudyAnalysis) -> str:
    is_open = " open" if len(analysis.settings) <= 12 else ""
    table = tables.average_table(analysis)
    note = (
        "<p class='note'>Coloured where the interval, not corrected for the number of comparisons, leaves zero out.</p>"
    )
    return f"<details{is_open}><summary>Means over VLMs with 95 % intervals</summary>{note}{table}</details>"


def _spectra(analysis: StudyAnalysis) -> str:
    parts: list[str] = []
    for vlm in analysis.vlms:
        spectra = read_spectra(analysis, vlm)
        if not spectra:
            continue
        setting = next(iter(spectra))
        where = f"{escape(vlm)}, {setting.weight_bits}-bit weights, {escape(setting.scope)}"
        lines = _figure(
            figures.singular_value_ratios(spectra),
            f"Singular values of {vlm} by layer group",
            f"Singular values of the weights, mean over the layers of a group ({where}). Above: relative to the largest of "
            "full precision; below: relative to full precision at the same rank.",
        )
        heatmap = _figure(
            figures.singular_value_heatmaps(spectra),
            f"Change of singular values of {vlm} by layer and rank",
            f"log₂ ratio of quantized to full-precision singular values by layer and relative rank, 0 the largest ({where}).",
        )
        is_open = "" if parts else " open"
        parts.append(f"<details{is_open}><summary>{escape(vlm)}</summary>{lines}{heatmap}</details>")
    return "".join(parts)


def _table_sections(analysis: StudyAnalysis) -> list[Section]:
    legend = (
        "<p class='note'>Value ± standard error over test images; below it the change against full precision, red where "
        "significantly worse, green where significantly better. * q &lt; 0.05, ** q &lt; 0.01, *** q &lt; 0.001, "
        "corrected over the whole grid; hover over a cell for interval and p-value.</p>"
    )
    by_vlm = "".join(
        f"<details{'' if position else ' open'}><summary>{escape(vlm)}</summary>{tables.vlm_table(analysis, vlm)}</details>"
        for position, vlm in enumerate(analysis.vlms)
    )
    detection = tables.detection_table(analysis)
    if detection:
        detection = f"<details><summary>AUROC by data set and score (DeLong)</summary>{detection}</details>"
    claims = compare_with_published(analysis)
    published = ""
    if claims:
        published = (
            "<p class='note'>Published figures are of <i>Less Precise Can Be More Reliable</i> (ICML 2026, arXiv "
            "2509.21173): ten large VLMs, other data. Here as measured, with 95 % intervals over test images; relative "
            "changes are (A<sub>quantized</sub> − A<sub>FP32</sub>) / A<sub>FP32</sub>.</p>"
        ) + tables.published_table(claims)
    zero_shot = tables.zero_shot_table(analysis)
    if zero_shot:
        zero_shot = (
            "<p class='note'>Top-1 accuracy in percent ± standard error; corruptions are means over severities.</p>"
        ) + zero_shot
    spectrum = tables.spectrum_table(analysis)
    coverage = tables.coverage_table(analysis)
    if spectrum:
        coverage += f"<details><summary>Spectral summaries by layer group</summary>{spectrum}</details>"
    return [
        ("tables", "Every metric against full precision", legend + by_vlm + detection if by_vlm else ""),
        ("published", "Beside the published results", published),
        ("zero-shot", "Zero-shot accuracy in full precision", zero_shot),
        ("coverage", "What was quantized", coverage),
    ]


def _provenance(analysis: StudyAnalysis) -> Section:
    results = analysis.results
    versions = ", ".join(sorted(results.rows["code_version"].unique()))
    seeds = ", ".join(str(seed) for seed in sorted(results.rows["seed"].unique()))
    notes = [
        f"Code version {escape(versions)}; seed {escape(seeds)} (several seeds are averaged; intervals then still cover the "
        "sampling of test images, not of seeds).",
        "Every quantized run is compared with the full-precision run of its VLM on the same images in the same order.",
        f"Intervals: percentiles of a paired bootstrap over images, {N_RESAMPLES:,} resamples ({N_RESAMPLES_SLOW} for "
        "adaptive ECE and the OOD metrics averaged over data sets); all models see the same resamples. Resamples are centred "
        "on the estimate, because calibration errors are biased upwards in them.",
        "p-values: z = change / standard error, the bootstrap's, or DeLong's for AUROC on one data set; "
        f"Benjamini-Hochberg over all {analysis.n_tests:,} comparisons of this study.",
        f"ECE: {N_BINS} equal-width bins; adaptive ECE: {N_BINS} bins of equal mass; Brier: sum over classes, in [0, 2], "
        "shown in percent like the other fractions.",
        "<code>fpr95</code> takes in-distribution as positive (CLIP and MCM papers), <code>fpr95_openood</code> takes OOD as "
        "positive (OpenOOD v1.5). AUPR-in and AUPR-out likewise name the positive class.",
        f"Near- and far-OOD columns are means over the data sets of the role, with the score "
        f"<code>{escape(analysis.score or '–')}</code>.",
        "RSG = (A<sub>common</sub> − A<sub>counter</sub>) / A<sub>common</sub>; ΔRSG is its change in points; "
        "Vuln_add = δ<sub>counter</sub> − δ<sub>common</sub>.",
    ]
    if results.superseded:
        notes.append(
            f"{results.superseded} stored runs were run again later with another configuration and are left out."
        )
    items = "".join(f"<li>{note}</li>" for note in notes)
    return "how", "How this was made", f"<ul>{items}</ul>{tables.data_table(analysis)}"


def main(arguments: list[str] | None = None) -> None:
    """Command line: write the report of a study's folder."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_vlmq.study.report", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("root", help="the study's folder, e.g. logs/demo")
    parser.add_argument("--readme-figure", metavar="PNG", help="save the overview figure here too")
    options = parser.parse_args(arguments)
    try:
        print(build_report(options.root, options.readme_figure))
    except VLMQError as error:
        print(f"vlmq-study: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
