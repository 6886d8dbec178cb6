"""The identity of a run: everything that decides its numbers, declared by its parts."""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.results.store import code_version

LIBRARIES = (
    "torch",
    "torchvision",
    "torchao",
    "lightning",
    "open_clip_torch",
    "timm",
    "transformers",
    "numpy",
    "scipy",
    "pillow",
)
"""Packages whose version may change a number. One that is not installed has decided nothing."""


def library_versions() -> dict[str, str]:
    """Versions of those of :data:`LIBRARIES` that are installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def computing(trainer: Any) -> dict[str, Any]:
    """What a number depends on besides model and data: precision, kind of device, versions of code and libraries."""
    return {
        "precision": str(trainer.precision),
        "device": trainer.strategy.root_device.type,
        "code": code_version(),
        "libraries": library_versions(),
    }


def run_identity(trainer: Any, module: Any) -> dict[str, Any]:
    """Everything that decides a run's numbers, for :func:`~lightning_vlmq.core.identity.digest`.

    Not in it, on purpose: where results, logs and caches go; workers, progress and loggers, which move no number; the evaluation batch
    size and the number of devices that evaluate, which change a number by rounding only; and in ``fit`` the checkpoint that it resumes
    from, because a resumed training is the undisturbed one.

    Args:
        trainer: a Lightning trainer whose data module is set up.
        module: a module with ``identity()`` and ``run_key``.
    """
    found = {"module": module, "data": trainer.datamodule, "seed": module.run_key.seed, "computing": computing(trainer)}
    if trainer.state.fn == "fit":
        names = ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")
        found["training"] = {name: getattr(trainer, name) for name in names} | {"processes": trainer.world_size}
    elif getattr(trainer, "ckpt_path", None):
        found["checkpoint"] = file_digest(trainer.ckpt_path)
    return found


def file_digest(path: str | Path) -> str:
    """Hash of a file's content, or of all files of a folder by name and content. Raises :class:`VLMQError` if it cannot be read."""
    place, state = Path(path), hashlib.sha256()
    try:
        files = sorted(f for f in place.rglob("*") if f.is_file()) if place.is_dir() else [place]
        for file in files:
            with open(file, "rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            state.update(f"{file.relative_to(place).as_posix()} {content}\n".encode())
    except OSError as error:
        raise VLMQError(f"'{path}' cannot be read ({error.strerror}); give a local checkpoint that exists") from error
    return state.hexdigest()[:16]


def why_partial(trainer: Any) -> str | None:
    """What makes a run see less than all data, as the trainer's flag and value; ``None`` for a whole run.

    ``limit_val_batches=1`` is one batch, ``1.0`` is all of them.
    """
    if trainer.fast_dev_run:
        return "fast_dev_run"
    if trainer.overfit_batches:
        return f"overfit_batches={trainer.overfit_batches}"
    used = {"fit": ("limit_train_batches", "limit_val_batches"), "validate": ("limit_val_batches",)}
    used |= {"test": ("limit_test_batches",), "predict": ("limit_predict_batches",)}
    for flag in used.get(str(getattr(trainer.state.fn, "value", trainer.state.fn)), ()):
        limit = getattr(trainer, flag)
        if not (isinstance(limit, float) and limit == 1.0):
            return f"{flag}={limit}"
    return None
