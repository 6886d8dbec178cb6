"""Write what the study ``mixed`` found into docs/mechanism.md: bits shared out over layers, and low-rank terms, on all dimensions.

Usage:
    vlmq-study study=mixed
    python scripts/make_mixed_table.py logs/mixed docs/mechanism.md
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.evaluation.about import BITS_PER_WEIGHT
from lightning_vlmq.evaluation.measures import dimensions
from lightning_vlmq.study.analysis.comparison import StudyAnalysis, analyse
from lightning_vlmq.study.analysis.groups import effects_by
from lightning_vlmq.study.analysis.runs import StudyResults
from lightning_vlmq.study.analysis.tradeoffs import of_models
from lightning_vlmq.study.report.markdown import around_results, hardware, markers
from lightning_vlmq.study.report.notation import percent_interval

PART = "mixed"


def table(analysis: StudyAnalysis) -> list[str]:
    """One line per setting: bits per weight, and the mean change over VLMs with its interval in each dimension, in percent."""
    shown = dimensions(analysis.score)
    groups = effects_by(analysis, "settings", lambda vlm, setting: repr(setting))  # a label is cut where it is long
    bits = of_models(analysis, BITS_PER_WEIGHT)
    lines = ["| setting | bits per weight | " + " | ".join(f"{d.title}: {d.effect}" for d in shown) + " |"]
    lines.append("|---|---:|" + "---|" * len(shown))
    for setting in sorted(analysis.settings, key=lambda s: (-s.weight_bits, s.sort_key)):
        means = {effect.dimension: effect.found for effect in groups.get(repr(setting), [])}
        if not means:
            continue
        own = [size for (_, s), size in bits.items() if s == setting]
        size = f"{min(own):.2f} to {max(own):.2f}" if own else "–"
        found = [means.get(d) for d in shown]
        told = ["–" if m is None else " ".join(percent_interval(m.estimate, m.low, m.high)) for m in found]
        name = f"`{setting.method}` {setting.bits}" + (f" {setting.variant}" if setting.variant else "")
        lines.append(f"| {name} | {size} | " + " | ".join(told) + " |")
    return lines


def write(root: Path, page: Path) -> None:
    """Write the part between its markers.

    Raises:
        VLMQError: the page has no markers, or the store has nothing quantized.
    """
    before, after = around_results(page, PART)
    analysis = analyse(StudyResults.load(root))
    lines = table(analysis)
    if len(lines) == 2:
        raise VLMQError(f"'{root}' compares nothing with full precision yet; run more of the study")
    start, end = markers(PART)
    about = (
        f"`vlmq-study study={root.name}` on {hardware()}; {len(analysis.vlms)} VLMs ({', '.join(f'`{v}`' for v in analysis.vlms)}). "
        "Bits per weight count integers and low-rank terms, not steps and zero points; changes are means over VLMs with 95 % intervals for "
        "other VLMs and images."
    )
    page.write_text(before + "\n".join([start, "", about, "", *lines, "", end]) + after, encoding="utf-8")


def main() -> None:
    """Command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("root", type=Path, help="the study's folder, e.g. logs/mixed")
    parser.add_argument("page", type=Path, help="the Markdown page, docs/mechanism.md")
    options = parser.parse_args()
    try:
        write(options.root, options.page)
    except (VLMQError, OSError) as error:
        print(f"make_mixed_table: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
