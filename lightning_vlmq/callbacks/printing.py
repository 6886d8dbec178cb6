"""What a run says on the terminal."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer
from rich import print as rich_print
from rich.table import Table

from lightning_vlmq.callbacks.results import ResultsWriter
from lightning_vlmq.core.roles import ROLES
from lightning_vlmq.models import RANDOM


class CoveragePrinter(Callback):
    """Prints the coverage report of a quantized model when it has been made."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Nothing is quantized yet."""
        self._printed = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print once, on rank zero."""
        report = getattr(pl_module, "coverage", None)
        if report is not None and trainer.is_global_zero and not self._printed:
            self._printed = True
            table = report.table()
            table.title = f"{table.title}{_randomness(pl_module)}"
            rich_print(table)


class HeadlinePrinter(Callback):
    """Prints the numbers to read first, ``<role>/<metric>`` of what was logged, beside those with the logit scale tuned, and where all are.

    In place of Lightning's own table, which repeats them for every data set (``--verbose true`` shows it).
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print one table, on rank zero."""
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        own = {name: value for name, value in logged.items() if name.split("/")[0] in ROLES}
        if trainer.sanity_checking or not trainer.is_global_zero or not own:
            return
        tuned = {name: logged[f"lst/{name}"] for name in own if f"lst/{name}" in logged}
        title = f"Means over a role's data sets (and OOD scores){_randomness(pl_module)}"
        table = Table("role", "metric", title=title)
        writers = [callback for callback in trainer.callbacks if isinstance(callback, ResultsWriter)]  # type: ignore[attr-defined]
        table.caption = "; ".join(f"everything: {writer.root}, run {writer.run_id}" for writer in writers)
        for title in ("value", "logit scale tuned") if tuned else ("value",):
            table.add_column(title, justify="right")
        for name in sorted(own, key=lambda name: list(ROLES).index(name.split("/")[0])):
            cells = [f"{column[name]:.4f}" for column in (own, tuned) if name in column]
            table.add_row(*name.split("/", 1), *cells)
        rich_print(table)

    on_test_end = on_validation_end


def _randomness(module: Any) -> str:
    """What every table adds where the model's weights are drawn, not trained."""
    return " (random weights)" if getattr(getattr(module, "vlm", None), "pretrained", "") == RANDOM else ""
