"""Figures and texts to whatever logger a trainer has, by the logger's public interface; a logger that cannot write ends no run."""

from __future__ import annotations

import functools
import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning import Trainer
from lightning.fabric.loggers.logger import _DummyExperiment
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from matplotlib.figure import Figure
from PIL import Image

from lightning_vlmq.core.errors import first_line

log = logging.getLogger(__name__)


def forgive(trainer: Trainer) -> None:
    """Let the trainer's loggers go on without what they cannot write (a full disk, a folder that is not theirs), after one warning each.

    The loggers stay what they are for everybody who asks for their class.
    """
    for logger in trainer.loggers:
        if not hasattr(logger, "_gave_up"):
            logger.__class__ = _forgiving(type(logger))


_WRITE = (
    "log_metrics",
    "log_hyperparams",
    "log_graph",
    "log_image",
    "log_text",
    "after_save_checkpoint",
    "save",
    "finalize",
)


@functools.cache
def _forgiving(kind: type) -> type:
    """The logger's class, in which every method that writes stops at the first error of a disk.

    Derived from it alone: instances can change to a class of the same layout only.
    """

    def method(name: str) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._gave_up:
                with _warned(self):
                    return getattr(kind, name)(self, *args, **kwargs)
            return None

        return call

    def experiment(self: Any) -> Any:
        if not self._gave_up:
            with _warned(self):
                return kind.experiment.__get__(self)  # type: ignore[attr-defined]
        return _DummyExperiment()  # takes everything and keeps nothing

    own: dict[str, Any] = {name: method(name) for name in _WRITE if callable(getattr(kind, name, None))}
    own |= {"experiment": property(experiment), "_gave_up": False, "__module__": kind.__module__}
    own["__reduce_ex__"] = lambda self, _: (_restored, (kind, self.__getstate__()))
    return type(kind.__name__, (kind,), own)


@contextmanager
def _warned(logger: Any) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if (
            not isinstance(error, OSError) and not logger._gave_up
        ):  # what follows from an experiment that is none is no news
            raise
        if not logger._gave_up:
            logger._gave_up = True
            name, where = type(logger).__name__, getattr(error, "filename", None) or getattr(logger, "save_dir", None)
            log.warning("%s cannot write to '%s' (%s); the run goes on without", name, where, _why(error))


def _restored(kind: type, state: dict[str, Any]) -> Any:
    made: Any = object.__new__(_forgiving(kind))
    made.__dict__.update(state)
    return made


def _why(error: BaseException) -> str:
    return getattr(error, "strerror", None) or first_line(error)


def takes_figures(trainer: Trainer) -> bool:
    """Whether a figure would reach any of the trainer's loggers: drawing one for nobody takes time."""
    return any(_figure_writer(logger) is not None for logger in trainer.loggers)


def log_figure(trainer: Trainer, name: str, figure: Figure, step: int | None = None) -> None:
    """Send a figure to every logger that takes images. One that cannot be drawn or written costs a warning.

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
            try:
                write(name, figure, trainer.global_step if step is None else step)
            except Exception as error:
                log.warning("figure '%s' cannot be kept (%s); the run goes on without", name, _why(error))


def log_text(trainer: Trainer, name: str, text: str) -> None:
    """Send a Markdown text to every logger that takes texts: TensorBoard, MLflow, and what has Lightning's ``log_text``.

    One that cannot be written costs a warning.
    """
    for logger in trainer.loggers:
        try:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text(name, text, trainer.global_step)
            elif isinstance(logger, MLFlowLogger):
                logger.experiment.log_text(logger.run_id, text, f"{name}.md")
            elif callable(write := getattr(logger, "log_text", None)):
                write(name, columns=["text"], data=[[text]])
        except Exception as error:
            log.warning("text '%s' cannot be kept (%s); the run goes on without", name, _why(error))


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
