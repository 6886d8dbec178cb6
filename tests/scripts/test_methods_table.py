"""The page about the methods says what the store holds."""

import html
import importlib.util
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import markdown
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from cases.store import KEY, make_curves, make_rows, make_samples

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.results.store import ResultsStore

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_methods_table.py"
spec = importlib.util.spec_from_file_location("make_methods_table", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def write(store, run_id, key, seconds, samples=None, **values):
    rows = make_rows(run_id, tuple(values), key)
    samples = make_samples() if samples is None else samples
    store.write(run_id, rows.assign(value=list(values.values())), samples, make_curves(), seconds)


def test_page_shows_the_stored_numbers(tmp_path):
    store = ResultsStore(tmp_path)
    full = replace(KEY, method="fp32", scope="none", weight_bits=32, act_bits=32)
    write(store, "a", full, 0.5, top1=0.9512, ece=0.0234)
    gptq = replace(KEY, method="gptq")
    write(
        store,
        "b",
        gptq,
        3.27,
        top1=0.9401,
        ece=0.0345,
        agreement=0.987,
        kl=0.00312,
        coverage_weights=0.999,
        coverage_macs=0.99,
    )
    eight = {"top1": 0.9499, "ece": 0.0241, "agreement": 0.9951, "coverage_weights": 1.0, "coverage_macs": 0.964}
    write(store, "c", replace(gptq, weight_bits=8), 2.61, **eight)
    trained = {"top1": 0.95, "ece": 0.02, "agreement": 0.99, "held_out_loss_start": 0.0024, "held_out_loss": 0.00175}
    write(
        store,
        "d",
        replace(KEY, method="lsq_feature"),
        9.0,
        kl=0.002,
        **trained,
        coverage_weights=1.0,
        coverage_macs=0.964,
    )
    write(store, "c.lst", replace(gptq, weight_bits=8).tuned, 2.61, top1=0.1, ece=0.2)
    text = script.page(script.read_results(tmp_path), store)
    assert "Full precision: top-1 95.1 ± " in text
    assert "| method | top-1 | ± | ECE | agreement | KL | loss | weights | MACs | seconds |" in text
    eight, four = (text.split(f"### vit_clean, W{bits}A8")[1] for bits in (8, 4))
    assert "| 2.4 | 99.5 | – | – | 100.0 | 96.4 | 2.6 |" in eight and text.index("W8A8") < text.index("W4A8")
    assert "| 3.5 | 98.7 | 3.12 | – | 99.9 | 99.0 | 3.3 |" in four
    assert "| 2.0 | 99.0 | 2.00 | 2.40 → 1.75 | 100.0 | 96.4 | 9.0 |" in four
    assert "every tower family, the image tower quantized" in text
    # no minmax there; KL 2.00 against 3.12
    assert "| vit_clean | W4A8 | 1 | 1 | 0.729 | 0.729 | 0.729 | – | 1 of 1 |" in text
    assert "| vit_clean | W8A8 | 0 | – | – | – | – | – | – |" in text
    fewer = "vlmq-study study=methods_table 'study.axes.bits=[W8A8]' 'study.axes.method=[gptq]'"
    assert f"study=methods_table\nOMP_NUM_THREADS=1 .venv/bin/{fewer}\n.venv/bin/python" in text
    assert "Also there, and not among these runs: `lsq_contrastive`, `lsqplus_contrastive`," in text
    assert (
        "the extremes of 2 methods that do not differ at all would be\nabout 0.8 of" in text
    )  # 2 / sqrt(pi) / sqrt(2)
    assert "and the feature loss of CLIP-KD. |" in text and "`awq`" not in text
    assert "`lsq_feature` | yes |" in text and "| 10.0 |" not in text


def test_the_spread_is_the_paired_difference_of_the_extremes(tmp_path):
    store, rng = ResultsStore(tmp_path), np.random.default_rng(5)
    columns = {}
    for name, method, right in (("a", "minmax", 0.6), ("b", "gptq", 0.8), ("c", "awq", 0.7)):
        samples = make_samples(400).assign(correct=rng.random(400) < right, kl=rng.random(400) * (1 - right))
        columns[name] = samples
        metrics = {"top1": samples["correct"].mean(), "kl": samples["kl"].mean(), "ece": 0.1, "agreement": 0.9}
        shuffled = samples.sample(frac=1, random_state=1)
        coverage = {"coverage_weights": 1.0, "coverage_macs": 1.0}
        write(store, name, replace(KEY, method=method), 1.0, shuffled, **metrics, **coverage)
    runs = script.read_results(tmp_path)
    for metric, column, factor in (("top1", "correct", 100), ("kl", "kl", 1000)):
        best, worst, difference, errors = script.spread(runs, metric, store)
        paired = scipy.stats.ttest_rel(columns["b"][column].astype(float), columns["a"][column].astype(float))
        assert (best, worst) == ("`gptq`", "`minmax`")
        assert float(errors) == pytest.approx(abs(paired.statistic), abs=0.06)
        found = factor * abs(columns["b"][column].mean() - columns["a"][column].mean())
        assert float(difference) == pytest.approx(found, abs=0.006)
    assert script.spread(runs[:1], "top1", store) == ["–"] * 4
    assert f"| vit_clean | W4A8 | `gptq` | `minmax` | {script.spread(runs, 'top1', store)[2]} |" in script.page(
        runs, store
    )


def test_bars_in_code_end_no_cell_and_show_no_backslash():
    """As Python-Markdown, which builds the site, renders every method's line."""
    for name in script.ORDER:
        summary = script.summary(script.METHODS[name])
        table = f"| a | b |\n|---|---|\n| x | {script.in_cell(summary)} |\n"
        shown = markdown.markdown(table, extensions=["tables"])
        cells = re.findall("<td>(.*?)</td>", shown)
        text = html.unescape(re.sub("</?code>", "", cells[1]))
        assert len(cells) == 2 and "\\" not in text and text == summary.replace("``", ""), name


def test_duration_is_kept_with_the_run_but_not_in_its_rows(tmp_path):
    store = ResultsStore(tmp_path)
    for run_id, seconds in (("a", 1.25), ("b", 7.0)):
        store.write(run_id, make_rows(run_id), make_samples(), make_curves(), seconds)
    assert store.seconds("a")[0] == 1.25 and store.seconds("b")[0] == 7.0 and store.seconds("a")[1] >= 1
    both = [store.rows([run_id]).drop(columns="run_id") for run_id in "ab"]
    pd.testing.assert_frame_equal(*both)
    store.write("c", make_rows("c"), make_samples(), make_curves())
    with pytest.raises(VLMQError, match=r"run 'c' .* without its duration"):
        store.seconds("c")


@pytest.mark.parametrize(("n", "published"), [(2, 1.12838), (10, 3.07751), (16, 3.53198), (100, 5.01519)])
def test_the_mean_range_of_normal_variables_is_tippetts(n, published):
    assert script.mean_range(n) == pytest.approx(published, abs=2e-5)


def test_scopes_are_not_mixed(tmp_path):
    store = ResultsStore(tmp_path)
    for scope in ("vision", "vision_text"):
        write(store, scope, replace(KEY, scope=scope), 1.0, top1=0.5, ece=0.1)
    with pytest.raises(VLMQError, match="both scopes"):
        script.page(script.read_results(tmp_path), store)


def test_empty_store_is_one_line(tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path / "nothing"), str(tmp_path / "page.md")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (
        ended.returncode == 2
        and len(ended.stderr.splitlines()) == 1
        and "vlmq-study study=methods_table" in ended.stderr
    )
