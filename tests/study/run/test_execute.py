"""Control flow of a study: order, skipping, carrying on. The command line itself runs in test_study_runner."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from cases.study import make_run
from rich.console import Console

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.results.schema import RunKey
from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.study.run.execute import execute
from lightning_vlmq.study.run.grid import Run


def a_run(method: str) -> Run:
    kind = "fp32" if method == "fp32" else "ptq"
    return Run("vit_clean", "vision", method, "W8A8", kind, 0, f"{method}-1", ("validate", f"--method={method}"))


class Commands:
    """Stands in for the command line: files made-up results, or does what a method is told to do instead."""

    def __init__(self, store: ResultsStore, instead: dict | None = None) -> None:
        self.store = store
        self.instead = instead or {}
        self.called: list[str] = []

    def __call__(self, arguments: list[str]) -> None:
        method = arguments[1].removeprefix("--method=")
        self.called.append(method)
        if method in self.instead:
            self.instead[method]()
            return
        key = RunKey("vit_clean", "clean", "vision", method, 8, 8, 0)
        self.store.write(f"{method}-1", *make_run(key, f"{method}-1", size=0.01))


@pytest.fixture
def store(tmp_path) -> ResultsStore:
    return ResultsStore(tmp_path)


@pytest.fixture
def console(tmp_path):
    with open(tmp_path / "screen.txt", "w") as file:
        yield Console(file=file, width=200)


def fail(error: BaseException):
    def call() -> None:
        raise error

    return call


RUNS = [a_run(method) for method in ("fp32", "minmax", "mse", "gptq")]


def test_everything_runs_in_order_and_a_second_time_nothing_does(store, console):
    commands = Commands(store)
    outcome = execute(RUNS, store, commands, console)
    assert commands.called == ["fp32", "minmax", "mse", "gptq"]
    assert (outcome.done, outcome.skipped, outcome.failures) == (4, 0, [])
    assert {stage: len(taken) for stage, taken in outcome.seconds.items()} == {
        "full precision": 1,
        "post-training quantization": 3,
    }
    again = execute(RUNS, store, commands, console)
    assert len(commands.called) == 4 and (again.done, again.skipped) == (0, 4)


def test_a_failure_keeps_its_traceback_and_the_rest_runs(store, console):
    commands = Commands(
        store, {"minmax": fail(RuntimeError("out of memory\non the device")), "gptq": fail(SystemExit(2))}
    )
    outcome = execute(RUNS, store, commands, console)
    assert commands.called == ["fp32", "minmax", "mse", "gptq"] and outcome.done == 2
    (first, reason, path), (second, other_reason, _) = outcome.failures
    assert (first.method, second.method) == ("minmax", "gptq")
    assert reason == "RuntimeError: out of memory" and other_reason == "the command ended with exit code 2"
    text = path.read_text()
    assert path == store.root / "failures" / "minmax-1.txt"
    assert text.startswith("vlmq validate --method=minmax\n") and "Traceback" in text and "on the device" in text
    commands.instead.clear()
    again = execute(RUNS, store, commands, console)
    assert commands.called[4:] == [] and (again.done, again.skipped, again.n_failed) == (0, 2, 2)
    console.file.flush()
    said = Path(console.file.name).read_text()
    assert said.count("2 runs failed before and are left out: status says why, retry=true tries them again") == 1
    commands.instead["gptq"] = fail(SystemExit(2))
    again = execute(RUNS, store, commands, console, retry=True)
    assert commands.called[4:] == ["minmax", "gptq"] and (again.done, again.n_failed) == (1, 1)
    assert [path.name for path in (store.root / "failures").iterdir()] == ["gptq-1.txt"]


def test_what_fails_under_another_runner_is_not_tried_again(store, console):
    """A failure that is filed while this runner is busy with other runs."""
    path = store.root / "failures" / "mse-1.txt"

    def other() -> None:
        path.parent.mkdir()
        path.write_text("ValueError: no")

    commands = Commands(store, {"minmax": other})
    outcome = execute(RUNS, store, commands, console, retry=True)
    assert commands.called == ["fp32", "minmax", "gptq"] and (outcome.failed_before, outcome.n_failed) == (1, 2)


def test_runs_packed_without_samples_are_run_again_on_request(store, console):
    commands = Commands(store)
    execute(RUNS, store, commands, console)
    store.compact(keeps_samples=False)
    assert execute(RUNS, store, commands, console).skipped == 4
    outcome = execute(RUNS[:2], store, commands, console, samples=True)
    assert commands.called[4:] == ["fp32", "minmax"] and outcome.done == 2
    assert store.compact() == 2 and store.keeps_samples("minmax-1") and not store.keeps_samples("mse-1")
    assert execute(RUNS[:2], store, commands, console, samples=True).skipped == 2


def test_bad_input_is_said_as_it_is(store, console):
    commands = Commands(store, {"minmax": fail(VLMQError("noise_rate must lie in [0, 1); not [/1]"))})
    assert execute(RUNS, store, commands, console).failures[0][1] == "noise_rate must lie in [0, 1); not [/1]"
    console.file.flush()
    assert "must lie in [0, 1); not [/1]" in Path(console.file.name).read_text()


def test_a_run_that_files_nothing_is_a_failure(store, console):
    outcome = execute(RUNS[:2], store, Commands(store, {"minmax": lambda: None}), console)
    assert "without writing results" in outcome.failures[0][1]


def test_an_interrupt_ends_the_study_and_keeps_what_is_done(store, console):
    commands = Commands(store, {"mse": fail(KeyboardInterrupt())})
    with pytest.raises(KeyboardInterrupt):
        execute(RUNS, store, commands, console)
    assert store.run_ids() == ["fp32-1", "minmax-1"]
    commands.instead.clear()
    assert execute(RUNS, store, commands, console).done == 2


def test_a_truncated_result_is_run_again(store, console):
    commands = Commands(store)
    execute(RUNS, store, commands, console)
    part = store.root / "results" / "mse-1.parquet"
    part.write_bytes(part.read_bytes()[:100])
    outcome = execute(RUNS, store, commands, console)
    assert commands.called[4:] == ["mse"] and outcome.skipped == 3 and store.has("mse-1")


def test_what_a_run_prints_goes_to_its_log_alone(store, console, capfd):
    # pytest replaces sys.stdout, so write to the descriptors, as a stream or handler made before the run does
    early = [open(descriptor, "w", closefd=False, buffering=1) for descriptor in (1, 2)]  # noqa: SIM115
    handler = logging.StreamHandler(early[1])

    def speak() -> None:
        print("from Python", file=early[0])
        handler.emit(logging.LogRecord("x", logging.INFO, "", 0, "from a handler", None, None))
        os.write(1, b"from below Python\n")

    execute(RUNS[:2], store, Commands(store, {"fp32": speak}), console)
    print("afterwards", file=early[0])
    log = (store.root / "output" / "fp32-1.log").read_text()
    captured = capfd.readouterr()
    assert log == "from Python\nfrom a handler\nfrom below Python\n"
    assert captured.out == "afterwards\n" and captured.err == ""
    console.file.flush()
    screen = Path(console.file.name).read_text()
    assert "✗ vit_clean fp32" in screen and "✓ vit_clean minmax" in screen
