"""Two runners on one store share the runs; a claim that nobody holds any more is anybody's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest
from cases.store import make_curves, make_rows, make_samples
from rich.console import Console

from lightning_vlmq.core.atomic import MACHINE
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.study.run import claims as module
from lightning_vlmq.study.run import execute as runner
from lightning_vlmq.study.run.claims import Claims
from lightning_vlmq.study.run.grid import Run

RUNS = [Run("vit_clean", "none", "fp32", "W32A32", "fp32", 0, f"run-{i}", ("validate", f"run-{i}")) for i in range(3)]


def file_run(store: ResultsStore, run_id: str) -> None:
    store.write(run_id, make_rows(run_id), make_samples(), make_curves())


@pytest.fixture
def alive():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    yield process
    process.kill()
    process.wait()


def write_claim(root, run_id, pid, machine=MACHINE, age=0.0, text=None):
    (root / "claims").mkdir(parents=True, exist_ok=True)
    path = root / "claims" / f"{run_id}.json"
    content = {"host": "somewhere", "machine": machine, "pid": pid, "since": 0.0, "token": "x"}
    path.write_text(json.dumps(content) if text is None else text)
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_a_claim_is_a_file_while_it_lasts(tmp_path):
    path = tmp_path / "claims" / "a.json"
    with Claims(tmp_path).claim("a") as holder:
        assert holder is None and json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_who_holds_a_claim(tmp_path, alive):
    claims = Claims(tmp_path)

    def holder(**claim):
        write_claim(tmp_path, "a", **claim)
        with claims.claim("a") as found:
            return found

    assert holder(pid=alive.pid).pid == alive.pid
    assert str(holder(pid=alive.pid, machine="other")) == f"process {alive.pid} on somewhere"
    assert holder(pid=4194303, machine="other").pid == 4194303  # may be there, in a container of this machine too
    assert holder(pid=alive.pid, machine="other", age=2 * module.STALE_SECONDS) is None
    assert holder(pid=alive.pid, age=2 * module.STALE_SECONDS) is None  # another process may have its number by now
    assert holder(pid=os.getpid()) is None  # of a runner with this number, before a restart
    for damaged in ("", "{", "[]", '{"pid": "x"}', "[" * 100_000):
        assert holder(pid=0, text=damaged) is None
    alive.kill()
    alive.wait()
    assert holder(pid=alive.pid) is None


def test_a_claim_that_was_taken_over_is_not_removed(tmp_path, alive):
    with Claims(tmp_path).claim("a"):
        path = write_claim(tmp_path, "a", pid=alive.pid)
    assert path.exists()


def test_a_claim_says_that_it_is_alive(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.05)
    with Claims(tmp_path).claim("a"):
        path = tmp_path / "claims" / "a.json"
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 20
        while path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert path.stat().st_mtime > 0


def test_no_place_for_claims_is_one_line(tmp_path):
    (tmp_path / "claims").touch()
    with pytest.raises(VLMQError, match=r"claims/a\.json' cannot be written"), Claims(tmp_path).claim("a"):
        pass


def test_what_another_runner_computes_is_waited_for_and_taken(tmp_path, alive, monkeypatch):
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.05)
    store, called = ResultsStore(tmp_path), []
    path = write_claim(tmp_path, "run-0", pid=alive.pid)
    died = write_claim(tmp_path, "run-1", pid=alive.pid)

    def main(arguments):
        called.append(arguments[1])
        file_run(store, arguments[1])
        if arguments[1] == "run-2":
            threading.Thread(target=lambda: (file_run(store, "run-0"), path.unlink(), died.unlink())).start()

    with open(tmp_path / "screen", "w") as file:
        outcome = runner.execute(RUNS, store, main, Console(file=file, width=200))
    assert called == ["run-2", "run-1"]  # run-0 was filed by the other, run-1 was left by it
    assert (outcome.done, outcome.skipped) == (2, 1) and store.run_ids() == ["run-0", "run-1", "run-2"]
    screen = (tmp_path / "screen").read_text()
    assert screen.count(f"process {alive.pid} on somewhere") == 3 and not list((tmp_path / "claims").iterdir())


def test_a_run_that_was_filed_meanwhile_is_not_run_again(tmp_path):
    store, called = ResultsStore(tmp_path), []

    def main(arguments):
        called.append(arguments[1])
        for run in RUNS:  # another runner, faster
            file_run(store, run.run_id)

    with open(tmp_path / "screen", "w") as file:
        outcome = runner.execute(RUNS, store, main, Console(file=file))
    assert called == ["run-0"] and (outcome.done, outcome.skipped) == (1, 2)


RUNNER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from rich.console import Console
from study.run.test_claims import RUNS, file_run
from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.study.run import execute as runner
runner.POLL_SECONDS = 0.05
root, store = Path({root!r}), ResultsStore({root!r})
def main(arguments):
    with open(root / "log", "a") as log:
        log.write(arguments[1] + chr(10))
    time.sleep(0.5)
    file_run(store, arguments[1])
(root / f"ready-{{sys.argv[1]}}").touch()
while len(list(root.glob("ready-*"))) < 2:
    time.sleep(0.01)
outcome = runner.execute(RUNS, store, main, Console(file=open(root / "screen", "a")))
sys.exit(10 * outcome.done + outcome.skipped)
"""


def test_two_runners_compute_everything_once(tmp_path):
    script = RUNNER.format(tests=os.path.abspath("tests"), root=str(tmp_path))
    runners = [subprocess.Popen([sys.executable, "-c", script, str(k)]) for k in range(2)]
    codes = [process.wait(300) for process in runners]
    assert sorted((tmp_path / "log").read_text().split()) == ["run-0", "run-1", "run-2"]
    assert sum(code // 10 for code in codes) == sum(code % 10 for code in codes) == 3
