"""What a run says on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich import box, get_console
from rich import print as rich_print
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from lightning_vlmq.callbacks.results import ResultsWriter
from lightning_vlmq.data.sets import EvalSet
from lightning_vlmq.evaluation.headline import DEBIASED, HeadlineLine, headline, side_by_side
from lightning_vlmq.evaluation.records import Columns, EvaluationSet
from lightning_vlmq.models import RANDOM
from lightning_vlmq.quant import CoverageReport

NAME_WIDTH = 18
"""Characters of a column after which a run's name is folded: the path of another store would else push all other columns out."""
NARROW = 80
"""On a terminal of fewer columns the headline is set close, its names folded at half the width; down to 60 columns nothing is cut."""


class CoveragePrinter(Callback):
    """Says in a few lines how much of a quantized model is really quantized, when it has been made; the whole table on request.

    What clips is said again after a fit, where training changed it.

    Args:
        every_layer_type: the table by tower and layer type in place of the lines.
    """

    def __init__(self, every_layer_type: bool = False) -> None:
        self.every_layer_type = every_layer_type

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Nothing is quantized yet."""
        self._printed: CoverageReport | None = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print once, on rank zero."""
        report = getattr(pl_module, "coverage", None)
        if report is None or not trainer.is_global_zero or self._printed is not None:
            return
        self._printed = report
        if self.every_layer_type:
            table = report.table()
            table.title = f"{table.title}{_randomness(pl_module)}"
            rich_print(table)
            return
        for line in report.lines():
            rich_print(f"{line}{_randomness(pl_module)}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what clips after training, on rank zero, where it is not what was printed."""
        report = getattr(pl_module, "coverage", None)
        if report is not None and self._printed is not None and report.clipped != self._printed.clipped:
            rich_print(f"After training: {report.clips(1)}{_randomness(pl_module)}")


class HeadlinePrinter(Callback):
    """Prints one table when a validation or test has ended: each reliability dimension, and how much quantizing changed it.

    Columns are full precision, the quantized model, and the quantized one with its logit scale tuned.

    The change is in points, ± half its 95 % interval over test images (paired bootstrap), with a star where it is significant at a
    false discovery rate of 5 % over the table. In place of Lightning's own table, which lists every data set (``--verbose true``).
    """

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Print, on rank zero."""
        records = getattr(pl_module, "records", None)
        if trainer.sanity_checking or not trainer.is_global_zero or not records:
            return
        reference, tuned = pl_module.reference_records, pl_module.tuned_records
        runs = {"full precision": reference, "quantized": records} if reference else {"full precision": records}
        runs |= {"tuned": tuned} if tuned else {}
        sets = {s.name: s for s in pl_module.eval_sets}
        lines = headline(side_by_side([_samples(sets, own) for own in runs.values()]), pl_module.statistics)
        table = headline_table(lines, list(runs), has_change=reference is not None)
        table.title = f"{table.title}{_randomness(pl_module)}"
        rich_print(table)
        for writer in (callback for callback in trainer.callbacks if isinstance(callback, ResultsWriter)):  # type: ignore[attr-defined]
            rich_print(
                f"not filed: a partial run ({writer.partial})"
                if writer.partial
                else f"everything that was measured: {escape(str(writer.root))}, run {writer.run_id}"
            )

    on_test_end = on_validation_end


class PassingBar(RichProgressBar):
    """Lightning's bar, gone when its stage has ended: what stays of a stage of one batch is a line that says ``0.00it/s``."""

    def _init_progress(self, trainer: Trainer) -> None:
        super()._init_progress(trainer)
        if self.progress is not None:
            self.progress.live.transient = True


def clear_bars(trainer: Trainer) -> None:
    """Make the trainer's bars, where they are Lightning's own, :class:`PassingBar`."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if type(callback) is RichProgressBar:
            callback.__class__ = PassingBar


def headline_table(
    lines: Sequence[HeadlineLine], titles: Sequence[str], has_change: bool, columns: int | None = None
) -> Table:
    """A headline as a table for ``rich.print``: one line per dimension, one column per run, and the change from the first to the second.

    Args:
        lines: the lines.
        titles: what the runs are called.
        has_change: whether the second run is compared with the first.
        columns: characters that a line of the terminal holds; asked of it if not given.
    """
    is_narrow = (get_console().width if columns is None else columns) < NARROW
    most = NAME_WIDTH // 2 if is_narrow else NAME_WIDTH
    table = Table(title="Reliability", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0) if is_narrow else (0, 1))
    table.add_column("dimension", min_width=11)  # wraps where there is little room; numbers are never cut
    table.add_column("in %", no_wrap=True)
    for title in titles:
        width = min(max(5, *map(len, title.split())), most)
        table.add_column(escape(title), justify="right", width=width, overflow="fold")
    if has_change:
        table.add_column("change, points", justify="right", no_wrap=True)
        table.caption = "± half a 95 % interval, * significant at 5 % FDR"
        if any(line.dimension.measure.tested_by != line.dimension.measure for line in lines):
            table.caption += f"; {DEBIASED}"
    for line in lines:
        cells = [f"{100 * value:.1f}" for value in line.values]
        if has_change:
            mark, colour = ("*", "green" if line.is_better else "red") if line.is_significant else (" ", "default")
            digits = 1 if line.half_width >= 0.003 or not abs(line.change) < 0.003 else 2
            text = f"{100 * line.change:+.{digits}f} ± {100 * line.half_width:.{digits}f}{mark}".replace("-", "−")
            cells.append(f"[{colour}]{text}[/]")
        table.add_row(line.dimension.title, line.dimension.measure.info.title, *cells)
    return table


def _samples(sets: Mapping[str, EvalSet], records: Mapping[str, Mapping[str, Tensor]]) -> dict[EvaluationSet, Columns]:
    """A run's records in memory as stored ones are read."""
    return {
        EvaluationSet(name, s.role, s.corruption, s.severity, s.group): {
            column: values.numpy() for column, values in records[name].items()
        }
        for name, s in sets.items()
    }


def _randomness(module: Any) -> str:
    """What every table adds where the model's weights are drawn, not trained."""
    return " (random weights)" if getattr(getattr(module, "vlm", None), "pretrained", "") == RANDOM else ""
