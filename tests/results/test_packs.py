"""Runs packed into few files: nothing that is read changes, whatever happens while they are packed or to the packs."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pyarrow.compute as pc
import pytest
from cases.store import make_curves, make_rows, make_samples

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.results import packing as module
from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.statistics import Statistics
from lightning_vlmq.study.run.status import status_of

RUNS = ["a", "b", "b.lst", "c"]


def fill(root: Path) -> ResultsStore:
    store = ResultsStore(root)
    for number, run_id in enumerate(sorted(RUNS, reverse=True)):  # a tuned one before the run it belongs to
        samples = make_samples().assign(**({"extra": 0.5} if run_id == "c" else {}))
        companions = ["b.lst"] if run_id == "b" else []
        curves = pd.DataFrame() if run_id == "c" else make_curves()
        store.write(
            *(run_id, make_rows(run_id), samples, curves, float(number), Statistics(n_bins=10), {"name": run_id}),
            companions=companions,
            facts={"cache_hits": number},
        )
    return store


def everything(store: ResultsStore) -> dict:
    """All that can be asked of a store, in plain values."""
    return {
        run_id: (
            *(store.rows([run_id]).to_dict("records").__repr__(), store.samples(run_id).to_dict("list").__repr__()),
            *(store.curves(run_id).to_dict("list").__repr__(), store.seconds(run_id), store.written(run_id)),
            *(store.statistics(run_id), store.identity(run_id), store.problems(run_id)),
            *(value for name, value in store.facts(run_id).items() if name != "written"),
        )
        for run_id in store.run_ids()
    }


@pytest.fixture
def store(tmp_path) -> ResultsStore:
    return fill(tmp_path)


def test_a_packed_store_reads_as_before(store, tmp_path):
    before = everything(store)
    assert store.compact() == 4 and store.compact() == 0
    assert everything(store) == before == everything(ResultsStore(tmp_path))
    assert store.sound() == (sorted(RUNS), []) and all(map(store.has, RUNS)) and not store.has("d")
    assert not list(tmp_path.glob("*/*.parquet")) or len(list((tmp_path / "packs").glob("[!.]*"))) == 4
    store.require_same("a", {"name": "a"})
    with pytest.raises(VLMQError, match="holds another run 'a'"):
        store.require_same("a", {"name": "b"})


def test_many_packs_become_one(store, tmp_path, monkeypatch):
    store.compact()
    monkeypatch.setattr(module, "MOST", 2)
    for run_id in ("x", "y"):
        store.write(run_id, make_rows(run_id), make_samples(), make_curves(), 1.0)
        before = everything(store)
        assert store.compact() == 1
        assert everything(store) == before
    assert len(list((tmp_path / "packs").glob("*.index.parquet"))) == 1 and len(before) == 6


def test_loose_and_packed_runs_are_one_store(store):
    store.compact()
    store.write("z", make_rows("z"), make_samples(), make_curves())
    assert store.run_ids() == [*sorted(RUNS), "z"] and store.sound() == ([*sorted(RUNS), "z"], [])
    assert set(store.rows()["run_id"]) == {*RUNS, "z"}
    chosen = store.table(["z", "a"], ["run_id", "metric", "value"], pc.field("metric") == "top1").to_pandas()
    wanted = store.rows(["z", "a"]).query("metric == 'top1'")
    assert (
        chosen["run_id"].tolist() == wanted["run_id"].tolist() and chosen["value"].tolist() == wanted["value"].tolist()
    )
    assert len(chosen) and set(chosen["metric"]) == {"top1"}


def test_samples_can_be_left_out(store):
    rows = store.rows()
    store.compact(keeps_samples=False)
    assert all(map(store.has, RUNS)) and store.rows().equals(rows[store.rows().columns])
    with pytest.raises(VLMQError, match=r"samples of run 'a' were not kept .* samples=true"):
        store.samples("a")


class Killed(BaseException):
    pass


def test_killed_at_every_move_and_deletion(tmp_path, monkeypatch):
    """Each file operation of packing is the last one once: then nothing is lost or doubled, and packing again ends as if undisturbed."""
    before = everything(fill(tmp_path / "whole"))
    for moment in range(1, 100):
        root = tmp_path / str(moment)
        store, left = fill(root), [moment]
        written = {run_id: known[4] for run_id, known in everything(store).items()}

        def dying(operation, left=left):
            def call(*arguments, **options):
                left[0] -= 1
                if left[0] == 0:
                    raise Killed
                return operation(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying(os.replace))
            patch.setattr(Path, "unlink", dying(Path.unlink))
            try:
                store.compact()
                is_over = True
            except Killed:
                is_over = False
        for reader in (store, ResultsStore(root)):
            found = everything(reader)
            assert {r: k[:4] + k[5:] for r, k in found.items()} == {r: k[:4] + k[5:] for r, k in before.items()}
            assert {r: k[4] for r, k in found.items()} == written
            assert reader.sound()[0] == sorted(RUNS) and len(reader.rows()) == 4 * len(make_rows("a"))
        ResultsStore(root).compact()
        assert ResultsStore(root).sound() == (sorted(RUNS), [])
        assert not list(root.glob("results/*")) and not list(root.glob("samples/*"))
        if is_over:
            break
    assert moment > 12  # four files moved, a dozen deleted


@pytest.mark.parametrize("kind", ["results", "samples", "curves", "index"])
@pytest.mark.parametrize("damage", ["flip", "missing"])
def test_a_damaged_pack_is_said_and_its_runs_are_run_again(store, tmp_path, kind, damage):
    store.compact()
    (path,) = (tmp_path / "packs").glob(f"*.{kind}.parquet")
    data = bytearray(path.read_bytes())
    data[64] ^= 0xFF
    path.write_bytes(data)
    if damage == "missing":
        path.unlink()
    fresh = ResultsStore(tmp_path)
    runs, bad = fresh.sound()
    assert runs == [] and bad and any(path.name in why or "belongs to no pack" in why for why in bad)
    assert not any(map(fresh.has, RUNS))
    for run_id in sorted(RUNS, reverse=True):
        fresh.write(
            run_id, make_rows(run_id), make_samples(), make_curves(), companions=["b.lst"] if run_id == "b" else []
        )
    assert fresh.sound()[0] == sorted(RUNS)
    assert fresh.compact() == 4 and ResultsStore(tmp_path).sound()[0] == sorted(RUNS)


def test_packing_twice_at_once_is_refused(store):
    with module.packing(store._packs), pytest.raises(VLMQError, match="being packed by another process"):
        store.compact()


def test_foreign_files_are_named_and_harm_nothing(store, tmp_path):
    store.compact()
    store.write("z", make_rows("z"), make_samples(), make_curves())
    (index,) = (tmp_path / "packs").glob("*.index.parquet")
    copies = [
        index.with_name(f"{index.name.partition('.')[0]}{how}.index.parquet") for how in (" (1)", "_copy", "-copy")
    ]
    for copy in copies:
        copy.write_bytes(index.read_bytes())
    for kind in ("results", "samples", "curves"):
        (tmp_path / kind / "a (1).parquet").write_bytes((tmp_path / kind / "z.parquet").read_bytes())
        (tmp_path / kind / "-a.parquet").mkdir()
        (tmp_path / kind / "folder.parquet").mkdir()
    (tmp_path / "packs" / "mine.results.parquet").write_text("mine")
    for folder, name in (("failures", "b (1).txt"), ("claims", "b (1).json")):
        (tmp_path / folder / name).mkdir(parents=True)
    (tmp_path / "claims" / "c (1).json").write_text("[]")
    foreign = {*(path.name for path in copies), "a (1).parquet", "-a.parquet", "mine.results.parquet"}
    for _ in range(2):
        runs, bad = ResultsStore(tmp_path).sound()
        assert runs == [*sorted(RUNS), "z"] and all(any(name in why for why in bad) for name in foreign)
        found = status_of(tmp_path)
        assert (found.failed, found.running) == ({}, {}) and found.evaluations > 0
        ResultsStore(tmp_path).export(runs, tmp_path / "other")
        assert ResultsStore(tmp_path / "other").sound() == (runs, [])
        assert ResultsStore(tmp_path).compact() in (0, 1)
    assert (tmp_path / "packs" / "mine.results.parquet").exists()
    assert not (tmp_path / "results" / "z.parquet").exists() and (tmp_path / "results" / "a (1).parquet").exists()


def test_a_damaged_pack_does_not_keep_the_others_from_being_packed(store, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "MOST", 2)
    store.compact()
    (bad,) = (tmp_path / "packs").glob("*.results.parquet")
    bad.write_bytes(bad.read_bytes()[:-1])
    for run_id in ("x", "y", "z"):  # the third pack takes the first two sound ones in
        store.write(run_id, make_rows(run_id), make_samples(), make_curves())
        caplog.clear()
        store = ResultsStore(tmp_path)
        assert store.compact() == 1
        assert f"not packed: {bad} does not hold what was written" in caplog.text
    assert len(list((tmp_path / "packs").glob("*.index.parquet"))) == 2 and bad.exists()
    runs, problems = ResultsStore(tmp_path).sound()
    assert runs == ["x", "y", "z"] and len(problems) == 1


def test_samples_that_are_filed_again_are_packed_again(store, tmp_path):
    before = everything(store)
    store.compact(keeps_samples=False)
    rows = store.rows()
    for keeps_samples in (False, True):  # left out once more where that is asked for
        store.write("a", make_rows("a"), make_samples(), make_curves(), 3.0, Statistics(n_bins=10), {"name": "a"})
        assert store.keeps_samples("a") and not store.keeps_samples("c")
        assert store.compact(keeps_samples) == keeps_samples and not list((tmp_path / "results").iterdir())
        store = ResultsStore(tmp_path)
        assert store.keeps_samples("a") == keeps_samples and store.compact() == 0
    assert store.samples("a").to_dict("list").__repr__() == before["a"][1]
    for chosen in (RUNS, ["a"], ["b", "c"]):  # in two packs, a counts once
        wanted = rows[rows["run_id"].isin(chosen)].value_counts(["run_id", "metric", "value"]).sort_index()
        assert store.rows(chosen).value_counts(["run_id", "metric", "value"]).sort_index().equals(wanted)


def test_a_damaged_run_whose_rows_are_packed_goes(store, tmp_path):
    store.compact(keeps_samples=False)
    store.write("a", make_rows("a"), make_samples(), make_curves())
    (tmp_path / "samples" / "a.parquet").write_text("damaged")
    assert store.compact() == 0 and not list((tmp_path / "results").iterdir()) and store.has("a")
