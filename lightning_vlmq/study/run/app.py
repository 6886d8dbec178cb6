"""``vlmq-study``: a Hydra app that spells out a grid of ``vlmq`` commands, runs what is missing, and reports.

Hydra composes argument lists and launches jobs; it never builds a model. Usage::

    vlmq-study study=demo
    vlmq-study study=demo study.axes.vlm=[vit_clean] seed=1
    vlmq-study -m study=demo study.axes.vlm=[vit_clean],[vit_noisy]    # jobs share one store
    vlmq-study study=demo report_only=true
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape

from lightning_vlmq import cli
from lightning_vlmq.core.configs import config_folder
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.study.analysis.comparison import analyse
from lightning_vlmq.study.analysis.runs import StudyResults
from lightning_vlmq.study.report.page import write_report
from lightning_vlmq.study.report.terminal import summary_table, timing_table
from lightning_vlmq.study.run.execute import Outcome, execute, screen
from lightning_vlmq.study.run.grid import Study, compose

ROOT_CONFIG = "sweep"


class RunsFailedError(RuntimeError):
    """Some runs of a study failed; the others finished."""


def run_study(config: DictConfig, config_folder: Path, writes_report: bool = True) -> Outcome:
    """Run a composed study config.

    Args:
        config: ``study`` (see :class:`~lightning_vlmq.study.run.grid.Study`), ``seed`` and ``report_only``.
        config_folder: the folder that the config came from.
        writes_report: build the report at the end; jobs of a multirun leave that to ``report_only=true``.

    Raises:
        VLMQError: the config names something unknown (before anything runs), or the store cannot be read.
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
    console.print(summary_table(analysis))
    console.print(timing_table(outcome.seconds))
    console.print(f"report       {escape(str(page))}", soft_wrap=True, highlight=False)
    console.print(
        f"TensorBoard  tensorboard --logdir {escape(study.root)}/tensorboard", soft_wrap=True, highlight=False
    )


def find_configs(arguments: list[str]) -> Path:
    """The folder with the root config: that of ``--config-dir``, else ``configs`` here, else the package's.

    A ``--config-dir`` that holds studies alone (``study/*.yaml``) adds them to the package's: Hydra searches it too.

    Raises:
        VLMQError: the folder of ``--config-dir`` holds neither.
    """
    for position, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name in ("--config-dir", "-cd", "--config-path", "-cp"):
            folder = Path(value or (arguments[position + 1] if position + 1 < len(arguments) else "")).resolve()
            if (folder / f"{ROOT_CONFIG}.yaml").is_file():
                return folder
            if name in ("--config-dir", "-cd") and list((folder / "study").glob("*.yaml")):
                return config_folder()
            raise VLMQError(
                f"{name} '{folder}' holds neither {ROOT_CONFIG}.yaml nor study/*.yaml; give the folder of your study configs"
            )
    here = Path.cwd() / "configs"
    return here if (here / f"{ROOT_CONFIG}.yaml").is_file() else config_folder()


def entry_point() -> None:
    """The console script. Exit code 0: everything ran; 1: some runs failed; 2: bad input, said in one line."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then hands errors on, and they are said in one line below
    outcomes: list[Outcome | VLMQError] = []
    try:
        config_folder = find_configs(sys.argv[1:])

        def job(config: DictConfig) -> None:
            alone = HydraConfig.get().mode != RunMode.MULTIRUN
            try:
                outcome = run_study(config, config_folder, writes_report=alone)
            except VLMQError as error:
                if not alone:
                    raise
                outcomes.append(error)  # raised here, Hydra would print lines of its own around it
                return
            outcomes.append(outcome)
            if outcome.failures and not alone:
                raise RunsFailedError(f"{len(outcome.failures)} runs failed")

        hydra.main(version_base="1.3", config_path=str(config_folder), config_name=ROOT_CONFIG)(job)()
    except (VLMQError, HydraException, OmegaConfBaseException) as error:
        _exit_with(error)
    except RunsFailedError as error:
        print(f"vlmq-study: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nvlmq-study: interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)
    for outcome in outcomes:
        if isinstance(outcome, VLMQError):
            _exit_with(outcome)
        elif outcome.failures:
            sys.exit(1)


def _exit_with(error: Exception) -> None:
    """Say an error of the user's in one line and leave with code 2. Hydra's go on with search paths nobody asked for."""
    text = str(error).split("Config search path")[0]
    if error.__cause__ is not None and not isinstance(error, VLMQError):
        text += f" ({str(error.__cause__).splitlines()[0]})"
    lines = (line.strip() for line in text.splitlines())
    print(f"vlmq-study: error: {' '.join(line for line in lines if line)}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    entry_point()
