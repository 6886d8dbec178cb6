"""Damage is never read as results: bit flips, missing parts, foreign files, copies."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from cases.store import make_curves, make_rows, make_samples
from cases.study import grid, write_study

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.study.analysis.comparison import analyse
from lightning_vlmq.study.analysis.runs import StudyResults
from lightning_vlmq.study.report.page import write_report


@pytest.mark.parametrize("kind", ["results", "samples"])
def test_of_a_thousand_flipped_bits_none_is_read_as_another_value(tmp_path, kind):
    store = ResultsStore(tmp_path)
    store.write("a", make_rows("a", tuple(f"m{i}" for i in range(20))), make_samples(), make_curves())
    path = tmp_path / kind / "a.parquet"
    good, before = path.read_bytes(), getattr(store, "rows" if kind == "results" else "samples")
    argument = ["a"] if kind == "results" else "a"
    whole = before(argument)
    rng, refused = np.random.default_rng(0), 0
    for bit in rng.integers(0, 8 * len(good), 500):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(bad)
        try:
            read = before(argument)
        except VLMQError:
            refused += 1
            continue
        pd.testing.assert_frame_equal(read, whole)
    assert refused > 300
    path.write_bytes(good)
    assert store.has("a")


@pytest.mark.parametrize("kind", ["results", "samples", "curves"])
def test_a_run_without_one_of_its_parts_is_run_again(tmp_path, kind):
    store = ResultsStore(tmp_path)
    store.write("a.lst", make_rows("a.lst"), make_samples(), make_curves())
    store.write("a", make_rows("a"), make_samples(), make_curves(), companions=["a.lst"])
    assert store.has("a") and store.sound() == (["a", "a.lst"], [])
    (tmp_path / kind / "a.lst.parquet").unlink()
    assert not store.has("a") and not store.has("a.lst")
    assert store.sound()[0] == [] and "a.lst" in store.problem("a")


def test_parts_of_two_writings_do_not_make_a_run(tmp_path):
    store = ResultsStore(tmp_path)
    store.write("a", make_rows("a"), make_samples(50), make_curves())
    samples = (tmp_path / "samples" / "a.parquet").read_bytes()
    store.write("a", make_rows("a"), make_samples(60), make_curves())
    (tmp_path / "samples" / "a.parquet").write_bytes(samples)
    assert not store.has("a") and "not of the same run" in store.problem("a")


def test_foreign_files_are_one_line_each_and_block_nothing(tmp_path):
    store = ResultsStore(tmp_path)
    store.write("a", make_rows("a"), make_samples(), make_curves())
    results = tmp_path / "results"
    for kind in ("results", "samples", "curves"):
        (tmp_path / kind / "copy.parquet").write_bytes((tmp_path / kind / "a.parquet").read_bytes())
    pd.read_parquet(results / "a.parquet").to_parquet(results / "resaved.parquet")
    pd.read_parquet(results / "a.parquet").iloc[:0].to_parquet(results / "empty.parquet")
    (results / "notes.txt").write_text("mine")
    (results / "with space.parquet").write_bytes(b"")
    (results / "folder.parquet").mkdir()
    runs, problems = store.sound()
    assert runs == ["a"] and len(problems) == 6 and not any("\n" in line for line in problems)
    assert len(store.rows()) == 2


def test_the_report_is_built_without_what_is_damaged_and_names_it(tmp_path):
    write_study(tmp_path, grid(["vit_clean"], ["minmax", "lsq_contrastive"], [(4, 8)], ["vision"]), size=0.02)
    part = next((tmp_path / "samples").glob("*minmax*"))
    part.write_bytes(part.read_bytes()[:-40])
    page = write_report(analyse(StudyResults.load(tmp_path))).read_text()
    assert f"Left out: {part}" in page and "lsq_contrastive" in page


@pytest.mark.parametrize("run_id", ["../../x", "a/b", "x" * 151, "", ".x"])
def test_names_that_leave_the_root_are_refused_before_any_work(run_id, tmp_path):
    from lightning_vlmq.callbacks import ResultsWriter

    with pytest.raises(VLMQError, match="cannot be a run id"):
        ResultsWriter(str(tmp_path), run_id)
