"""A figure of how learned grids moved in training."""

from __future__ import annotations

from lightning import Callback, LightningModule, Trainer

from lightning_vlmq.callbacks.loggers import log_figure, takes_figures
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.plotting.grids import grid_trajectories


class GridTrajectories(Callback):
    """Writes the figure ``grids/trajectories`` to every logger that takes images, at the end of a fit, on rank zero.

    The Lightning module must have ``trajectory``: :class:`~lightning_vlmq.quant.trajectory.GridRecord` objects in the order of
    updates.

    Raises:
        VLMQError: later, if the module has none such.
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the figure."""
        if not trainer.is_global_zero or not takes_figures(trainer):
            return
        records = getattr(pl_module, "trajectory", None)
        if records is None:
            raise VLMQError(f"{type(pl_module).__name__} keeps no record of grids; remove GridTrajectories")
        if not records:
            return
        kinds, sides = records[0].changes, records[0].clipped
        figure = grid_trajectories(
            [record.step for record in records],
            {kind: [record.changes[kind] for record in records] for kind in kinds},
            {side: [record.clipped[side] for record in records] for side in sides},
            f"Learned grids in {records[-1].step} updates" if kinds else "Grids in training",
        )
        log_figure(trainer, "grids/trajectories", figure)
