"""Settings that differ in a word stay apart in every table and figure, however long the words are; no verdict is left out of a figure."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from cases.study import grid, make_run

from lightning_vlmq.evaluation.measures import dimensions
from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.statistics.equivalence import VERDICTS, Reproduction
from lightning_vlmq.study.analysis.comparison import analyse
from lightning_vlmq.study.analysis.mechanism import ALL_VLMS, Verdict, verdict_frame
from lightning_vlmq.study.analysis.runs import StudyResults
from lightning_vlmq.study.analysis.setting import Setting
from lightning_vlmq.study.report.figures.mechanism import verdict_summary
from lightning_vlmq.study.report.figures.spectra import read_spectra

REPOSITORY = Path(__file__).parents[3]
RULES = "first_last=w8a8, *.mlp.c_proj weight_granularity=per_group group_size=32, *.attn.* weight_bits="
VARIANTS = (RULES + "6", RULES + "8", "")


def script(name):
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def analysis(tmp_path_factory):
    """Min-max by two long rules and by none, the second as good as eight bits, in one scope; the plain one in both."""
    store = ResultsStore(tmp_path_factory.mktemp("study"))
    full, narrow, wide = grid(["vit_clean"], ["minmax"], [(4, 8)])
    keys = [full, *(replace(wide, variant=variant) for variant in VARIANTS), narrow]
    for number, key in enumerate(keys):
        like = replace(key, variant="", **({"weight_bits": 8} if number == 2 else {}))
        rows, samples, curves = make_run(like, f"r{number}", size=0.03)
        rows = rows.assign(**key.columns())
        if number:
            new = {"gain_0-8": 1 - number / 10, "gain_stderr_0-8": 0.01, "filter_share_0-8": 0.2, "sqnr_db_0-8": 20.0}
            own = [rows.iloc[:1].assign(score="vision/output", metric=m, value=value) for m, value in new.items()]
            rows = pd.concat([rows, *own], ignore_index=True)
        store.write(f"r{number}", rows, samples, curves)
    return analyse(StudyResults.load(store.root))


def test_labels_are_cut_where_these_settings_differ(analysis):
    longest = [s for s in analysis.settings if s.variant]
    assert len(longest) == 2 and len({s.label for s in longest}) == 1


def test_figures_of_spectra_have_each(analysis):
    assert sorted(setting.variant for setting in read_spectra(analysis, "vit_clean")) == sorted(VARIANTS)


def test_gains_have_each(analysis):
    module = script("make_mechanism_page")
    gains = module.gain_frame(analysis)
    assert sorted(gains["gain"]) == pytest.approx([0.6, 0.7, 0.8, 0.9])  # none is a mean of two
    assert gains["setting"].is_unique and gains["name"].is_unique
    assert set(gains["name"]) == {"minmax vision", *(f"minmax vision_text {v}".rstrip() for v in VARIANTS)}
    (axis,) = module.gain_figure(gains).axes
    assert len(axis.get_legend_handles_labels()[1]) == 4


def test_the_table_of_mixed_bits_has_each(analysis):
    module = script("make_mixed_table")
    lines = [line.split("|") for line in module.table(analysis)[2:]]
    first, second = (next(line for line in lines if variant in line[1]) for variant in VARIANTS[:2])
    assert len(lines) == 4 and first[3:] != second[3:]


def test_the_page_says_what_bits_per_weight_count(analysis, tmp_path):
    """The number's own definition: steps and offsets are not counted."""
    page = tmp_path / "page.md"
    page.write_text("<!-- mixed -->\n<!-- end of mixed -->\n")
    script("make_mixed_table").write(analysis.results.root, page)
    assert "integers and low-rank terms, not steps and zero points" in page.read_text()


def test_every_verdict_on_a_change_is_in_the_summary():
    dimension, setting = dimensions("mcm")[0], Setting("minmax", 4, 8, "vision", "group_size=16")
    found = [
        Verdict(ALL_VLMS, "matched_noise", setting, dimension, 0.1, 0.1, 5, 3, Reproduction(verdict, 1.0, 0.9, 1.1))
        for verdict in VERDICTS
    ]
    figure = verdict_summary(found)
    (axis,) = figure.axes
    assert sum(bar.get_width() for bar in axis.patches) == pytest.approx(1)
    assert axis.texts[0].get_text() == str(len(VERDICTS) - 1)  # all but "nothing to reproduce"
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {*VERDICTS} - {"nothing to reproduce"}
    assert set(verdict_frame(found)["variant"]) == {"group_size=16"}
