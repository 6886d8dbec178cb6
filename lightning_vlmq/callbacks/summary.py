"""What a run was and what came of it, for loggers: hyperparameters beside headline metrics, its config and coverage as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from lightning import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_vlmq.callbacks.loggers import log_text
from lightning_vlmq.core.roles import ROLES
from lightning_vlmq.results.schema import RunKey


class RunSummary(Callback):
    """Tells every logger which model was judged and its headline numbers (``<role>/<metric>``), so that runs can be compared there.

    TensorBoard's HParams page shows one line per run, if ``trainer.enable_autolog_hparams`` is false (as in the configs ``eval`` and
    ``qat``): Lightning's own entry, which comes first and knows no metrics, would keep this one out. Everything that was measured
    is in the results store; a logger gets it only on request.

    Args:
        every_row: whether each data set's metrics go to the loggers too, as ``<data set>/<score>/<metric>``: hundreds per run.
    """

    def __init__(self, every_row: bool = False) -> None:
        self.every_row = every_row

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Log, unless this is the sanity check, or training goes on."""
        goes_on = trainer.state.fn == "fit" and trainer.global_step < trainer.estimated_stepping_batches
        rows = getattr(pl_module, "rows", None)
        if trainer.sanity_checking or goes_on or not rows or not trainer.is_global_zero:
            return
        headline = {
            k: float(v) for k, v in trainer.callback_metrics.items() if k.removeprefix("lst/").split("/")[0] in ROLES
        }
        about = pl_module.run_key.columns()
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(hparams_of(pl_module.run_key), headline)
            else:
                logger.log_hyperparams(about)
            if self.every_row:
                named = {
                    "/".join(filter(None, (row.dataset or row.role, row.score, row.metric))): row.value for row in rows
                }
                logger.log_metrics(named, trainer.global_step)
        log_text(trainer, "config", f"```yaml\n{config_of(trainer, pl_module)}```")
        if (coverage := getattr(pl_module, "coverage", None)) is not None:
            log_text(trainer, "coverage", "\n\n".join([*coverage.lines(), markdown_table(coverage.to_rows())]))

    on_test_end = on_validation_end


def hparams_of(key: RunKey) -> dict[str, Any]:
    """A run's settings for TensorBoard's HParams page, which shows five by the alphabet: bits, method, model, pretrained, scope."""
    own = {name: value for name, value in key.columns().items() if name not in ("act_bits", "is_tuned")}
    return {**own, "bits": key.bits}


def config_of(trainer: Trainer, module: Any) -> str:
    """The settings of a run's model and data as YAML, as far as they are plain values."""
    parts = {"model": module.hparams, "data": getattr(getattr(trainer, "datamodule", None), "hparams", {})}
    return yaml.safe_dump(
        {name: _plain(dict(values)) for name, values in parts.items()}, sort_keys=False, allow_unicode=True
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items() if not str(key).startswith("_")}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return _plain(vars(value)) if hasattr(value, "__dataclass_fields__") else repr(value)


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Rows of the same keys as a Markdown table; whole numbers with thousands apart."""
    head = list(rows[0]) if rows else []
    lines = [head, ["---"] * len(head)]
    lines += [[f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
