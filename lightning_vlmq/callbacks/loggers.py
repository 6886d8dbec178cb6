"""Figures and texts to whatever logger a trainer has, by the logger's public interface."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from lightning import Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from matplotlib.figure import Figure
from PIL import Image


def takes_figures(trainer: Trainer) -> bool:
    """Whether a figure would reach any of the trainer's loggers: drawing one for nobody takes time."""
    return any(_figure_writer(logger) is not None for logger in trainer.loggers)


def log_figure(trainer: Trainer, name: str, figure: Figure, step: int | None = None) -> None:
    """Send a figure to every logger that takes images.

    TensorBoard and MLflow take figures; any logger with Lightning's ``log_image(key, images, step=...)``, such as that of Weights &
    Biases, takes the image; others (CSV) take none.

    Args:
        trainer: whose loggers.
        name: the figure's tag.
        figure: the figure.
        step: when; the trainer's global step if not given.
    """
    for logger in trainer.loggers:
        if (write := _figure_writer(logger)) is not None:
            write(name, figure, trainer.global_step if step is None else step)


def log_text(trainer: Trainer, name: str, text: str) -> None:
    """Send a Markdown text to every logger that takes texts: TensorBoard, MLflow, and what has Lightning's ``log_text``."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, text, trainer.global_step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_text(logger.run_id, text, f"{name}.md")
        elif callable(write := getattr(logger, "log_text", None)):
            write(name, columns=["text"], data=[[text]])


def _figure_writer(logger: Logger) -> Callable[[str, Figure, int], None] | None:
    experiment: Any = logger.experiment if isinstance(logger, TensorBoardLogger | MLFlowLogger) else None
    if isinstance(logger, TensorBoardLogger):
        return lambda name, figure, step: experiment.add_figure(name, figure, step)
    if isinstance(logger, MLFlowLogger):
        return lambda name, figure, step: experiment.log_figure(logger.run_id, figure, f"{name}_{step}.png")
    write = getattr(logger, "log_image", None)
    if not callable(write):
        return None
    return lambda name, figure, step: write(name, [_image(figure)], step=step)


def _image(figure: Figure) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    buffer.seek(0)
    return Image.open(buffer)
