"""A study cut into shards, through Hydra's launchers: one of them killed and run again, and the store is that of one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cases.killed_study import QUICK

from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.study.run.claims import Claims

REPOSITORY = Path(__file__).parents[3]
EXTRA = ",".join(f'"{word}"' for word in (*QUICK, "--trainer.callbacks=[]"))
STUDY = [
    *("study=demo", "study.axes.vlm=[vit_clean]", "study.axes.method=[minmax,hqq]", "study.axes.bits=[W4A8]"),
    *("study.axes.scope=[vision]", "study.cache=reference", f"study.arguments.extra=[{EXTRA}]"),
    "study.output=['--results.root={root}','--results.run_id={run_id}','--model.kept_features={cache}']",
]


def start(root: Path, *words: str) -> subprocess.Popen:
    # argparse takes words before and after an option for two lists and refuses the second, so -m stands in front of all
    command = [sys.executable, "-m", "lightning_vlmq.study.run.app", *words, *STUDY, f"study.root={root}"]
    return subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def ended(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return output


def rows(root: Path) -> list[tuple]:
    found = ResultsStore(root)
    assert found.sound()[1] == []
    table = found.rows().drop(columns=["code_version"]).fillna(-1.0)
    return sorted(map(tuple, table.to_numpy().tolist()))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("alone")
    ended(start(root))
    return root


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_shards_with_one_killed_make_the_store_of_one_process(launcher, alone: Path, tmp_path):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    more = ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else ["hydra.launcher.timeout_min=20"]
    words = ["-m", "study.shard=1/2,2/2", f"hydra/launcher={launcher}", *more]
    kept = next(run for run in ResultsStore(alone).rows()["run_id"].unique() if "hqq" in run)
    with Claims(tmp_path / "store").claim(
        kept
    ) as holder:  # a run of this process's: the study cannot end before the kill
        assert holder is None
        first = start(tmp_path / "store", *words)
        deadline = time.monotonic() + 600
        while not list((tmp_path / "store" / "results").glob("*.parquet")):  # some run is filed, others are not
            assert time.monotonic() < deadline and first.poll() is None, first.communicate()[0]
            time.sleep(0.2)
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
    assert kept not in set(ResultsStore(tmp_path / "store").rows()["run_id"])
    output = ended(start(tmp_path / "store", *words))
    assert rows(tmp_path / "store") == rows(alone)
    assert "3 of 3 runs done" in output  # by the process that launched them
