"""The report: one page that needs nothing else, whatever the store holds, with the numbers of the analysis."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cases.page import Page
from cases.study import grid, make_run, write_study
from PIL import Image

from lightning_vlmq.evaluation.measures import Measure
from lightning_vlmq.results.schema import RunKey
from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.study.analysis.change import FULL
from lightning_vlmq.study.analysis.comparison import analyse
from lightning_vlmq.study.analysis.published import ECE, held_against
from lightning_vlmq.study.analysis.runs import StudyResults
from lightning_vlmq.study.analysis.setting import Setting
from lightning_vlmq.study.report import improvement
from lightning_vlmq.study.report import page as report_page
from lightning_vlmq.study.report.cells import number as shown_number
from lightning_vlmq.study.report.cells import stars
from lightning_vlmq.study.report.figures.overview import spurious_gap_slopes
from lightning_vlmq.study.report.figures.reliability import reliability_diagrams
from lightning_vlmq.study.report.figures.robustness import corruption_curves
from lightning_vlmq.study.report.figures.spectra import RANKS, read_spectra, singular_value_heatmaps
from lightning_vlmq.study.report.figures.style import vlm_styles
from lightning_vlmq.study.report.page import build_report, main, write_report
from lightning_vlmq.study.report.tables import coverage_table

KEYS = grid(methods=["minmax", "lsq_contrastive"], bits=[(8, 8), (4, 8)], scopes=["vision_text"])


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_study(tmp_path_factory.mktemp("demo"), KEYS, size=0.06).root


@pytest.fixture(scope="module")
def analysis(root):
    return analyse(StudyResults.load(root))


@pytest.fixture(scope="module")
def page(analysis) -> Page:
    page = Page(write_report(analysis).read_text())
    assert not page.open
    return page


def test_the_page_needs_nothing_else(page):
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe") and (tag != "script" or not attributes)
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("data:", "#")) or attributes[name] == "comparisons.csv"
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags


def test_every_section_is_there_and_linked(page):
    sections = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    figures_first = ["overview", "calibration", "spectra", "spurious", "corruption", "flips"]
    assert sections == [*figures_first, "tables", "published", "zero-shot", "coverage", "how"]
    links = [a["href"] for tag, a in page.tags if tag == "a"]
    assert links == ["comparisons.csv", *(f"#{section}" for section in sections)]


def test_every_table_says_what_it_shows(page):
    for told in (
        "corrected over the table",
        "Value ± half its",
        "Share of (VLM, setting) pairs",
        "of one VLM over images alone",
    ):
        assert page.text.count(told) == 1, told


def test_figures_are_svg_with_a_description(page):
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 6 + 2 * 2  # nothing is tuned here: no trajectories
    for image in images:
        assert len(image["alt"]) > 20
        svg = base64.b64decode(image["src"].removeprefix("data:image/svg+xml;base64,"))
        assert ElementTree.fromstring(svg).tag.endswith("svg")


def test_the_numbers_are_those_of_the_analysis(page, analysis, root):
    found = analysis.comparisons["vit_clean", Setting("minmax", 4, 8, "vision_text"), Measure("top1", "id")]
    sign = "−" if found.change.estimate < 0 else "+"
    assert f"{100 * found.value:.1f} ±{100 * found.stderr:.1f}{sign}{abs(100 * found.change.estimate):.1f}" in page.text
    table = pd.read_csv(root / "comparisons.csv", keep_default_na=False, na_values=["nan", ""])
    assert len(table) == len(analysis.comparisons)
    np.testing.assert_allclose(table["q_value"], analysis.comparisons.table()["q_value"])
    assert f"{analysis.n_tests:,} comparisons" in page.text


def test_how_many_layers_clip_is_told(analysis):
    table = coverage_table(analysis)
    assert "layers that clip" in table and "0 – 4" in table  # W8A8 and W4A8


def test_conventions_and_provenance_are_said(page):
    for phrase in (
        "Code version 0.1.0; seed 0",
        "fpr95_openood",
        "Benjamini-Hochberg",
        "DeLong",
        "15 equal-width bins",
    ):
        assert phrase in page.text
    assert re.search(r"concepts\s*96", page.text)  # data sets with their numbers of images


def test_the_same_store_gives_the_same_bytes(root, page, tmp_path):
    assert build_report(root, tmp_path / "docs" / "demo.png").read_text() == page.source
    with Image.open(tmp_path / "docs" / "demo.png") as image:
        assert image.width > 1000 and len(set(image.convert("L").resize((50, 50)).getdata())) > 10


def test_full_precision_alone_gives_a_page(tmp_path):
    write_study(tmp_path, [key for key in KEYS if key.method == "fp32"], size=0.03)
    page = Page(build_report(tmp_path).read_text())
    sections = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert "zero-shot" in sections and "how" in sections and "overview" not in sections


def test_a_store_of_one_data_set_without_curves_gives_a_page(tmp_path):
    store = ResultsStore(tmp_path)
    for key in grid(["vit_clean"], ["minmax"], [(4, 8)], ["vision"]):
        rows, samples, _ = make_run(key, key.bits, size=0.05)
        keep = (rows["dataset"] == "concepts") & rows["metric"].isin(["top1", "ece"])
        store.write(key.bits, rows[keep], samples[samples["role"] == "id"], pd.DataFrame())
    page = Page(build_report(tmp_path).read_text())
    sections = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert sections == ["overview", "calibration", "flips", "tables", "published", "zero-shot", "how"]


def test_gaps_in_the_grid_and_missing_references_are_said(tmp_path):
    keys = grid(["vit_clean"], ["minmax"], [(4, 8)], ["vision"])
    write_study(tmp_path, [*keys, RunKey("vit_lost", "lost", "vision", "minmax", 8, 8, 0)], size=0.03)
    text = Page(build_report(tmp_path).read_text()).text
    assert "No full-precision run of vit_lost: nothing of theirs is compared." in text
    assert "1 of 2 cells of the grid have no results yet" in text


def test_names_are_escaped(tmp_path):
    store = ResultsStore(tmp_path)
    for number, key in enumerate(grid(["<b>evil</b>"], ["minmax"], [(4, 8)], ["vision"])):
        store.write(f"run{number}", *make_run(key, f"run{number}", size=0.03))
    text = build_report(tmp_path).read_text()
    assert "<b>evil" not in text and "&lt;b&gt;evil&lt;/b&gt;" in text


def test_broken_models_do_not_break_the_page(tmp_path):
    """A diverged run has NaN confidences and scores; it shows as undefined."""
    store = ResultsStore(tmp_path)
    for key in grid(["vit_clean"], ["minmax"], [(8, 8), (4, 8)], ["vision"]):
        rows, samples, curves = make_run(key, key.bits, size=0.05)
        if key.weight_bits == 4:
            samples[["confidence", "nll", "brier", "mcm", "energy"]] = np.nan
            samples[["prediction"]], samples["correct"], samples["correct_top5"] = -1, False, False
        store.write(key.bits, rows, samples, curves)
    analysis = analyse(StudyResults.load(tmp_path))
    w4, w8 = Setting("minmax", 4, 8, "vision"), Setting("minmax", 8, 8, "vision")
    assert analysis.comparisons["vit_clean", w4, Measure("top1", "id")].value == 0
    assert ("vit_clean", w4, Measure("ece", "id")) not in analysis.comparisons
    assert not np.isnan(analysis.comparisons["vit_clean", w8, Measure("ece", "id")].q_value)
    Page(write_report(analysis).read_text())


def test_published_claims_stand_with_their_verdict_and_query(page, analysis):
    claims = held_against(analysis)
    assert len(claims) > 8
    for claim in claims:
        assert claim.claim in page.text and claim.published in page.text and claim.query in page.text
    assert page.text.count("undecided") >= sum(claim.verdict == "undecided" for claim in claims)


def test_spectra_are_of_the_fewest_bits_and_the_widest_scope(tmp_path):
    write_study(tmp_path, grid(["vit_clean"], ["minmax"], [(8, 8), (4, 8)], ["vision", "vision_text"]), size=0.03)
    analysis = analyse(StudyResults.load(tmp_path))
    (setting, layers), *others = read_spectra(analysis, "vit_clean").items()
    assert setting == Setting("minmax", 4, 8, "vision_text") and not others
    heatmap = singular_value_heatmaps({setting: layers})
    image = np.asarray(heatmap.axes[0].images[0].get_array())
    curves = ResultsStore(tmp_path).curves("vit_clean-minmax-W4A8-vision_text-s0")
    layer = curves[curves["layer"] == "model.transformer.resblocks.1.mlp.c_fc"].sort_values("x")
    assert image.shape == (curves["layer"].nunique(), len(RANKS)) and list(layers)[-1] == layer["layer"].iloc[0]
    expected = np.log2(layer["y"].to_numpy() / layer["y_reference"].to_numpy())
    np.testing.assert_allclose(image[-1, [0, -1]], expected[[0, -1]], atol=1e-5)  # text layers come last


def test_small_numbers_sort_by_their_size(page):
    """By the expression that the page's script reads a cell with."""
    script = (Path(report_page.__file__).with_name("page.html")).read_text(encoding="utf-8")
    (pattern,) = re.findall(r"\.match\(/(.*?)/i\)", script)
    measure = Measure("kl", "id")
    cells = [shown_number(measure, value).replace("−", "-") for value in (0.0, 3e-5, 0.002, 0.5)]
    assert "e-05" in cells[1]
    assert [float(re.match(pattern, cell, re.IGNORECASE)[0]) for cell in cells] == [0.0, 3e-5, 0.002, 0.5]


def test_a_place_that_takes_no_file_is_one_line(root, capsys):
    with pytest.raises(SystemExit) as end:
        main([str(root), "--readme-figure", "/proc/overview.png"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and "/proc/overview.png" in error


def test_command_line(tmp_path, capsys):
    write_study(tmp_path / "logs", grid(["vit_clean"], ["minmax"], [(4, 8)], ["vision"]), size=0.03)
    main([str(tmp_path / "logs"), "--readme-figure", str(tmp_path / "x.png")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "logs" / "report.html") and (tmp_path / "x.png").exists()
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path / "nothing")])
    assert end.value.code == 2 and "vlmq-study: error: no results in" in capsys.readouterr().err


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    keys = grid(["vit_clean"], ["minmax"], [(8, 8), (4, 8)], ["vision", "vision_text"], tuned=True)
    store = write_study(tmp_path_factory.mktemp("tuned"), [*keys, *grid(["vit_noisy"], ["minmax"])], size=0.1)
    return analyse(StudyResults.load(store.root))


def test_tuned_runs_are_no_settings_and_no_gaps(tuned):
    page = Page(write_report(tuned).read_text())
    assert not page.open and "cells of the grid" not in page.text and "run again later" not in page.text
    assert [s.label for s in tuned.settings] == [
        "minmax W8A8 vision",
        "minmax W8A8 vision_text",
        "minmax W4A8 vision",
        "minmax W4A8 vision_text",
    ]
    assert re.search(r"10\s*runs", page.text.replace("runs", " runs")) and "5logit scales tuned" in page.text
    assert sum(tag == "img" for tag, _ in page.tags) == 7 + 2 * 2


def test_calibration_before_and_after_tuning_is_told(tuned):
    text = Page(write_report(tuned).read_text()).text
    setting = Setting("minmax", 8, 8, "vision_text")
    cells = ""
    for stage in (setting, setting.tuned):
        found = tuned.comparisons["vit_clean", stage, Measure("ece", "id")]
        sign = "−" if found.change.estimate < 0 else "+"
        cells += f"{100 * found.value:.1f} ±{100 * found.stderr:.1f}{sign}{abs(100 * found.change.estimate):.1f}"
        cells += stars(found.q_value)
    assert f"minmax W8A8 vision_text12.0019.20{cells}" in text  # the synthetic scales, then ECE as it came and tuned
    assert improvement.tuning_table(tuned, "vit_noisy") == ""  # not tuned


def test_the_published_ece_of_tuned_models_stands_beside_the_own(tuned):
    claims = {claim.claim: claim for claim in held_against(tuned)}
    claim = claims["ECE, both towers quantized and logit scale tuned, against full precision"]
    found = [tuned.comparisons["vit_clean", Setting("minmax", w, 8, "vision_text").tuned, ECE] for w in (8, 4)]
    assert claim.published == "1.1 % against 6.9 %" and claim.n_cells == 2 and claim.found.n_clusters == 1
    assert claim.found.estimate == pytest.approx(np.mean([c.change.estimate / c.reference for c in found]))
    assert claims["share of W8A8 models whose calibration improves"].n_cells == 4  # untuned ones alone


def test_shares_of_improved_runs(tuned):
    rows = [line.split("</th>")[1] for line in improvement.improvement_table(tuned).split("<tr>")[2:]]
    effects = tuned.changes(Measure("top1", "id"))
    improved = sum(c.value > c.reference for c in effects)
    worse = sum(c.q_value < 0.05 and c.value < c.reference for c in effects)
    better = sum(c.q_value < 0.05 and c.value > c.reference for c in effects)
    assert f"{improved} of {len(effects)}; significantly {better} better, {worse} worse" in rows[0]
    own = tuned.changes(ECE, is_tuned=True)
    assert len(own) == 5 and f"{sum(c.value < c.reference for c in own)} of 5;" in rows[2]


def test_trajectories_follow_full_precision_s_bins(tuned):
    setting = Setting("minmax", 4, 8, "vision_text")
    bins = tuned.trajectories["vit_clean", setting]
    store = tuned.results.runs[0].store
    names = ("vit_clean-fp32-W32A32-none-s0", "vit_clean-minmax-W4A8-vision_text-s0")
    tables = [
        store.samples(run).query("role == 'id'").sort_values("index")
        for run in (*names, names[1].replace("-W", ".lst-W"))
    ]
    which = np.minimum((tables[0]["confidence"].to_numpy() * 15).astype(int), 14)
    for k in np.unique(which):
        assert bins.count[k] == (which == k).sum()
        for stage, table in enumerate(tables):
            assert float(bins.accuracy[stage, k]) == pytest.approx(table["correct"].to_numpy()[which == k].mean())
            assert float(bins.confidence[stage, k]) == pytest.approx(table["confidence"].to_numpy()[which == k].mean())
    assert tuned.trajectories["vit_noisy", setting].confidence.shape[0] == 2
    assert tuned.trajectories["vit_clean", FULL].confidence.shape[0] == 2  # to its tuned self
    assert ("vit_noisy", FULL) not in tuned.trajectories


def test_ten_vlms_fit_the_page(tmp_path):
    vlms = [f"{tower}_{captions}" for tower in ("a", "b", "c", "d", "e") for captions in ("clean", "noisy")]
    write_study(tmp_path, grid(vlms, ["minmax"], [(4, 8)], ["vision"]), size=0.01)
    analysis = analyse(StudyResults.load(tmp_path))
    for draw in (reliability_diagrams, corruption_curves, spurious_gap_slopes):
        figure = draw(analysis)
        assert figure.get_figwidth() <= 11.8  # what the page shows without scrolling
        assert {axis.get_title("left") for axis in figure.axes} >= set(vlms)
    styles = vlm_styles(vlms)
    assert len({colour for colour, _ in styles.values()}) == len({marker for _, marker in styles.values()}) == 10
