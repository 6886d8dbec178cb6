"""Signals end a program with one line and their exit code, at any moment, also where the work swallows exceptions."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import sys, time
from lightning_vlmq.core import stopping
stopping.GRACE_SECONDS = 0.5
with stopping.stoppable("vlmq", "start again"):
    print("ready", flush=True)
    {body}
print("not reached", flush=True)
"""
BODIES = {
    "waits": "time.sleep(60)",
    "swallows": "exec('try:\\n time.sleep(60)\\nexcept BaseException:\\n pass')",
    "wraps": "exec('try:\\n time.sleep(60)\\nexcept BaseException as e:\\n raise ImportError(1) from None')",
    "never ends": "exec('while True:\\n try:\\n  time.sleep(60)\\n except BaseException:\\n  pass')",
}


def as_in_front() -> None:
    """Listen as a program in a terminal does: tests started with a shell's ``&`` or ``nohup`` hand down that signals are ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def start(body: str) -> subprocess.Popen:
    script = SCRIPT.format(body=body)
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=as_in_front,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("body", BODIES)
def test_says_what_happened_and_ends_with_its_code(body, signum):
    process = start(BODIES[body])
    process.send_signal(signum)
    out, error = process.communicate(timeout=30)
    assert process.returncode == 128 + signum and "not reached" not in out
    assert error.strip() == f"vlmq: stopped by {signum.name}; start again"


def test_an_ignored_hangup_stays_ignored():
    script = "import signal, os; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + SCRIPT.format(
        body="os.kill(os.getpid(), signal.SIGHUP)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and done.stdout == "ready\nnot reached\n"


def test_ordinary_errors_and_exits_pass():
    process = start("sys.exit(3)")
    assert process.wait(30) == 3
    process = start("1 / 0")
    assert process.wait(30) == 1 and "ZeroDivisionError" in process.stderr.read()


def listens(pid: int) -> bool:
    """Whether a process catches SIGTERM."""
    with open(f"/proc/{pid}/status") as status:
        caught = next(line for line in status if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize(("module", "seconds"), [("lightning_vlmq", 0.3), ("lightning_vlmq.study.run.app", 2)])
def test_the_programs_stop_while_they_still_import(module, seconds, tmp_path):
    arguments = (
        ["validate", "--config=eval"] if module == "lightning_vlmq" else ["study=demo", f"study.root={tmp_path}"]
    )
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    while not listens(process.pid):
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    assert error.strip().splitlines()[-1].startswith(("vlmq: stopped by SIGTERM", "vlmq-study: stopped by SIGTERM"))
