"""Write the results of the study ``mechanism`` into docs/mechanism.md, three figures, and a compact Parquet of all that they show.

Usage:
    vlmq-study study=mechanism
    python scripts/make_mechanism_page.py logs/mechanism docs/mechanism.md

Beside the page: data/mechanism.parquet and images/mechanism_*.png. The Parquet has one row per number, its column ``table`` says of which
table (gains, verdicts, predictions); its metadata hold command, hardware and duration.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from matplotlib.figure import Figure

from lightning_vlmq.core.calls import parse_call
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.quant.methods import METHODS
from lightning_vlmq.quant.scheme import FULL_PRECISION
from lightning_vlmq.study.analysis.comparison import StudyAnalysis, analyse
from lightning_vlmq.study.analysis.mechanism import (
    Verdict,
    control_order,
    first_rank,
    options_of,
    unjudged,
    verdict_frame,
    verdicts,
)
from lightning_vlmq.study.analysis.prediction import prediction_table, predictor_frame
from lightning_vlmq.study.analysis.runs import StudyResults
from lightning_vlmq.study.report.figures.mechanism import verdict_summary
from lightning_vlmq.study.report.figures.style import BLACK, GREY, PALETTE, as_png, new_figure, styled
from lightning_vlmq.study.report.markdown import END, START, around_results, hardware, worked
from lightning_vlmq.study.report.mechanism import MARKS, NO_MATCH, tally
from lightning_vlmq.study.run.grid import every_vlm

CONFIG = Path(__file__).parents[1] / "configs" / "study" / "mechanism.yaml"
SITE = "vision/output"
MOST = 4
"""Predictors shown of each outcome, beside the baselines."""


def gain_frame(analysis: StudyAnalysis, site: str = SITE) -> pd.DataFrame:
    """One row per setting (quantization or control, bits, scope, what else is asked of it) and band.

    Means over VLMs of gain, filter share and SQNR, and the gains' range. ``name`` tells apart what has the same bits. Of a control the
    mean over its seeds counts. ``damped`` counts the VLMs whose gain is below 1 by more than two of its standard errors.

    Raises:
        VLMQError: the study recorded no activations.
    """
    parts = [predictor_frame(analysis, site), predictor_frame(analysis, site, controls=True)]
    table = pd.concat(parts, ignore_index=True)
    if parts[0].empty:
        raise VLMQError(f"no run recorded activations at '{site}'; run the study with ActivationSpectrum, as eval does")
    bands = [c.removeprefix("gain_") for c in table if c.startswith("gain_") and "stderr" not in c]
    bands.sort(key=first_rank)
    rows = []
    scopes = table["scope"].nunique()
    for (name, bits, scope, variant), every in table.groupby(["name", "bits_name", "scope", "variant"], sort=False):
        own_name = " ".join(filter(None, (name, scope if scopes > 1 else "", variant)))
        setting = " ".join(filter(None, (name, bits, scope, variant)))
        own = every.groupby("vlm").mean(numeric_only=True)
        for band in bands:
            gain, stderr = own[f"gain_{band}"], own[f"gain_stderr_{band}"]
            if gain.notna().any():
                numbers = {"gain": gain.mean(), "gain_low": gain.min(), "gain_high": gain.max()}
                numbers |= {"damped": int((gain < 1 - 2 * stderr).sum()), "n_vlms": int(gain.notna().sum())}
                numbers |= {f: own[f"{f}_{band}"].mean() for f in ("filter_share", "sqnr_db")}
                rows.append({"setting": setting, "name": own_name, "bits": bits, "band": band, **numbers})
    return pd.DataFrame(rows)


def gain_figure(gains: pd.DataFrame) -> Figure:
    """A panel per bits: gain of each band by quantization (dots) and control (diamonds); lines span the VLMs. 1: no damping."""
    widths = sorted(gains["bits"].unique(), reverse=True)
    bands = sorted(gains["band"].unique(), key=first_rank)
    with styled():
        figure = new_figure(max(3.4 * len(widths) + 1, 9.5), 4.8)  # no narrower than its legend
        for axis, bits in zip(figure.subplots(1, len(widths), squeeze=False, sharey=True)[0], widths):
            own = gains[gains["bits"] == bits]
            names = list(dict.fromkeys(own["name"]))
            for k, name in enumerate(names):
                part = own[own["name"] == name].set_index("band").reindex(bands)
                x = np.arange(len(bands)) + 0.7 * ((k + 0.5) / len(names) - 0.5)
                axis.vlines(x, part["gain_low"], part["gain_high"], color=PALETTE[k % len(PALETTE)], linewidth=1.2)
                marker = "D" if " for " in name else "o"
                axis.plot(x, part["gain"], marker, color=PALETTE[k % len(PALETTE)], markersize=5, label=name)
            axis.axhline(1, color=BLACK, linewidth=0.8)
            axis.set_xticks(range(len(bands)), bands)
            axis.set_title(bits)
            axis.set_xlabel("ranks")
        figure.axes[0].set_ylabel("gain (1: not damped)")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def prediction_figure(shown: pd.DataFrame) -> Figure:
    """A panel per outcome: Spearman's correlations with their 95 % intervals; baselines grey."""
    outcomes = list(dict.fromkeys(shown["outcome"]))
    with styled():
        most = max(len(part) for _, part in shown.groupby("outcome"))
        figure = new_figure(2.9 * len(outcomes) + 0.6, 0.3 * most + 1.0)
        for axis, outcome in zip(figure.subplots(1, len(outcomes), squeeze=False, sharex=True)[0], outcomes):
            part = shown[shown["outcome"] == outcome].reset_index(drop=True)
            for row in part.itertuples():
                colour = GREY if row.is_baseline else PALETTE[0]
                axis.plot([row.low, row.high], [-row.Index] * 2, color=colour, linewidth=1.2)
                axis.plot(row.rho, -row.Index, "o", color=colour, markersize=5)
            axis.axvline(0, color=BLACK, linewidth=0.8)
            axis.set_xlim(-1, 1)
            axis.set_yticks([-k for k in range(len(part))], list(part["predictor"]), fontsize=7)
            axis.set_title(outcome)
        figure.supxlabel("Spearman's ρ within a VLM at one bit-width", fontsize=8)
    return figure


def strongest(predictions: pd.DataFrame) -> pd.DataFrame:
    """Of each outcome the :data:`MOST` strongest spectral predictors, and the baselines."""
    parts = [
        pd.concat([part[~part["is_baseline"]].head(MOST), part[part["is_baseline"]]])
        for _, part in predictions.groupby("outcome", sort=False)
    ]
    return pd.concat(parts) if parts else predictions


def command(analysis: StudyAnalysis) -> str:
    """The study's command, with what is there of each axis that the store does not hold the whole of."""
    settings = [s for s in analysis.settings if s.method != FULL_PRECISION]
    there: dict[str, set[Any]] = {"vlm": set(analysis.vlms), "bits": {s.bits for s in settings}}
    there |= {"scope": {s.scope for s in settings}, "method": {_called(s.method, options_of(s)) for s in settings}}
    words = ["vlmq-study", "study=mechanism"]
    for axis, entries in yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["axes"].items():
        every = every_vlm(entries) if axis == "vlm" else entries
        own = [e for e in every if (_called(*parse_call(e, "method")) if axis == "method" else e) in there[axis]]
        if 0 < len(own) < len(every):
            listed = ",".join(f'"{entry}"' if "(" in entry else entry for entry in own)
            words.append(f"study.axes.{axis}=[{listed}]")
    return shlex.join(words)


def _called(method: str, options: Mapping[str, Any]) -> tuple[str, frozenset[tuple[str, str]]]:
    """A method and its options as text, without those that have their default."""
    usual = METHODS[method]
    return method, frozenset((k, str(v)) for k, v in options.items() if str(v) != str(getattr(usual, k)))


def composition(analysis: StudyAnalysis) -> str:
    """What was run: how many models of each kind, and at which bits; a study that was stopped says so by its counts."""
    runs = [run for run in analysis.results.runs if not run.setting.is_tuned]
    full = [run for run in runs if run.key.is_full_precision]
    settings = [run.setting for run in runs if not run.key.is_full_precision]
    kinds = {"quantized models": sum(s.is_quantization for s in settings)}
    kinds |= {
        "controls": sum(s.is_control and not s.surgery for s in settings),
        "surgeries": sum(bool(s.surgery) for s in settings),
    }
    bits = Counter(s.bits for s in settings if s.is_quantization)
    told = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    widths = ", ".join(f"{n} at {width}" for width, n in bits.most_common())
    return f"{len(full)} VLMs ({', '.join(analysis.vlms)}): {told}; of the quantized models {widths}"


def results_text(gains: pd.DataFrame, found: Sequence[Verdict], shown: pd.DataFrame, about: dict[str, str]) -> str:
    """The page's section: what was run, then a table under each question."""
    lines = [
        START,
        "",
        f"`{about['command']}` on {about['hardware']}: {about['duration']} of work (h:m:s, of one process); ",
    ]
    lines += [f"{about['runs']}. All numbers: `data/mechanism.parquet`.", ""]
    lines += [
        "### Does quantization filter?",
        "",
        "![Gain of each band of ranks by quantization and bits](images/mechanism_gain.png)",
        "",
    ]
    lines += [
        "Means over VLMs (and seeds of noise) at the image features, gains with the range over VLMs; damped: VLMs whose gain is below 1 by "
    ]
    lines += [
        "more than two standard errors. What `matched_noise` shows too is no filter of quantization's: noise lengthens activations, and "
        "normalising them shortens the signal.",
        "",
        "| setting | ranks | gain | range | damped | filter share | SQNR, dB |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in gains.itertuples():
        numbers = f"{row.gain:.3f} | {row.gain_low:.3f} to {row.gain_high:.3f} | {row.damped} of {row.n_vlms}"
        lines.append(f"| {row.setting} | {row.band} | {numbers} | {row.filter_share:.2f} | {row.sqnr_db:.1f} |")
    lines += [
        "",
        "### Is it the cause?",
        "",
        "![Verdicts by dimension, control and surgery](images/mechanism_verdicts.png)",
        "",
    ]
    if found:
        counts = tally(found)
        columns = sorted({v.control for v in found}, key=control_order)
        lines += [
            "Quantized settings by verdict, over all VLMs together: "
            + ", ".join(f"{m} {v}" for v, m in MARKS.items())
            + f" ({NO_MATCH}).",
            "",
        ]
        lines += [
            "| dimension | " + " | ".join(f"`{name}`" for name in columns) + " |",
            "|---|" + "---|" * len(columns),
        ]
        for title in dict.fromkeys(v.dimension.title for v in found):
            cells = [counts.get((title, name), {}) for name in columns]
            told = [" ".join(f"{MARKS[verdict]} {n}" for verdict, n in own.items() if n) for own in cells]
            lines.append(f"| {title} | " + " | ".join(told) + " |")
    lines += ["", "### What foretells a change?", ""]
    if len(shown):
        lines += ["![Correlations of spectral quantities with changes](images/mechanism_prediction.png)", ""]
        lines += ["| outcome | predictor | ρ | 95 % interval | one VLM left out | q |", "|---|---|---:|---:|---:|---:|"]
        for row in shown.itertuples():
            name = f"*{row.predictor}* (baseline)" if row.is_baseline else f"`{row.predictor}`"
            ranges = f"{row.low:.2f} to {row.high:.2f} | {row.left_out_low:.2f} to {row.left_out_high:.2f}"
            lines.append(f"| {row.outcome} | {name} | {row.rho:.2f} | {ranges} | {row.q_value:.3f} |")
    else:
        lines += ["Too few settings at one bit-width to correlate anything."]
    return "\n".join([*(line.rstrip() for line in lines), "", END])


def write(analysis: StudyAnalysis, page: Path) -> list[Path]:
    """Write figures, Parquet and the page's section between its markers; returns what was written.

    Raises:
        VLMQError: the page has no markers, or the study lacks what it needs.
    """
    before, after = around_results(page)
    if reason := unjudged(analysis):
        raise VLMQError(f"'{analysis.results.root}' has {reason}")
    gains, found, predictions = gain_frame(analysis), verdicts(analysis), prediction_table(analysis)
    shown = strongest(predictions[predictions["n"] > 0]) if len(predictions) else predictions
    about = {"command": command(analysis), "hardware": hardware(), "duration": str(worked(analysis.results))}
    about |= {"vlms": ", ".join(analysis.vlms), "runs": composition(analysis)}
    images, data = page.parent / "images", page.parent / "data" / "mechanism.parquet"
    drawn = {"gain": gain_figure(gains), "verdicts": verdict_summary(found)}
    drawn["prediction"] = prediction_figure(shown) if len(shown) else None
    written = []
    images.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        if figure is not None:
            written.append(images / f"mechanism_{name}.png")
            as_png(figure, written[-1])
    tables = {"gains": gains, "verdicts": verdict_frame(found), "predictions": predictions}
    whole = pd.concat([frame.assign(table=name) for name, frame in tables.items() if len(frame)], ignore_index=True)
    made = pa.Table.from_pandas(whole, preserve_index=False)
    data.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(made.replace_schema_metadata({**(made.schema.metadata or {}), **about}), data, compression="zstd")
    missing = [name for name, figure in drawn.items() if figure is None]
    section = results_text(gains, found, shown, about)
    for name in missing:
        section = "\n".join(line for line in section.split("\n") if f"mechanism_{name}.png" not in line)
    page.write_text(before + section + after, encoding="utf-8")
    return [*written, data, page]


def main() -> None:
    """Command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("root", type=Path, help="the study's folder, e.g. logs/mechanism")
    parser.add_argument("page", type=Path, help="the Markdown page, docs/mechanism.md")
    options = parser.parse_args()
    try:
        written = write(analyse(StudyResults.load(options.root)), options.page)
    except (VLMQError, OSError) as error:
        print(f"make_mechanism_page: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(*written, sep="\n")


if __name__ == "__main__":
    main()
