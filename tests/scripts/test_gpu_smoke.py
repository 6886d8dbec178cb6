"""The GPU's script, without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_smoke.py"


@pytest.mark.parametrize("only", ["score", "method minmax", "lsq_contrastive", "converted, own, keep", "two devices"])
def test_checks_pass_on_the_cpu(only):
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--only", only]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.startswith("ok") and "0 failed on cpu" in done.stdout


def test_without_a_gpu_it_says_so():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "no CUDA device" in done.stdout
