"""What the report's page says, section by section."""

from __future__ import annotations

from html import escape

from lightning_vlmq.evaluation.headline import DEBIASED
from lightning_vlmq.evaluation.measures import METRICS
from lightning_vlmq.study.analysis.comparison import StudyAnalysis
from lightning_vlmq.study.analysis.groups import group_effects
from lightning_vlmq.study.analysis.published import held_against
from lightning_vlmq.study.report import improvement, spectral, tables, tradeoffs
from lightning_vlmq.study.report.figures.damage import effects_over_damage
from lightning_vlmq.study.report.figures.overview import overview, spurious_gap_slopes
from lightning_vlmq.study.report.figures.reliability import MIN_COUNT, reliability_diagrams, reliability_trajectories
from lightning_vlmq.study.report.figures.robustness import corruption_changes, corruption_curves, prediction_flips
from lightning_vlmq.study.report.figures.style import as_html
from lightning_vlmq.study.report.numbers import are_many, numbers_file

Section = tuple[str, str, str]
"""Anchor, heading, and content; without content the section is left out."""

LINKS = {"spurious": "Spurious", "tables": "Tables", "published": "Published", "zero-shot": "Zero-shot"}
"""Shorter names of sections, by anchor."""
LINKS |= {"damage": "Damage"}
LINKS |= {"mechanism": "Mechanism", "coverage": "Coverage", "how": "How"}


def sections(analysis: StudyAnalysis) -> list[Section]:
    """The page's sections in order."""
    return [*_figure_sections(analysis), *_table_sections(analysis), _provenance(analysis)]


def _figure_sections(analysis: StudyAnalysis) -> list[Section]:
    glance = as_html(
        overview(analysis),
        "Change against full precision in each reliability dimension, by setting and VLM",
        "Change against full precision, one panel a dimension. δ = (A<sub>FP32</sub> − A<sub>quantized</sub>) / "
        "A<sub>FP32</sub>; every panel is turned so that <b>right is worse</b>. Small marks: one VLM each; diamonds: mean "
        "over VLMs; lines: 95 % paired bootstrap intervals over test images.",
    )
    slopes = as_html(
        spurious_gap_slopes(analysis),
        "Relative spurious gap of full precision and each quantized setting",
        "Relative spurious gap, RSG = (accuracy on common − on counter backgrounds) / accuracy on common. Bars: 95 % "
        "intervals of the change. Filled marks: the change is significant after correction.",
    )
    reliability = as_html(
        reliability_diagrams(analysis),
        "Reliability diagrams of full precision and quantized models",
        f"Accuracy over mean confidence in {analysis.statistics.n_bins} equal-width bins of the in-distribution images (bins of fewer than "
        f"{MIN_COUNT} left out). Below the diagonal: overconfident; above: underconfident.",
    )
    curves = as_html(
        corruption_curves(analysis),
        "Accuracy over corruption severity",
        "Top-1 accuracy over severity, mean over corruptions; severity 0 is the in-distribution set. Band: 95 % interval of "
        "full precision alone; changes are paired and known more precisely, see the tables.",
    )
    changes = as_html(
        corruption_changes(analysis),
        "Accuracy change by corruption and setting",
        "Change of top-1 accuracy by corruption in points, mean over severities and VLMs.",
    )
    damage = as_html(
        effects_over_damage(analysis),
        "Change in each reliability dimension over the damage to the image features",
        "Every VLM and setting by what quantization did to its image features, not by its bits: the change in each dimension over the "
        "output's signal-to-quantization-noise ratio, −10 log₁₀ of the mean over in-distribution images of |z<sub>q</sub> − z|² of "
        "unit-norm features. <b>Up is worse, right is more damage</b>; models at the same place of the axis are equally damaged.",
    )
    flips = as_html(
        prediction_flips(analysis),
        "Share of changed predictions by kind",
        "Predictions on in-distribution images that quantization changes. The rest agrees with full precision.",
    )
    return [
        ("overview", "Overview", glance + _averages(analysis) if glance else ""),
        ("calibration", "Calibration", reliability + _tuning(analysis)),
        ("spectra", "Spectra", spectral.spectra_section(analysis)),
        ("spurious", "Spurious correlation", slopes),
        ("corruption", "Corruption", curves + changes),
        ("flips", "Flips", flips),
        ("damage", "At equal damage", damage + _tradeoffs(analysis)),
        ("mechanism", "Is the spectral filter the cause?", spectral.mechanism_section(analysis)),
    ]


def _tradeoffs(analysis: StudyAnalysis) -> str:
    """Models that no other of their VLM beats, and seeds beside samples."""
    front, seeds = tradeoffs.pareto_table(analysis), tradeoffs.seed_table(analysis)
    found = ""
    if front:
        note = (
            "<p class='note'>Of each VLM the models that none of its others beats in one of accuracy, ECE, OOD detection (mean of near and "
            "far) and size without losing in another, by the values as measured. Size: mean bits of the matrix weights of both towers.</p>"
        )
        found += f"<details><summary>Pareto fronts: accuracy, calibration, OOD detection, size</summary>{note}{front}</details>"
    if seeds:
        note = (
            "<p class='note'>Standard deviation over seeds (of calibration, training and their data order) beside the standard error over "
            "test images, each as root mean square over (VLM, setting) pairs. Intervals elsewhere are over images alone.</p>"
        )
        found += f"<details><summary>Seeds beside test images</summary>{note}{seeds}</details>"
    return found


def _averages(analysis: StudyAnalysis) -> str:
    is_open = " open" if len(analysis.settings) <= 12 else ""
    note = "<p class='note'>* q &lt; 0.05, ** q &lt; 0.01, *** q &lt; 0.001, corrected over the table (Benjamini-Hochberg).</p>"
    means = f"{note}{tables.average_table(analysis)}"
    note = (
        "<p class='note'>Value ± half its 95 % interval; below it the change against full precision likewise, in "
        "points (ECE and RSG: lower is better; ECE: of the debiased error, so not just the difference of the values). "
        "Marks as everywhere corrected over the whole study.</p>"
    )
    each = f"{note}{tables.dimension_table(analysis)}"
    note = (
        "<p class='note'>Share of (VLM, setting) pairs better than full precision, with Wilson intervals that take the pairs as "
        "independent.</p>"
    )
    shares = f"{note}{improvement.improvement_table(analysis)}{improvement.joint_table(analysis)}"
    note = (
        "<p class='note'>Mean over VLMs, each with the mean over its settings, and a 95 % interval for other VLMs and other test images "
        "(Student's t over VLMs, and what the common images add, without samples the most that they can); of one VLM over images alone. "
        "Controls and tuned logit scales do not count.</p>"
    )
    groups = f"{note}{tradeoffs.group_table(group_effects(analysis))}"
    trained = improvement.training_table(analysis)
    training = f"<details><summary>What training was worth</summary>{trained}</details>" if trained else ""
    return (
        f"<details open><summary>By kind of method, bits, scope, architecture and pre-training</summary>{groups}</details>"
        f"<details{is_open}><summary>Means over VLMs with 95 % intervals</summary>{means}</details>"
        f"<details{is_open}><summary>Share of improved runs</summary>{shares}</details>"
        f"{training}"
        f"<details><summary>Every VLM in every dimension</summary>{each}</details>"
    )


def _tuning(analysis: StudyAnalysis) -> str:
    trajectories = as_html(
        reliability_trajectories(analysis),
        "Each confidence bin followed from full precision to quantized to tuned",
        f"Where the images of each of full precision's {analysis.statistics.n_bins} confidence bins (of at least "
        f"{MIN_COUNT} images) go when the model is quantized, and when its logit scale is then tuned: accuracy over mean confidence. Of "
        "each method the fewest bits and the widest scope.",
    )
    parts = {vlm: improvement.tuning_table(analysis, vlm) for vlm in analysis.vlms}
    found = {vlm: table for vlm, table in parts.items() if table}
    if not found:
        return trajectories
    note = (
        "<p class='note'>Logit scale tuning (LST): the backbone as it is, the logit scale fitted on the "
        "calibration pairs. Everything against full precision with the scale it came with.</p>"
    )
    body = "".join(
        f"<details{'' if position else ' open'}><summary>{escape(vlm)}</summary>{table}</details>"
        for position, (vlm, table) in enumerate(found.items())
    )
    return f"{trajectories}<h3>Logit scale tuning</h3>{note}{body}"


def _table_sections(analysis: StudyAnalysis) -> list[Section]:
    legend = (
        "<p class='note'>Value ± standard error over test images; below it the change against full precision, red where "
        "significantly worse, green where significantly better. * q &lt; 0.05, ** q &lt; 0.01, *** q &lt; 0.001, "
        "corrected over the whole grid; hover over a cell for interval and p-value, over a heading for its convention. Changes of ECE, "
        "adaptive and class-wise ECE are of the debiased errors; MCE is not tested.</p>"
    )
    is_large = are_many(analysis)
    by_vlm = "".join(
        f"<details{'' if position else ' open'}><summary>{escape(vlm)}</summary>{tables.vlm_table(analysis, vlm)}</details>"
        for position, vlm in enumerate([] if is_large else analysis.vlms)
    )
    detection = "" if is_large else tables.detection_table(analysis)
    if is_large:
        legend = (
            f"<p class='note'>{len(analysis.comparisons):,} comparisons are too many for a page: every one, with interval, p-value and "
            f"convention, is a line of <a href='{numbers_file(analysis)}'>{numbers_file(analysis)}</a> beside it.</p>"
        )
    if detection:
        detection = f"<details><summary>AUROC by data set and score (DeLong)</summary>{detection}</details>"
    claims = held_against(analysis)
    published = ""
    if claims:
        published = (
            "<p class='note'>Published figures are of <i>Less Precise Can Be More Reliable</i> (ICML 2026, arXiv "
            "2509.21173): ten large VLMs, other data. Here as measured: the mean over VLMs, each with the mean over its settings, and a "
            "95 % interval for other VLMs and other test images (Student's t over VLMs, and what the common images add; over images alone "
            "where there is one VLM). The verdict follows from where the interval lies. Growth is (A<sub>quantized</sub> − "
            "A<sub>FP32</sub>) / A<sub>FP32</sub>. Only the published grid counts: its sixteen methods at W8A8, W6A8 and W4A8, no planted "
            "outliers. The speed of real INT8 encoders is not among the claims, for these runs imitate integers.</p>"
        ) + tables.claims_table(claims)
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
        ("tables", "Every metric against full precision", legend + by_vlm + detection if by_vlm or is_large else ""),
        ("published", "Beside the published results", published),
        ("zero-shot", "Zero-shot accuracy in full precision", zero_shot),
        ("coverage", "What was quantized", coverage),
    ]


def _provenance(analysis: StudyAnalysis) -> Section:
    results = analysis.results
    settings = analysis.statistics
    versions = ", ".join(sorted(results.rows["code_version"].unique()))
    seeds = ", ".join(str(seed) for seed in sorted(results.rows["seed"].unique()))
    notes = [
        f"Code version {escape(versions)}; seed {escape(seeds)} (several seeds are averaged; intervals then still cover the "
        "sampling of test images, not of seeds).",
        "Every quantized run is compared with the full-precision run of its VLM on the same images in the same order.",
        f"Intervals: 1.96 standard errors of a paired bootstrap over images, {settings.n_resamples:,} resamples "
        f"({settings.n_resamples_ranking} for AURC, AUGRC, coverage at risk, MCE, AUPR, FPR95, and class-wise ECE, whose resamples are of "
        "groups of images), to either side of the estimate; the very numbers of the runs' rows. "
        "All models see the same resamples; so do sets of the same scenes, and no others. "
        "AUROC is resampled by its structural components, so that its variance is DeLong's.",
        "Plug-in calibration errors are biased upwards, by an amount that does not cancel between models. Values shown are the plug-in, as "
        "in other work; their changes, intervals and tests are of debiased errors (each bin's |gap| by a nearly unbiased estimate, after "
        "Cai &amp; Low 2011). MCE has no interval that holds and is not tested. Brier and NLL need no such care.",
        "p-values: z = change / standard error; "
        f"Benjamini-Hochberg over all {analysis.n_tests:,} comparisons of this study.",
        f"ECE, class-wise ECE, MCE: {settings.n_bins} equal-width bins; adaptive ECE: {settings.n_bins} bins of equal mass; coverage at "
        f"{100 * settings.risk:g} % risk; Brier: sum over classes, in [0, 2], shown in percent like the other fractions. Every "
        "convention: docs/metrics.md.",
        f"{DEBIASED[0].upper()}{DEBIASED[1:]}, since the plug-in error's bias does not cancel between two models.",
        "Conventions in which peers differ: "
        + "; ".join(
            f"<code>{name}</code> {escape(METRICS[name].convention)}"
            for name in ("fpr95", "fpr95_openood", "aupr_in", "aupr_out")
        )
        + ".",
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
