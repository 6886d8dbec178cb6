"""Partial runs, those that see some of the data alone, leave no files that could be taken for a whole run's: decided here, once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lightning_vlmq.core.atomic import require_writable
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.results.identity import why_partial

log = logging.getLogger(__name__)


def partial_reason(trainer: Any, what: str) -> str:
    """Why nothing is to be written, as the trainer's flag and value, after a line that says so; ``""`` for a whole run.

    Args:
        trainer: a Lightning trainer whose state says what it does.
        what: what is not written, and where, to begin the line with.
    """
    reason = why_partial(trainer) or ""
    if reason and trainer.is_global_zero:
        log.warning("%s: the run does not see all data (%s)", what, reason)
    return reason


def require_place(folder: Path, what: str) -> None:
    """Make sure that a folder can be written before anything is computed for it.

    Raises:
        VLMQError: it cannot.
    """
    try:
        require_writable(folder)
    except OSError as error:
        raise VLMQError(f"{what} cannot be written to '{folder}' ({error.strerror}); give another folder") from error
