"""What several tests need: the command line in a process of its own, and arguments that make it quick."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases.small_data import SMALL_DATA

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_console(monkeypatch):
    """What ``rich.print`` prints to is made anew by every test that prints, as wide as the test's own ``COLUMNS``."""
    monkeypatch.setattr("rich._console", None)


@pytest.fixture
def small_zoo(monkeypatch):
    """Names of the zoo mean the small models of its families, for whatever builds a model again from what a file says of it."""
    from cases.towers import small

    from lightning_vlmq.models import zoo

    monkeypatch.setattr(zoo, "build", small)


@pytest.fixture
def vlmq():
    """Run ``python -m lightning_vlmq`` (or another module) from the repository, and return the finished process."""

    def run(*args, module="lightning_vlmq", **environment):
        return subprocess.run(
            [sys.executable, "-m", module, *map(str, args)],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture
def small_data_args():
    """The command-line arguments that make the embedded data small."""
    return [f"--data.{key}={value}" for key, value in SMALL_DATA.items()]
