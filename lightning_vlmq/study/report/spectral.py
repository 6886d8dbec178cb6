"""The report's sections on spectra: what quantization does to weights and activations rank by rank, and whether that is the cause."""

from __future__ import annotations

from html import escape

from lightning_vlmq.plotting.spectra import UNROLLED, has_convolutions
from lightning_vlmq.study.analysis.comparison import StudyAnalysis
from lightning_vlmq.study.analysis.mechanism import unjudged, verdicts
from lightning_vlmq.study.analysis.prediction import prediction_table
from lightning_vlmq.study.report.figures.mechanism import verdict_overview, verdict_summary
from lightning_vlmq.study.report.figures.ranks import Ranks, rank_curves, rank_maps, read_ranks
from lightning_vlmq.study.report.figures.spectra import (
    Spectra,
    read_spectra,
    singular_value_heatmaps,
    singular_value_ratios,
)
from lightning_vlmq.study.report.figures.style import as_html
from lightning_vlmq.study.report.mechanism import prediction_html, summary_table, verdict_table


def spectra_section(analysis: StudyAnalysis) -> str:
    """Figures of each VLM, those of the first open; empty where no run recorded a spectrum."""
    parts: list[str] = []
    for vlm in analysis.vlms:
        spectra, ranks = read_spectra(analysis, vlm), read_ranks(analysis, vlm)
        if not spectra and not ranks:
            continue
        setting = next(iter(spectra or ranks))
        where = f"{escape(vlm)}, {setting.weight_bits}-bit weights, {escape(setting.scope)}"
        content = _weight_spectra(spectra, vlm, where) + _activation_ranks(ranks, vlm, where)
        is_open = "" if parts else " open"
        parts.append(f"<details{is_open}><summary>{escape(vlm)}</summary>{content}</details>")
    return "".join(parts)


def _weight_spectra(spectra: Spectra, vlm: str, where: str) -> str:
    groups = {layer.group for layers in spectra.values() for layer in layers.values()}
    unrolled = f" Singular values {UNROLLED}, not of the map." if has_convolutions(groups) else ""
    lines = as_html(
        singular_value_ratios(spectra),
        f"Singular values of {vlm} by layer group",
        f"Singular values of the weights, mean over the layers of a group ({where}). Above: relative to the largest of "
        f"full precision; below: relative to full precision at the same rank.{unrolled}",
    )
    heatmap = as_html(
        singular_value_heatmaps(spectra),
        f"Change of singular values of {vlm} by layer and rank",
        f"log₂ ratio of quantized to full-precision singular values by layer and relative rank, 0 the largest ({where}).{unrolled}",
    )
    return lines + heatmap


def _activation_ranks(ranks: Ranks, vlm: str, where: str) -> str:
    """SQNR and gain after every block: noise lets SQNR fall and the gain at 1, a filter lowers the gain."""
    curves = "".join(
        as_html(
            rank_curves(ranks, tower),
            f"SQNR and gain per rank after every block of the {tower} tower of {vlm}",
            f"Activations of the {tower} tower on full precision's principal directions ({where}), pooled over windows of ranks. "
            "SQNR falls with rank under any noise; the gain is below 1 only where a rank is damped.",
        )
        for tower in ("vision", "text")
    )
    maps = as_html(
        rank_maps(ranks),
        f"SQNR and gain of {vlm} by layer and rank",
        f"The same after every block, by relative rank, 0 the largest ({where}). White is a gain of 1, blue is damped.",
    )
    return curves + maps


def mechanism_section(analysis: StudyAnalysis) -> str:
    """Controls and surgeries beside what they start from, and what foretells a change; empty without them and recorded activations.

    Where they cannot be judged a line says so.
    """
    found, reason = verdicts(analysis), unjudged(analysis)
    lack = f"<p class='warning'>{escape(reason[0].upper() + reason[1:])}.</p>" if reason else ""
    summary = as_html(
        verdict_summary(found),
        "Share of quantized settings by verdict, for each control and each surgery, by dimension",
        "Does it do what quantization does? Shares of the quantized settings that change a dimension (their number at the bar's end); "
        "controls, then the error of the image features healed, or left, in some ranks alone, beside that whole error.",
    )
    each = as_html(
        verdict_overview(found),
        "Change of each control as a share of quantization's, by dimension and setting",
        "Each control's change as a share of quantization's. Mean over VLMs; 90 % intervals over test images and seeds. Settings whose "
        "own change is not significant, and controls that are no match, are left empty.",
    )
    surgeries, controls = ([v for v in found if v.is_surgery == kind] for kind in (True, False))
    details = "".join(
        f"<details><summary>{title}</summary>{content}</details>"
        for title, content in (
            ("Every control in every setting", each + verdict_table(controls)),
            ("Every surgery in every setting", verdict_table(surgeries)),
        )
        if content
    )
    foretold = prediction_html(prediction_table(analysis))
    if foretold:
        foretold = f"<details><summary>What foretells a change</summary>{foretold}</details>"
    return lack + summary + summary_table(found) + details + foretold
