"""kill -9 at every stage of a real study: what counts is right at any moment, and the end is that of an undisturbed one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from cases import killed_study

MOMENTS = [
    *(
        "claims/fp32:1",
        "writable:2",
        "cache/:1",
        "cache/:6",
        "samples/fp32:2",
        "curves/fp32:1",
        "results/fp32:1",
        "results/fp32:2",
    ),
    *("results/fp32:3", "cache/:3", "samples/minmax.lst:2", "results/minmax.lst:3", "curves/minmax.parquet:1"),
    *("results/minmax.parquet:2", "model.safetensors:1", "model.safetensors:3", "quant.json:2", "results/lsq:2"),
    *("comparisons.csv:2", "report.html:1", "report.html:2"),
]


def run(root: Path, *moments: str) -> list[dict]:
    command = [sys.executable, killed_study.__file__, str(root), *moments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, cwd=root.parent)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_killed_at_every_stage(tmp_path):
    whole = run(tmp_path / "whole")[-1]
    assert whole["code"] == 0 and sorted(whole["runs"]) == ["fp32", "lsq_contrastive", "minmax", "minmax.lst"]
    lines = run(tmp_path / "killed", *MOMENTS)
    kills, states = [line for line in lines if "killed" in line], [line for line in lines if "code" in line]
    assert [state["code"] for state in states] == [-9] * len(MOMENTS) + [0]
    for moment, kill in zip(MOMENTS, kills, strict=True):
        assert moment.rpartition(":")[0] in kill["at"]
    for state in states:  # whatever counts at any moment is what an undisturbed study has
        assert state["runs"].items() <= whole["runs"].items()
    assert states[-1] == whole
    left = [path.name for path in (tmp_path / "killed").rglob("*") if path.is_file() and path.name.startswith(".")]
    assert left == [] and not list((tmp_path / "killed" / "claims").iterdir())
    assert (tmp_path / "killed" / "report.html").exists()
