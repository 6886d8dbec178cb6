"""Ctrl-C and SIGTERM end a study, although Lightning turns both into exits of the run alone."""

import signal
import sys

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console

from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.study.run.execute import execute
from lightning_vlmq.study.run.grid import Run

RUNS = [Run("vit_clean", "none", "fp32", "W32A32", "fp32", 0, f"run-{i}", ("validate",)) for i in range(2)]


def exit_as_lightning_does(arguments):
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.exit(1)


def terminate(arguments):
    raise SIGTERMException


@pytest.mark.parametrize("main", [exit_as_lightning_does, terminate])
def test_a_stopped_run_stops_the_study(main, tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    try:
        with open(tmp_path / "screen", "w") as file, pytest.raises(KeyboardInterrupt):
            execute(RUNS, ResultsStore(tmp_path), main, Console(file=file))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, handler)
    assert not (tmp_path / "failures").exists()
