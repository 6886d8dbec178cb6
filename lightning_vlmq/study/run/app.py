"""``vlmq-study``: a Hydra app that spells out a grid of ``vlmq`` commands, runs what is missing, and reports.

Hydra composes argument lists and launches jobs; it never builds a model. Usage::

    vlmq-study study=demo
    vlmq-study study=demo study.axes.vlm=[vit_clean] seed=1
    vlmq-study -m study=demo study.shard=1/2,2/2 hydra/launcher=joblib    # jobs share one store
    vlmq-study study=demo --dry-run                                       # what it holds and costs
    vlmq-study status study=demo                                          # where it stands, from any terminal
    vlmq-study study=demo retry=true                                      # what failed is tried again
    vlmq-study study=demo report_only=true
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lightning_vlmq.core.configs import config_folder
from lightning_vlmq.core.errors import VLMQError, first_line, in_one_line
from lightning_vlmq.core.names import one_line
from lightning_vlmq.core.stopping import stoppable

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lightning_vlmq.study.run.execute import Outcome

ROOT_CONFIG = "sweep"
WORDS = {"status": "status=true", "--status": "status=true", "--dry-run": "dry_run=true", "--dry_run": "dry_run=true"}
"""What may be said in place of an entry of the config."""
READS = ("status=true", "dry_run=true")
"""What only looks: Hydra then makes no folder for itself below the study's, which may be somebody else's, or not there."""


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


def arranged(words: list[str]) -> list[str]:
    """A command line with its options first, wherever they stood: Hydra's parser takes none after an override that others follow.

    Raises:
        VLMQError: there is no such option, or it lacks its value.
    """
    from hydra._internal.utils import get_args_parser

    def refuse(message: str) -> NoReturn:
        raise VLMQError(f"{message}; vlmq-study --help says what there is")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    overrides = list(parser.parse_intermixed_args(words).overrides)
    left, options = Counter(overrides), list[str]()
    for word in words:
        if left[word]:
            left[word] -= 1
        else:
            options.append(word)
    return [*options, *overrides]


def entry_point() -> None:
    """The console script. Exit code 0: everything ran; 1: some runs failed, now or before; 2: bad input; 128 + n: signal n."""
    sys.argv[1:] = [WORDS.get(word, word) for word in sys.argv[1:]]
    if not set(READS).isdisjoint(sys.argv) and not any(word.startswith("hydra.run.dir=") for word in sys.argv):
        sys.argv += ["hydra.run.dir=.", "hydra.output_subdir=null"]
    with stoppable("vlmq-study", "what is stored stays, the same command goes on where it stopped"):
        _run()


def _run() -> None:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from lightning_vlmq.study.run.execute import RunsFailedError
    from lightning_vlmq.study.run.study import run_study

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then hands errors on, and they are said in one line below
    outcomes: list[Outcome | VLMQError | OSError] = []
    is_composed = not {"-m", "--multirun"}.isdisjoint(sys.argv)  # jobs elsewhere hand on errors of theirs
    try:
        sys.argv[1:] = arranged(sys.argv[1:])
        config_folder = find_configs(sys.argv[1:])

        def job(config: DictConfig) -> None:
            nonlocal is_composed
            is_composed = True
            alone = HydraConfig.get().mode != RunMode.MULTIRUN
            try:
                outcome = run_study(config, config_folder, writes_report=alone)
            except (VLMQError, OSError) as error:
                if not alone or in_one_line(error) is None:
                    raise
                outcomes.append(error)  # raised here, Hydra would print lines of its own around it
                return
            outcomes.append(outcome)
            if outcome.n_failed and not alone:
                raise RunsFailedError(f"{outcome.n_failed} runs failed")

        hydra.main(version_base="1.3", config_path=str(config_folder), config_name=ROOT_CONFIG)(job)()
    except (VLMQError, HydraException, OmegaConfBaseException) as error:
        _exit_with(error)
    except OSError as error:
        if in_one_line(error) is None:
            raise
        _exit_with(error)
    except RunsFailedError as error:
        print(f"vlmq-study: {error}", file=sys.stderr)
        sys.exit(1)
    except (YAMLError, ValueError, TypeError) as error:
        if is_composed and not isinstance(error, YAMLError):
            raise
        _exit_with(VLMQError(f"the study's config cannot be composed: {' '.join(str(error).split())}"))
    for outcome in outcomes:
        if isinstance(outcome, VLMQError | OSError):
            _exit_with(outcome)
        elif outcome.n_failed:
            sys.exit(1)


def _exit_with(error: Exception) -> None:
    """Say an error of the user's in one line and leave with code 2. Hydra's go on with search paths nobody asked for."""
    text = in_one_line(error)
    if text is None:
        text = str(error).split("Config search path")[0]
        text += f" ({first_line(error.__cause__)})" if error.__cause__ is not None else ""
        if function := re.search(r"Unknown function '(\w+)'", text):
            text = f'Hydra takes {function[1]}(...) for a function; write it in double quotes: study.axes.method=["{function[1]}(...)"]'
    print(f"vlmq-study: error: {one_line(text)}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    entry_point()
