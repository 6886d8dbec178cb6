"""Where a study stands, from its folder alone."""

from __future__ import annotations

import math
import time
from datetime import timedelta

import pytest
from cases.study import QUICK, make_run
from omegaconf import OmegaConf

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.identity import digest
from lightning_vlmq.results.counting import evaluations_a_model, evaluations_in
from lightning_vlmq.results.schema import RunKey
from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.study.run.claims import Claims
from lightning_vlmq.study.run.grid import Run
from lightning_vlmq.study.run.progress import MultirunProgress
from lightning_vlmq.study.run.status import Status, rate, status_of

KEY = RunKey("vit_clean", "clean", "vision", "minmax", 8, 8, 0)
ROLES = ["id", "near_ood", "far_ood", "far_ood", *["corruption"] * 15, *["shift"] * 4, *["spurious"] * 2]


def a_run(name: str) -> Run:
    return Run("vit_clean", "vision", "minmax", "W8A8", "ptq", 0, name, ("validate",))


@pytest.fixture
def store(tmp_path) -> ResultsStore:
    store = ResultsStore(tmp_path)
    for name in ("a", "stranger"):
        counted = {"cache_hits": 3, "cache_misses": 1} if name == "a" else {"cache_misses": 50}
        store.write(name, *make_run(KEY, name, size=0.01), statistics=QUICK, facts=counted)
    return store


def test_evaluation_runs_are_models_times_sets_times_scores(store):
    """By hand: 22 labelled sets, three OOD sets under two scores each; the plan's way and the rows' way agree."""
    assert evaluations_a_model(ROLES, 2) == 22 + 3 * 2
    assert evaluations_in(store.rows(["a"])) == 22 + 3 * 2 == store.facts("a")["evaluations"]
    assert evaluations_in(store.rows()) == 2 * (22 + 3 * 2)
    with pytest.raises(VLMQError, match="unknown role"):
        evaluations_a_model(["nonesuch"], 2)


def test_done_failed_and_running_of_this_grid_alone(store, tmp_path):
    (tmp_path / "failures").mkdir()
    for name, text in {"b": "vlmq\n\nTraceback\nValueError: no", "x": "other grid", "a": "before it was done"}.items():
        (tmp_path / "failures" / f"{name}.txt").write_text(text)
    with Claims(tmp_path).claim("c"), Claims(tmp_path).claim("stranger2"):
        found = status_of(tmp_path, [a_run(name) for name in "abcd"])
    assert (found.total, found.done, found.failed) == (4, 1, {"b": "ValueError: no"})
    assert list(found.running) == ["c"] and found.evaluations == 28 and found.cache_hits == 0.75
    assert "1 of 4 runs done, 1 failed, 1 running, 28 evaluation runs" in str(found)
    assert not status_of(tmp_path, [a_run("c")]).running  # released
    everything = status_of(tmp_path)
    assert (everything.total, everything.done, everything.evaluations) == (0, 2, 56)
    assert status_of(tmp_path / "nowhere", [a_run("a")]).done == 0


def test_what_is_filed_as_part_of_a_run_counts_with_it(store, tmp_path):
    for part in ("a.lst", "a.heal_0-8", "a.64_up", "a.x.lst", "stranger.lst"):
        store.write(part, *make_run(KEY, part, size=0.01), statistics=QUICK)
    found = status_of(tmp_path, [a_run("a"), a_run("b")])
    assert (found.done, found.evaluations) == (1, 4 * 28)
    everything = status_of(tmp_path)
    assert (everything.done, everything.evaluations) == (2, 7 * 28)


def test_rate_and_time_left():
    now = 1e9
    assert rate([now - 1800, now - 900, now - 60, now - 7200], now) == pytest.approx(3600 * 2 / 1800)
    assert math.isnan(rate([now - 7200, now - 60], now)) and math.isnan(rate([], now))
    assert Status(20, 4, {"x": ""}, {}, 0, 30.0, math.nan).left == timedelta(minutes=30)
    assert Status(20, 4, {}, {}, 0, math.nan, math.nan).left is None


def test_what_is_counted_does_not_change_what_a_run_is(store):
    assert digest(store.identity("a")) == digest(store.identity("stranger"))


def test_progress_of_jobs_that_run_elsewhere(store, tmp_path, capsys):
    launched = {"launcher": {"_target_": "x.JoblibLauncher"}, "overrides": {"task": ["study.axes.vlm=[a],[b]"]}}
    config = OmegaConf.create({"hydra": launched, "study": {"root": str(tmp_path)}, "seed": 0})
    watch = MultirunProgress(seconds=0.02)
    watch.on_multirun_start(config)
    deadline = time.monotonic() + 30
    while "2 runs done" not in (said := capsys.readouterr().out) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "2 runs done" in said  # without a total: the axes that are swept over make several grids
    store.write("third", *make_run(KEY, "third", size=0.01), statistics=QUICK)
    watch.on_multirun_end(config)
    assert "3 runs done" in capsys.readouterr().out
    config.hydra.launcher._target_ = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
    watch.on_multirun_start(config)
    watch.on_multirun_end(config)
    assert capsys.readouterr().out == ""
