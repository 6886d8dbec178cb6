"""The table of docs/reliability.md: the same bits, or the largest difference that it states."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import determinism_runs
from safetensors.torch import load_file

from lightning_vlmq.results.store import ResultsStore

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
ROW = re.compile(r"^\| ([^|]+)" + r" \| (same bits|[\d.e-]+)" * 4 + r" \|$", re.M)


def stated() -> dict[str, dict[str, tuple[float, float]]]:
    """Bounds by setting and model: of a sample's confidence, and of a metric."""
    rows = [match.groups() for match in ROW.finditer(PAGE.read_text(encoding="utf-8"))]
    bounds = {name: [bound(text) for text in texts] for name, *texts in rows}
    return {name: {"": (own[0], own[1]), "-w4a8": (own[2], own[3])} for name, own in bounds.items()}


def bound(text: str) -> float:
    return 0.0 if text == "same bits" else float(text)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("determinism")
    done = subprocess.run(
        [sys.executable, determinism_runs.__file__, str(root)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return ResultsStore(root)


def test_the_table_has_every_setting():
    assert list(stated()) == [name for name in determinism_runs.SETTINGS if name != "first"]


@pytest.mark.parametrize("model", ["", "-w4a8"])
@pytest.mark.parametrize("name", [name for name in determinism_runs.SETTINGS if name != "first"])
def test_differences_are_as_stated(store, name, model):
    sample_bound, metric_bound = stated()[name][model]
    first, other = f"first{model}", f"{name.replace(' ', '_')}{model}"
    order = ["dataset", "index"]
    samples = [store.samples(run).astype({"dataset": str}).sort_values(order) for run in (first, other)]
    worst = 0.0
    for column in ("confidence", "nll", "brier", "mcm"):
        one, two = (frame[column].to_numpy(np.float64) for frame in samples)
        worst = max(worst, float(np.nanmax(np.abs(one - two))))
    keys = ["dataset", "role", "score", "metric"]
    rows = [store.rows([run]).set_index(keys)["value"] for run in (first, other)]
    assert set(rows[0].index) == set(rows[1].index)
    change = (rows[0] - rows[1].reindex(rows[0].index)).abs().max()
    print(f"{name}{model}: samples {worst:.1e}, metrics {change:.1e}")
    assert worst <= sample_bound and change <= metric_bound


@pytest.mark.parametrize("model", ["", "-w4a8"])
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_keep_the_features_that_one_keeps(store, processes, model):
    """Whole, each in its place, and nothing beside; the model in full precision and the quantized one."""
    one, several = (
        sorted((store.root / f"features_{run}{model}").iterdir()) for run in ("first", f"{processes}_processes")
    )
    sets = {path.stem.split("_", 1)[1] for path in one}  # the digests of towers count how they were computed
    assert sets == {path.stem.split("_", 1)[1] for path in several}
    assert len(one) == len(several) and {path.suffix for path in several} == {".safetensors"}
    for name in sets:
        kept = [
            sorted(
                (load_file(path)["features"] for path in paths if path.stem.endswith(f"_{name}")),
                key=lambda f: float(f[0, 0]),
            )
            for paths in (one, several)
        ]
        for a, b in zip(*kept):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-2 if model else 1e-5)  # rounded inputs magnify last digits


def test_kept_features_are_used_by_several_processes_and_a_set_may_be_smaller_than_their_number(store):
    known, made = (
        store.rows([run]).set_index(["dataset", "score", "metric"])["value"] for run in ("2_processes-known", "lonely")
    )
    assert "lonely" in set(made.index.get_level_values("dataset"))
    assert known.equals(made.reindex(known.index)) and len(known) == len(made)
