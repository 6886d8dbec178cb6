"""Progress of a multirun, printed by the process that launched it: the jobs may run where nobody sees what they print."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.study.run.config import Study
from lightning_vlmq.study.run.grid import Run
from lightning_vlmq.study.run.status import status_of

AXES = ("study.axes", "study.data", "study.seeds", "study.arguments", "seed", "study=")
"""Overrides that, swept over, make several grids: how many runs there are together is then not known here."""


class MultirunProgress(Callback):
    """A line whenever more runs are done or failed, until the jobs have ended. Hydra's own launcher needs none: its jobs print here.

    Args:
        seconds: between two looks at the store.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        self.seconds = seconds
        self._ended = threading.Event()
        self._watch: threading.Thread | None = None

    def __getstate__(self) -> dict[str, float]:
        """What goes to a job: launchers pickle the callbacks too, and neither an event nor a thread can travel."""
        return {"seconds": self.seconds}

    def __setstate__(self, state: dict[str, float]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Begin to look at the store, where jobs run elsewhere."""
        launcher = str(OmegaConf.select(config, "hydra.launcher._target_") or "")
        root = OmegaConf.select(config, "study.root", throw_on_missing=False)
        if launcher.endswith("BasicLauncher") or root is None:
            return
        self._ended.clear()
        self._watch = threading.Thread(target=self._look, args=(Path(str(root)), _grid(config)), daemon=True)
        self._watch.start()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Look once more, and stop."""
        if self._watch is not None:
            self._ended.set()
            self._watch.join()
            self._watch = None

    def _look(self, root: Path, runs: list[Run] | None) -> None:
        said = None
        while True:
            is_over = self._ended.wait(self.seconds)
            found = status_of(root, runs)
            if (now := (found.done, len(found.failed))) != said:
                print(f"{root}: {found}", flush=True)
                said = now
            if is_over:
                return


def _grid(config: DictConfig) -> list[Run] | None:
    """The grid that all jobs share, ``None`` where they have several."""
    from lightning_vlmq.study.run.app import find_configs
    from lightning_vlmq.study.run.study import grid_of

    overrides = [str(word).lstrip("+") for word in OmegaConf.select(config, "hydra.overrides.task") or ()]
    if any(word.startswith(AXES) and _is_sweep(word) for word in overrides):
        return None
    try:
        plain: Any = OmegaConf.to_container(config.study, resolve=True, throw_on_missing=True)
        return grid_of(Study.from_config(plain), config.seed, find_configs(sys.argv[1:]))
    except VLMQError:  # the jobs say it
        return None


def _is_sweep(word: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return bool(OverridesParser.create().parse_override(word).is_sweep_override())
