"""Names of any characters go through the whole report: figures, page, CSV and terminal show them, and obey none of them."""

from __future__ import annotations

import csv
import io

import cases.study as made
import pandas as pd
import pytest
import torch
from cases.page import Page
from cases.study import QUICK, make_run
from matplotlib.figure import Figure
from rich.console import Console

from lightning_vlmq.metrics import reliability_bins, trajectory_bins
from lightning_vlmq.plotting.reliability import ReliabilityPanel, reliability_diagram, trajectory_diagram
from lightning_vlmq.results.schema import RunKey
from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.study.analysis.comparison import analyse
from lightning_vlmq.study.analysis.runs import StudyResults
from lightning_vlmq.study.report.notation import csv_text
from lightning_vlmq.study.report.page import write_report
from lightning_vlmq.study.report.terminal import summary_table

VLMS = ("$x_{$ <script>alert(1)</script>", '=HYPERLINK("http://x","y")', "_模型 🦊\n\t'\"&amp;[red]{0}%s\\frac{1}")
METHODS = ("@SUM(1)$^$", "</td><b onmouseover='x'>$")
SETS = {"concepts": "$\\bad{$ <img src=x onerror=y>", "novel": "-1+1|'\"", "digits": "=cmd|' /C calc'!A0\n"}
LAYER = "$blocks_{0$.<i>.'\"=\n🦊"
FORMULA = ("=", "+", "-", "@", "\t", "\r")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("logs") / "study"
    store = ResultsStore(root)
    sets, layers = made._sets, made.LAYERS
    keys = [RunKey(vlm, "none" if k else "$w", "none", "fp32", 32, 32, 0) for k, vlm in enumerate(VLMS)]
    keys += [
        RunKey(key.model, key.pretrained, "vision", method, 4, 8, 0, variant="<x>=$")
        for key in keys
        for method in METHODS
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made, "_sets", lambda: [(SETS.get(name, name), *more) for name, *more in sets()])
        patch.setattr(made, "LAYERS", [(f"{LAYER}.{name}", f"{group}$<") for name, group in layers])
        for k, key in enumerate(keys):
            store.write(f"r{k}", *make_run(key, f"r{k}", size=0.02), statistics=QUICK)
    analysis = analyse(StudyResults.load(root))
    return analysis, Page(write_report(analysis).read_text(encoding="utf-8"))


def test_the_page_shows_names_and_obeys_none(report):
    _, page = report
    assert not page.open and [tag for tag, _ in page.tags].count("script") == 1
    assert {tag for tag, _ in page.tags} & {"iframe", "object", "b "} == set()
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    assert all(a["src"].startswith("data:image/svg+xml") for tag, a in page.tags if tag == "img")
    for name in (*VLMS, *METHODS, SETS["novel"]):
        assert name in page.text


def test_every_figure_is_drawn(report):
    _, page = report
    assert sum(tag == "img" for tag, _ in page.tags) >= 6


def test_no_cell_of_the_csv_is_a_formula(report):
    analysis, _ = report
    rows = list(
        csv.reader(io.StringIO((analysis.results.root / "comparisons.csv").read_text(encoding="utf-8"), newline=""))
    )
    assert len({len(row) for row in rows}) == 1
    cells = {cell for row in rows for cell in row}
    for cell in cells:
        if cell.startswith(FORMULA):
            float(cell)  # a number
    assert f"'{VLMS[1]}" in " ".join(cells)


def test_the_terminal_shows_them(report):
    analysis, _ = report
    console = Console(file=io.StringIO(), width=300, record=True)
    console.print(summary_table(analysis))
    assert "[red]{0}%s" in console.export_text()


@pytest.mark.parametrize("name", [*VLMS, *SETS.values(), LAYER, "$", "$$", "$\\", "\x00\x07", ""])
def test_figures_of_callbacks_take_any_title(name):
    confidence, correct = torch.rand(40), torch.rand(40) > 0.5
    drawn = [reliability_diagram([ReliabilityPanel(name, reliability_bins(confidence, correct, 5), 0.1)], name)]
    drawn.append(
        trajectory_diagram(
            trajectory_bins(torch.stack([confidence] * 2), torch.stack([correct] * 2), 5), [name] * 2, name
        )
    )
    for figure in drawn:
        assert isinstance(figure, Figure)
        figure.savefig(io.BytesIO(), format="png")


def test_numbers_stay_numbers():
    table = pd.DataFrame({"=a": ["+x", "b"], "n": [-1.5, 2.0]})
    assert csv_text(table) == "'=a,n\n'+x,-1.5\nb,2.0\n"
