"""The page about the methods says what the store holds."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from cases.store import KEY, make_curves, make_rows, make_samples

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.results.store import ResultsStore

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_methods_table.py"
spec = importlib.util.spec_from_file_location("make_methods_table", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def write(store, run_id, key, seconds, **values):
    rows = make_rows(run_id, tuple(values), key)
    store.write(run_id, rows.assign(value=list(values.values())), make_samples(), make_curves(), seconds)


def test_page_shows_the_stored_numbers(tmp_path):
    store = ResultsStore(tmp_path)
    full = replace(KEY, method="fp32", scope="none", weight_bits=32, act_bits=32)
    write(store, "a", full, 0.5, top1=0.9512, ece=0.0234)
    write(
        store, "b", replace(KEY, method="gptq"), 3.27, top1=0.9401, ece=0.0345, agreement=0.987, coverage_weights=0.999
    )
    eight = replace(KEY, method="gptq", weight_bits=8)
    write(store, "c", eight, 2.61, top1=0.9499, ece=0.0241, agreement=0.9951, coverage_weights=1.0, coverage_macs=0.964)
    trained = replace(KEY, method="lsq_feature")
    write(
        store, "d", trained, 9.0, top1=0.95, ece=0.02, agreement=0.99, held_out_loss_start=0.0024, held_out_loss=0.00175
    )
    write(store, "c.lst", eight.tuned, 2.61, top1=0.1, ece=0.2)
    text = script.page(script.read_results(tmp_path))
    assert "Full precision: top-1 95.1 ± " in text
    assert "| method | top-1 W8A8 | ECE W8A8 | agreement W8A8 | loss W8A8 |" in text
    assert "| `gptq` | 95.0 | 2.4 | 99.5 | – | 2.6 | 94.0 | 3.5 | 98.7 | – | 3.3 | 99.9 | 96.4 |" in text
    assert "| 95.0 | 2.0 | 99.0 | 2.40 → 1.75 | 9.0 |" in text
    assert "`lsq_feature` | yes |" in text and "10.0" not in text


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


def test_empty_store_is_one_line(tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path / "nothing"), str(tmp_path / "page.md")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (
        ended.returncode == 2
        and len(ended.stderr.splitlines()) == 1
        and "vlmq-study study=methods_table" in ended.stderr
    )
