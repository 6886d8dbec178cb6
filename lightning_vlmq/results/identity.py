"""What decides the numbers of a run, declared, and which runs are not filed because they are parts of one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, DeviceStatsMonitor, LearningRateMonitor, ModelSummary, ProgressBar
from lightning.pytorch.callbacks import Timer as TimeLimit

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.identity import code_digest, describe, library_versions
from lightning_vlmq.core.identity import file_digest as content_digest

WATCHERS = (Checkpoint, DeviceStatsMonitor, LearningRateMonitor, ModelSummary, ProgressBar, TimeLimit)
"""Lightning's callbacks that never change a number; a time limit counts as ``max_time``."""

TRAINING: dict[str, Callable[[Any], Any]] = {
    "processes": lambda trainer: trainer.world_size,
    "strategy": lambda trainer: type(trainer.strategy).__name__,
    "max_epochs": lambda trainer: trainer.max_epochs,
    "min_epochs": lambda trainer: trainer.min_epochs,
    "max_steps": lambda trainer: trainer.max_steps,
    "min_steps": lambda trainer: trainer.min_steps,
    "max_time": lambda trainer: [c._duration for c in _callbacks(trainer) if isinstance(c, TimeLimit)],
    "val_check_interval": lambda trainer: [trainer.val_check_interval, trainer._val_check_time_interval],
    "check_val_every_n_epoch": lambda trainer: trainer.check_val_every_n_epoch,
    "accumulate_grad_batches": lambda trainer: trainer.accumulate_grad_batches,
    "gradient_clip_val": lambda trainer: trainer.gradient_clip_val,
    "gradient_clip_algorithm": lambda trainer: trainer.gradient_clip_algorithm,
    "use_distributed_sampler": lambda trainer: trainer._accelerator_connector.use_distributed_sampler,
    "sync_batchnorm": lambda trainer: trainer._accelerator_connector._layer_sync is not None,
    "reload_dataloaders_every_n_epochs": lambda trainer: trainer.reload_dataloaders_every_n_epochs,
}
"""Trainer arguments that decide what a fit ends with; a validation may draw from the generator that training draws from."""

NO_PART: Mapping[str, str] = {
    "accelerator": "the kind of device counts, see computing",
    "precision": "counts, see computing",
    "deterministic": "counts, see computing",
    "benchmark": "counts, see computing",
    "devices": "of a fit the number of processes counts; of an evaluation it moves a number by rounding only",
    "num_nodes": "as devices",
    "logger": "writes down",
    "callbacks": "count one by one: those that say what they are, and in a fit all but watchers",
    "fast_dev_run": "never filed",
    "limit_train_batches": "never filed unless all batches are used",
    "limit_val_batches": "never filed unless all batches are used",
    "limit_test_batches": "never filed unless all batches are used",
    "limit_predict_batches": "predictions are not filed in the store",
    "overfit_batches": "never filed",
    "num_sanity_val_steps": "Lightning restores the generators after the sanity check",
    "log_every_n_steps": "writes down",
    "enable_checkpointing": "writes down",
    "enable_progress_bar": "shows",
    "enable_model_summary": "shows",
    "inference_mode": "the same kernels run with and without it",
    "profiler": "watches",
    "detect_anomaly": "watches",
    "barebones": "leaves watchers out",
    "plugins": "a precision plugin counts as precision; the others move files and processes",
    "default_root_dir": "where files go",
    "enable_autolog_hparams": "writes down",
    "model_registry": "where files go",
}
"""Every other argument of the Trainer, and why it decides no number of a run that is filed."""


def computing(trainer: Any) -> dict[str, Any]:
    """What a number depends on besides model and data: how it is computed, the code and the versions of libraries."""
    return {
        "precision": str(trainer.precision),
        "device": trainer.strategy.root_device.type,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
        "matmul": torch.get_float32_matmul_precision(),
        "code": code_digest(),
        "libraries": library_versions(),
    }


def run_identity(trainer: Any, module: Any) -> dict[str, Any]:
    """Everything that decides a run's numbers, for :func:`~lightning_vlmq.core.identity.digest`.

    Not in it, on purpose: where results, logs and caches go; workers, progress and loggers, which move no number; the evaluation batch
    size and the number of devices that evaluate, which change a number by rounding only (but for methods that say ``sees_batches``); and in
    ``fit`` the checkpoint that it resumes from, because a resumed training is the undisturbed one. :data:`NO_PART` says it of the
    Trainer's arguments.

    Args:
        trainer: a Lightning trainer whose data module is set up.
        module: a module with ``identity()``, ``run_key`` and ``sees_batches``.

    Raises:
        VLMQError: a part does not say what it is.
    """
    fits = trainer.state.fn == "fit"
    found = {"module": module, "data": trainer.datamodule, "seed": module.run_key.seed, "computing": computing(trainer)}
    if module.sees_batches:
        found["batches"] = [trainer.datamodule.batch_size, trainer.world_size]
    found["callbacks"] = [part for c in _callbacks(trainer) if (part := _callback(c, fits)) is not None]
    if fits:
        found["training"] = {name: read(trainer) for name, read in TRAINING.items()}
    elif getattr(trainer, "ckpt_path", None):
        found["checkpoint"] = file_digest(trainer.ckpt_path)
    return found


def file_digest(path: str | Path) -> str:
    """Hash of a file's content, or of all files of a folder by name and content. Raises :class:`VLMQError` if it cannot be read."""
    try:
        return content_digest(path)
    except OSError as error:
        raise VLMQError(f"'{path}' cannot be read ({error.strerror}); give a local checkpoint that exists") from error


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


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def _callback(callback: Callback, fits: bool) -> Any:
    """What a callback contributes: what it says itself; in a fit the settings of others that may change training; else nothing."""
    if hasattr(callback, "identity"):
        return describe(callback)
    if not fits or isinstance(callback, WATCHERS) or type(callback).__module__.startswith("lightning_vlmq."):
        return None
    settings = {}
    for name in inspect.signature(type(callback)).parameters:
        try:
            settings[name] = describe(getattr(callback, name, None))
        except VLMQError:
            settings[name] = f"a {type(getattr(callback, name)).__qualname__}"
    return {"type": f"{type(callback).__module__}.{type(callback).__qualname__}", **settings}
