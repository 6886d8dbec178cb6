"""A composed study config run and reported."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape

from lightning_vlmq import cli, experiment
from lightning_vlmq.core.atomic import remove_leftovers, require_writable
from lightning_vlmq.core.configs import with_config_files
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.study.analysis.comparison import analyse
from lightning_vlmq.study.analysis.runs import StudyResults
from lightning_vlmq.study.report.page import write_report
from lightning_vlmq.study.report.terminal import summary_table, timing_table
from lightning_vlmq.study.run.config import Request, Study
from lightning_vlmq.study.run.costs import measure
from lightning_vlmq.study.run.execute import Outcome, execute, screen
from lightning_vlmq.study.run.grid import Run, compose, say_unpinned
from lightning_vlmq.study.run.inputs import data_digest
from lightning_vlmq.study.run.plan import plan, plan_table
from lightning_vlmq.study.run.shards import shard_of
from lightning_vlmq.study.run.status import status_of


def run_study(config: DictConfig, config_folder: Path, writes_report: bool = True) -> Outcome:
    """Run a composed study config.

    Args:
        config: ``study`` (see :class:`~lightning_vlmq.study.run.config.Study`), ``seed``, ``report_only``,
            ``status`` (say where it stands, and stop), ``dry_run`` (say what it holds and costs, and stop), ``compact`` (pack what is
            stored, and stop), ``retry`` (try again what failed) and ``samples`` (run again what was packed without its samples).
        config_folder: the folder that the config came from.
        writes_report: build the report at the end; jobs of a multirun leave that to ``report_only=true``.

    Raises:
        VLMQError: the config names something unknown (before anything runs), or the store cannot be read.
        OSError: the store's folder cannot be written (before anything runs).
    """
    try:
        plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise VLMQError(f"the study's config lacks something: {' '.join(str(error).split())}") from error
    asked = Request.from_config(plain)
    study = Study.from_config(plain["study"])
    console = screen()
    outcome = Outcome()
    if asked.compact:
        store = ResultsStore(study.root)
        if not store.run_ids():
            raise VLMQError(f"no results in '{study.root}': there is nothing to pack")
        packed = store.compact(keeps_samples=asked.compact is True)
        console.print(f"{packed:,} runs packed in {escape(study.root)}", highlight=False)
        return outcome
    if not asked.report_only:
        runs = grid_of(study, plain["seed"], config_folder)
        own = shard_of(runs, study.shard)
        if asked.status:
            say_status(study, own, console)
            return outcome
        require_parsed(own)
        found, sets = plan(own, writes=not asked.dry_run)
        part = f" (shard {escape(study.shard)} of {len(runs):,})" if study.shard else ""
        console.print(
            f"[bold]{escape(study.name)}[/]: {len(own):,} runs{part}, {found.evaluations:,} evaluation runs, "
            f"results in {escape(study.root)}",
            highlight=False,
        )
        if asked.dry_run:
            console.print(plan_table(found, measure(own, sets, found.has_patches), study.cache))
            return outcome
        require_writable(Path(study.root))
        remove_leftovers(Path(study.root), below=True)
        outcome = execute(own, ResultsStore(study.root), cli.main, console, asked.retry, asked.samples)
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


def grid_of(study: Study, seed: Any, config_folder: Path) -> list[Run]:
    """A study's whole grid. Data in files count by what they are: other data below another root, or other class names, make other runs.

    Raises:
        VLMQError: the config names something unknown, or data are missing.
    """
    seeds = study.seeds_or(seed)
    say_unpinned(study.axes["vlm"])
    runs = compose(study, seeds, config_folder)
    found = data_digest(runs[0].arguments)  # a study's own arguments may name data too
    return compose(study, seeds, config_folder, found) if found else runs


def require_parsed(runs: list[Run]) -> None:
    """Refuse what every run would fail by: an argument that ``vlmq`` does not take. Runs of the same options are looked at once.

    Raises:
        VLMQError: there is such an argument.
    """
    seen: dict[tuple[str, ...], Run] = {}
    for run in runs:
        seen.setdefault(tuple(word.partition("=")[0] for word in run.arguments), run)
    for run in seen.values():
        try:
            experiment.check(run.arguments[0], with_config_files(list(run.arguments[1:])))
        except VLMQError as error:
            raise VLMQError(f"no run such as '{run.label}' can start: {error}") from error


def say_status(study: Study, runs: list[Run], console: Console) -> None:
    """Print where a study stands: one line, then one for each run that is being computed and for each that failed."""
    found = status_of(Path(study.root), runs)
    console.print(f"[bold]{escape(study.name)}[/]: {escape(str(found))}", highlight=False, soft_wrap=True)
    for title, runs_of in (("running", found.running), ("failed ", found.failed)):
        for run_id, about in runs_of.items():
            console.print(f"{title}  {escape(run_id)}: {escape(about)}", highlight=False, soft_wrap=True)


def report(study: Study, outcome: Outcome, console: Console) -> None:
    """Write a study's report and show its main numbers, unless there is not a single result."""
    if outcome.n_failed and not ResultsStore(study.root).run_ids():
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
