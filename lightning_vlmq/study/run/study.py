"""A composed study config run and reported."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape

from lightning_vlmq import cli
from lightning_vlmq.core.atomic import remove_leftovers, require_writable
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.study.analysis.comparison import analyse
from lightning_vlmq.study.analysis.runs import StudyResults
from lightning_vlmq.study.report.page import write_report
from lightning_vlmq.study.report.terminal import summary_table, timing_table
from lightning_vlmq.study.run.execute import Outcome, execute, screen
from lightning_vlmq.study.run.grid import Study, compose


def run_study(config: DictConfig, config_folder: Path, writes_report: bool = True) -> Outcome:
    """Run a composed study config.

    Args:
        config: ``study`` (see :class:`~lightning_vlmq.study.run.grid.Study`), ``seed`` and ``report_only``.
        config_folder: the folder that the config came from.
        writes_report: build the report at the end; jobs of a multirun leave that to ``report_only=true``.

    Raises:
        VLMQError: the config names something unknown (before anything runs), or the store cannot be read.
        OSError: the store's folder cannot be written (before anything runs).
    """
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    study = Study.from_config(plain["study"])
    console = screen()
    if plain["report_only"]:
        outcome = Outcome()
    else:
        seed = plain["seed"]
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise VLMQError(f"seed must be a whole number from 0, got {seed!r}; use -m seed=0,1 for several")
        runs = compose(study, seed, config_folder)
        require_writable(Path(study.root))
        remove_leftovers(Path(study.root), below=True)
        console.print(
            f"[bold]{escape(study.name)}[/]: {len(runs)} runs, results in {escape(study.root)}", highlight=False
        )
        outcome = execute(runs, ResultsStore(study.root), cli.main, console)
    if writes_report:
        report(study, outcome, console)
    else:
        hint = f"vlmq-study study.root={escape(study.root)} report_only=true"
        console.print(f"report, once all jobs are done: {hint}", soft_wrap=True, highlight=False)
    for run, reason, traceback in outcome.failures:
        console.print(
            f"[red]failed[/] {escape(run.label)}: {escape(reason)}\n       {escape(str(traceback))}", soft_wrap=True
        )
    return outcome


def report(study: Study, outcome: Outcome, console: Console) -> None:
    """Write a study's report and show its main numbers, unless there is not a single result."""
    if outcome.failures and not ResultsStore(study.root).run_ids():
        return
    start = time.perf_counter()
    analysis = analyse(StudyResults.load(Path(study.root)))
    page = write_report(analysis)
    outcome.seconds["report"].append(time.perf_counter() - start)
    for problem in analysis.results.problems:
        console.print(f"[yellow]left out[/] {escape(problem)}", soft_wrap=True, highlight=False)
    if analysis.comparisons:
        console.print(summary_table(analysis))
    console.print(timing_table(outcome.seconds))
    console.print(f"report       {escape(str(page))}", soft_wrap=True, highlight=False)
    console.print(
        f"TensorBoard  tensorboard --logdir {escape(study.root)}/tensorboard", soft_wrap=True, highlight=False
    )
