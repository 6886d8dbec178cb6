"""Runs of a grid one after another in this process: skip what is stored, carry on past failures, say how long it takes."""

from __future__ import annotations

import gc
import os
import shlex
import signal
import sys
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_vlmq.core.atomic import write_text
from lightning_vlmq.core.errors import VLMQError, in_one_line
from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.study.run.claims import Claims
from lightning_vlmq.study.run.grid import Run

POLL_SECONDS = 1.0
"""How often runs that another runner computes are looked for."""
STAGES = {"fp32": "full precision", "ptq": "post-training quantization", "qat": "quantization-aware training"}


class RunsFailedError(RuntimeError):
    """Some runs of a study failed; the others finished."""


@dataclass
class Outcome:
    """What became of a grid.

    Attributes:
        skipped: runs that the store already had, or that another runner filed meanwhile.
        done: runs that finished now.
        failures: runs that did not, with the reason in one line and the file that holds the traceback.
        failed_before: runs that were not tried, because they failed before, or under another runner meanwhile.
        seconds: duration of each finished run, by stage.
    """

    skipped: int = 0
    done: int = 0
    failures: list[tuple[Run, str, Path]] = field(default_factory=list)
    failed_before: int = 0
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def n_failed(self) -> int:
        """Runs that have no result, because they failed now or before."""
        return len(self.failures) + self.failed_before


def execute(
    runs: Sequence[Run],
    store: ResultsStore,
    main: Callable[[list[str]], None],
    console: Console,
    retry: bool = False,
    samples: bool = False,
) -> Outcome:
    """Run what the store lacks, in order; what another runner computes comes last, and is waited for.

    Whatever a run prints goes to ``<store>/output/<run_id>.log``; the traceback of one that fails goes to
    ``<store>/failures/<run_id>.txt`` and the next run starts. As long as that file is there the run is not tried again.

    Args:
        runs: the grid.
        store: where finished runs are looked for; each run writes its own results there.
        main: runs one argument list, as :func:`lightning_vlmq.cli.main`.
        console: where progress is shown, see :func:`screen`.
        retry: whether runs that failed before are tried again.
        samples: whether runs that were packed without their samples are run again for them.

    Raises:
        KeyboardInterrupt: somebody stopped a run (Ctrl-C, SIGTERM); what is stored stays, the run starts afresh next time.
        VLMQError: the store's folder cannot be written.
    """

    def is_done(run: Run) -> bool:
        return store.has(run.run_id) and (store.keeps_samples(run.run_id) or not samples)

    pending = [run for run in runs if not is_done(run)]
    outcome = Outcome(skipped=len(runs) - len(pending))
    if outcome.skipped:
        console.print(f"{outcome.skipped} of {len(runs)} runs are stored already")
    failed = [run for run in pending if _failure(store, run).exists()]
    if retry:
        for run in failed:
            _failure(store, run).unlink(missing_ok=True)
    elif failed:
        pending = [run for run in pending if not _failure(store, run).exists()]
        outcome.failed_before = len(failed)
        console.print(
            f"{len(failed)} runs failed before and are left out: status says why, retry=true tries them again"
        )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    # Without redirection of its own: it would catch what belongs into the run's log.
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as progress:
        task = progress.add_task("starting", total=len(runs), completed=len(runs) - len(pending), left="")
        queue, claims, busy = deque(pending), Claims(store.root), dict[str, str]()
        while queue:
            run = queue.popleft()
            with claims.claim(run.run_id) as holder:
                if holder is not None:
                    if run.run_id not in busy:
                        progress.console.print(
                            f"[dim]elsewhere[/]  {escape(f'{run.label}: {holder}')}", highlight=False
                        )
                    busy[run.run_id] = str(holder)
                    queue.append(run)
                    if all(left.run_id in busy for left in queue):
                        progress.update(task, description=f"waiting for {escape(str(holder))}", left="")
                        time.sleep(POLL_SECONDS)
                    continue
                progress.update(task, description=escape(run.label), left=_time_left([run, *queue], outcome.seconds))
                by = f"{escape(run.label)} [dim]by {escape(busy.get(run.run_id, 'another runner'))}[/]"
                if is_done(run):
                    outcome.skipped += 1
                    line = f"[green]✓[/] {by}"
                elif _failure(store, run).exists():
                    outcome.failed_before += 1
                    line = f"[red]✗[/] {by}"
                else:
                    line = _execute_one(run, store, main, outcome)
            progress.advance(task)
            number = len(runs) - len(queue)
            progress.console.print(f"[dim]{number:>4}/{len(runs)}[/]  {line}", highlight=False)
    return outcome


def _execute_one(run: Run, store: ResultsStore, main: Callable[[list[str]], None], outcome: Outcome) -> str:
    failure, start = _failure(store, run), time.perf_counter()
    try:
        with _output_to(store.root / "output" / f"{run.run_id}.log"):
            main(list(run.arguments))
        if not store.has(run.run_id):
            raise VLMQError("the command ended without writing results; does its config have a results writer?")
    except (Exception, SystemExit) as error:  # SystemExit: a parser that gives up must not end the study
        if _was_stopped(error):
            signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores Ctrl-C from the first one on
            raise KeyboardInterrupt from error
        reason = _reason(error)
        try:
            write_text(failure, f"vlmq {shlex.join(run.arguments)}\n\n{traceback.format_exc()}")
        except OSError as full:
            reason += f" (and its traceback cannot be kept: {full.strerror})"
        outcome.failures.append((run, reason, failure))
        return f"[red]✗[/] {escape(f'{run.label}: {reason}')}"
    finally:
        gc.collect()  # a LightningModule and its Trainer refer to each other; free their memory before the next run
    taken = time.perf_counter() - start
    failure.unlink(missing_ok=True)
    outcome.done += 1
    outcome.seconds[STAGES[run.kind]].append(taken)
    return f"[green]✓[/] {escape(run.label)} [dim]{taken:.1f} s[/]"


def _failure(store: ResultsStore, run: Run) -> Path:
    """Where the traceback of the run's last try is kept, if it failed."""
    return store.root / "failures" / f"{run.run_id}.txt"


def _was_stopped(error: BaseException) -> bool:
    """Whether a run ended because somebody stopped it: Lightning turns Ctrl-C and SIGTERM into two kinds of ``SystemExit``."""
    return isinstance(error, SIGTERMException) or isinstance(error.__context__, KeyboardInterrupt)


def _reason(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"the command ended with exit code {error.code}"
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    if (said := in_one_line(error)) is not None:
        return said
    return f"{type(error).__name__}: {first}".rstrip(": ")


def _time_left(pending: Sequence[Run], seconds: dict[str, list[float]]) -> str:
    """Remaining time from the mean duration of each kind of run; of all kinds where one has not been seen yet."""
    seen = [taken for stage in seconds.values() for taken in stage]
    if not seen:
        return ""
    overall = sum(seen) / len(seen)
    total = 0.0
    for run in pending:
        own = seconds.get(STAGES[run.kind])
        total += sum(own) / len(own) if own else overall
    return f"{timedelta(seconds=round(total))} left"


def screen() -> Console:
    """A console on the standard output of now, which stays one while :func:`execute` sends output elsewhere."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    return Console(file=output, width=None if output.isatty() else 160)  # a file has no width; 80 would cut the tables


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Send everything this process prints to a file, also from below Python.

    Replacing ``sys.stdout`` would miss log handlers that hold the old one, and would leave handlers created inside
    holding a closed file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _flush()
    kept = os.dup(1), os.dup(2)
    try:
        with open(path, "ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        yield
    finally:
        _flush()
        for descriptor, original in zip((1, 2), kept):
            os.dup2(original, descriptor)
            os.close(original)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the run's log, on a full disk
            stream.flush()
