"""The results store: what is written comes back, bad input is refused, and a killed writer leaves nothing half done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from cases.store import make_curves, make_rows, make_samples

import lightning_vlmq
from lightning_vlmq.commands.compare import source_of
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models import Provenance
from lightning_vlmq.results.schema import CURVE_SCHEMA, ROW_SCHEMA, SAMPLE_SCHEMA
from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.results.version import code_version


def test_what_is_written_comes_back(tmp_path):
    store = ResultsStore(tmp_path / "logs" / "seed=1")
    rows, samples, curves = make_rows("a"), make_samples(), make_curves()
    store.write("a", rows, samples, curves)
    pd.testing.assert_frame_equal(store.rows(), rows[ROW_SCHEMA.names], check_dtype=False)
    read = store.samples("a")
    assert isinstance(read["dataset"].dtype, pd.CategoricalDtype)
    text = ["dataset", "role", "corruption", "group"]
    pd.testing.assert_frame_equal(
        read.astype(dict.fromkeys(text, str)), samples.astype(dict.fromkeys(text, str)), check_dtype=False
    )
    assert list(store.curves("a")["y"]) == [3.0, 1.5]
    schema = pq.read_schema(tmp_path / "logs" / "seed=1" / "results" / "a.parquet")
    assert schema.equals(ROW_SCHEMA)


def test_where_weights_came_from_is_kept_beside_the_identity(tmp_path):
    store = ResultsStore(tmp_path)
    provenance = Provenance("hf-hub:owner/name", "0" * 64, "1" * 16, "c0ffee")
    parts = (make_rows("a"), make_samples(), make_curves())
    store.write("a", *parts, 1.0, identity={"weights": "0"}, source=str(provenance))
    store.require_same("a", {"weights": "0"})  # whatever the source
    for _ in range(2):
        assert store.source("a") == "hf-hub:owner/name at c0ffee" and source_of(f"{tmp_path}:a", "") == store.source(
            "a"
        )
        store.compact()
        store = ResultsStore(tmp_path)


def test_columns_may_come_in_any_order_and_parts_add_up(tmp_path):
    store = ResultsStore(tmp_path)
    store.write("b", make_rows("b")[ROW_SCHEMA.names[::-1]], make_samples()[::-1], make_curves())
    store.write("a", make_rows("a", ("top1", "ece", "nll")), make_samples(), make_curves())
    assert store.run_ids() == ["a", "b"]
    assert store.has("a") and not store.has("c")
    assert len(store.rows()) == 5
    assert set(store.rows(["b"])["run_id"]) == {"b"}
    assert store.written("b") < store.written("a")


def test_empty_store_has_typed_columns(tmp_path):
    store = ResultsStore(tmp_path / "nothing")
    assert store.run_ids() == []
    assert list(store.rows().columns) == ROW_SCHEMA.names
    assert not (tmp_path / "nothing").exists()


def test_empty_samples_and_curves_are_allowed(tmp_path):
    store = ResultsStore(tmp_path)
    store.write("a", make_rows("a"), pd.DataFrame(), pd.DataFrame())
    assert list(store.samples("a").columns) == SAMPLE_SCHEMA.names
    assert list(store.curves("a").columns) == CURVE_SCHEMA.names


def test_undefined_values_stay_undefined(tmp_path):
    store = ResultsStore(tmp_path)
    rows = make_rows("a")
    rows["stderr"] = [np.nan, 0.1]
    samples = make_samples()
    samples.loc[0, ["nll", "mcm"]] = np.nan
    store.write("a", rows, samples, make_curves())
    assert np.isnan(store.rows()["stderr"][0]) and store.rows()["stderr"][1] == 0.1
    assert store.samples("a")["mcm"].isna().sum() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.drop(columns="stderr"), "lack the columns stderr"),
        (lambda rows: rows.assign(p_value=0.1), "unknown columns p_value"),
        (lambda rows: rows.assign(value="high"), "types"),
        (lambda rows: rows.assign(severity=1.5), "types"),
        (lambda rows: rows.assign(dataset=None), "empty cells"),
        (lambda rows: rows.assign(role="near"), "unknown role 'near'; did you mean near_ood"),
        (lambda rows: rows.assign(run_id="b"), "run 'b' cannot be stored as run 'a'"),
        (lambda rows: rows.assign(seed=[1, 2]), "differ in"),
        (lambda rows: rows.assign(metric="top1"), "two rows for pictures id 0 top1"),
        (lambda rows: rows.iloc[:0], "no results rows"),
    ],
)
def test_bad_rows_are_refused_and_nothing_is_written(tmp_path, change, message):
    store = ResultsStore(tmp_path)
    with pytest.raises(VLMQError, match=message):
        store.write("a", change(make_rows("a")), make_samples(), make_curves())
    assert not list(tmp_path.rglob("*.*"))


def test_bad_samples_and_curves_are_refused(tmp_path):
    store = ResultsStore(tmp_path)
    with pytest.raises(VLMQError, match="samples lack the columns nll"):
        store.write("a", make_rows("a"), make_samples().drop(columns="nll"), make_curves())
    with pytest.raises(VLMQError, match="types"):
        store.write("a", make_rows("a"), make_samples().assign(mcm="x"), make_curves())
    with pytest.raises(VLMQError, match="curves have unknown columns z"):
        store.write("a", make_rows("a"), make_samples(), make_curves().assign(z=1))
    assert store.run_ids() == []


@pytest.mark.parametrize("run_id", ["", "../a", "a/b", ".hidden", "a b"])
def test_run_ids_that_are_not_file_names_are_refused(tmp_path, run_id):
    with pytest.raises(VLMQError, match="cannot be a run id"):
        ResultsStore(tmp_path).write(run_id, make_rows(run_id), make_samples(), make_curves())


@pytest.mark.parametrize("kept_bytes", [0, 7, 200])
def test_a_truncated_part_is_named_counts_as_not_done_and_is_replaced(tmp_path, kept_bytes):
    store = ResultsStore(tmp_path)
    for run_id in ("a", "b"):
        store.write(run_id, make_rows(run_id), make_samples(), make_curves())
    part = tmp_path / "results" / "a.parquet"
    part.write_bytes(part.read_bytes()[:kept_bytes])
    with pytest.raises(VLMQError, match=r"results/a\.parquet cannot be read .*delete") as error:
        store.rows(["a"])
    assert "\n" not in str(error.value)
    assert not store.has("a") and store.has("b")
    store.write("a", make_rows("a"), make_samples(), make_curves())
    assert store.has("a") and len(store.rows()) == 4


def test_missing_and_truncated_samples_are_named(tmp_path):
    store = ResultsStore(tmp_path)
    store.write("a", make_rows("a"), make_samples(), make_curves())
    with pytest.raises(VLMQError, match="no samples of run 'b'"):
        store.samples("b")
    part = tmp_path / "samples" / "a.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(VLMQError, match=r"samples/a\.parquet cannot be read .*delete .*results/a\.parquet"):
        store.samples("a")


def test_a_foreign_parquet_file_is_named(tmp_path):
    (tmp_path / "results").mkdir()
    pd.DataFrame({"model": ["x"]}).to_parquet(tmp_path / "results" / "x.parquet")
    with pytest.raises(VLMQError, match=r"x\.parquet cannot be read .*not what a results store wrote"):
        ResultsStore(tmp_path).rows(["x"])
    assert ResultsStore(tmp_path).rows().empty


WRITER = """
import sys
sys.path.insert(0, {tests!r})
import pandas as pd
from cases.store import make_curves, make_rows, make_samples
from lightning_vlmq.results.store import ResultsStore
store, samples = ResultsStore({root!r}), make_samples(100_000)
rows = pd.concat([make_rows("?", tuple(f"metric{{i}}" for i in range(2_000)))])
print("ready", flush=True)
for i in range(10_000):
    store.write(f"run{{i:05d}}", rows.assign(run_id=f"run{{i:05d}}"), samples, make_curves())
"""


def _half_written(root) -> set[str]:
    """Names of runs that have left a file of any kind, but are not filed."""
    started = {path.name.lstrip(".").split(".")[0] for path in root.glob("*/*")}
    return started - set(ResultsStore(root).run_ids())


@pytest.mark.parametrize("runs_before", [1, 3])
def test_a_killed_writer_leaves_no_half_run(tmp_path, runs_before):
    script = WRITER.format(tests=os.path.dirname(os.path.dirname(__file__)), root=str(tmp_path))
    writer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "ready\n"
    store = ResultsStore(tmp_path)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:  # held still, so that what is seen is what the kill leaves behind
        writer.send_signal(signal.SIGSTOP)
        os.waitpid(writer.pid, os.WUNTRACED)
        if len(store.run_ids()) >= runs_before and _half_written(tmp_path):
            break
        writer.send_signal(signal.SIGCONT)
        time.sleep(0.003)
    writer.send_signal(signal.SIGKILL)
    assert writer.wait() == -signal.SIGKILL
    (interrupted,) = _half_written(tmp_path)
    done = store.run_ids()
    assert len(done) >= runs_before and len(store.rows()) == 2_000 * len(done)
    for run_id in done:
        assert store.has(run_id) and len(store.samples(run_id)) == 100_000 and len(store.curves(run_id)) == 2
    assert not store.has(interrupted)
    store.write(interrupted, make_rows(interrupted), make_samples(), make_curves())
    assert store.has(interrupted)


def _write_the_same_run(root) -> None:
    for _ in range(5):
        ResultsStore(root).write("a", make_rows("a"), make_samples(), make_curves())


def test_writers_of_one_run_do_not_disturb_each_other(tmp_path):
    with ProcessPoolExecutor(3) as pool:
        list(pool.map(_write_the_same_run, [tmp_path] * 3))
    assert len(ResultsStore(tmp_path).rows()) == 2
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["a.parquet"] * 3


def test_code_version_names_the_release_and_the_commit():
    version = code_version()
    assert version.startswith(lightning_vlmq.__version__)
    checkout = os.path.dirname(os.path.dirname(lightning_vlmq.__file__))
    head = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode == 0 and os.path.exists(os.path.join(checkout, ".git")):
        commit = version.removeprefix(f"{lightning_vlmq.__version__}+g").removesuffix(".dirty")
        assert len(commit) >= 7 and head.stdout.startswith(commit)
    else:
        assert version == lightning_vlmq.__version__
