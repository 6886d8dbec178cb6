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


@pytest.mark.parametrize("kind", ["results", "samples", "curves"])
def test_of_a_thousand_flipped_bits_none_is_read_as_another_value(tmp_path, kind):
    store = ResultsStore(tmp_path)
    store.write("a", make_rows("a", tuple(f"m{i}" for i in range(20))), make_samples(), make_curves())
    path = tmp_path / kind / "a.parquet"
    good, before = path.read_bytes(), getattr(store, "rows" if kind == "results" else kind)
    argument = ["a"] if kind == "results" else "a"
    whole = before(argument)
    rng, refused = np.random.default_rng(0), 0
    for bit in rng.integers(0, 8 * len(good), 1_000):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(bad)
        try:
            read = before(argument)
        except VLMQError:
            refused += 1
            continue
        pd.testing.assert_frame_equal(read, whole)
    assert refused > 600
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
    assert store.sound()[0] == [] and "a.lst" in store.problems("a")[0]


def test_parts_of_two_writings_do_not_make_a_run(tmp_path):
    store = ResultsStore(tmp_path)
    store.write("a", make_rows("a"), make_samples(50), make_curves())
    samples = (tmp_path / "samples" / "a.parquet").read_bytes()
    store.write("a", make_rows("a"), make_samples(60), make_curves())
    (tmp_path / "samples" / "a.parquet").write_bytes(samples)
    assert not store.has("a") and "not of the same run" in store.problems("a")[0]


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


def test_every_bad_part_is_named_and_the_next_run_makes_it_anew(tmp_path):
    store = ResultsStore(tmp_path)
    for run_id in ("a", "b", "c"):
        store.write(run_id, make_rows(run_id), make_samples(), make_curves())
    good = {path: path.read_bytes() for path in tmp_path.rglob("*.parquet")}
    for part in ("results/a", "samples/a", "curves/b"):
        path = tmp_path / f"{part}.parquet"
        path.write_bytes(path.read_bytes()[:-9])
    (tmp_path / "samples" / "b.parquet").unlink()
    (tmp_path / "samples" / "lone.parquet").write_bytes(good[tmp_path / "samples" / "c.parquet"])
    runs, problems = store.sound()
    assert runs == ["c"] and len(problems) == 5
    for part in ("results/a", "samples/a", "samples/b", "curves/b", "samples/lone"):
        assert sum(f"{part}.parquet" in line for line in problems) == 1 + (part == "results/a"), part
    for run_id in ("a", "b"):
        assert not store.has(run_id)
        store.write(run_id, make_rows(run_id), make_samples(), make_curves())
    assert store.sound()[0] == ["a", "b", "c"]


def test_zeroed_bytes_are_not_read_as_values(tmp_path):
    store = ResultsStore(tmp_path)
    store.write("a", make_rows("a"), make_samples(2_000), make_curves())
    whole, refused = [store.rows(["a"]), store.samples("a"), store.curves("a")], 0
    for path in tmp_path.rglob("*.parquet"):
        good = path.read_bytes()
        for start in range(4, len(good) - 64, max(len(good) // 12, 1)):
            path.write_bytes(good[:start] + bytes(64) + good[start + 64 :])
            if not store.has("a"):
                refused += 1
                continue
            for read, before in zip([store.rows(["a"]), store.samples("a"), store.curves("a")], whole):
                pd.testing.assert_frame_equal(read, before)  # in what only describes the columns once more
        path.write_bytes(good)
    assert store.has("a") and refused > 15


def test_a_date_in_the_future_is_said_and_does_not_win(tmp_path, monkeypatch):
    from datetime import UTC, datetime, timedelta

    from lightning_vlmq.results import said as module

    keys = grid(["vit_clean"], ["minmax"], [(4, 8)], ["vision"])
    store = write_study(tmp_path, keys, size=0.02)
    (right,) = (run for run in store.run_ids() if "minmax" in run)

    class Ahead(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(days=900)

    monkeypatch.setattr(module, "datetime", Ahead)
    store.write("ahead", make_rows("ahead", key=keys[1]), make_samples(), make_curves())
    monkeypatch.undo()
    assert store.written("ahead") > datetime.now(UTC)
    loaded = StudyResults.load(tmp_path)
    assert right in {run.run_id for run in loaded.runs} and "ahead" not in {run.run_id for run in loaded.runs}
    assert len(loaded.notes) == 1 and "'ahead'" in loaded.notes[0] and "\n" not in loaded.notes[0]


def test_what_is_left_of_a_damaged_run_does_not_count(tmp_path):
    """A run's tuned self was filed with it; without the run it stands for nothing."""
    write_study(tmp_path, grid(["vit_clean"], ["minmax"], [(4, 8)], ["vision"], tuned=True), size=0.02)
    next(path for path in (tmp_path / "samples").glob("*minmax*") if ".lst" not in path.name).unlink()
    results = StudyResults.load(tmp_path)
    assert sorted((run.key.method, run.key.is_tuned) for run in results.runs) == [("fp32", False), ("fp32", True)]
    next(path for path in (tmp_path / "samples").glob("*fp32*") if ".lst" not in path.name).unlink()
    with pytest.raises(VLMQError, match="no whole run is left"):
        StudyResults.load(tmp_path)
