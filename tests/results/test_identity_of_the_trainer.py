"""Every argument of the Trainer, every library and every part of a computation counts, or a table says why not."""

from __future__ import annotations

import inspect
import re
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import EarlyStopping

from lightning_vlmq.callbacks import ResultsWriter, SingularValueSpectrum
from lightning_vlmq.core.identity import LIBRARIES, digest
from lightning_vlmq.evaluation import digests
from lightning_vlmq.evaluation.digests import Computation, tower_digest
from lightning_vlmq.models import load_vlm
from lightning_vlmq.results.identity import NO_PART, TRAINING, _callback, computing

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
TRAINER = {
    "max_epochs": 2,
    "min_epochs": 1,
    "max_steps": 3,
    "min_steps": 2,
    "max_time": timedelta(hours=1),
    "val_check_interval": 0.5,
    "check_val_every_n_epoch": 2,
    "accumulate_grad_batches": 2,
    "gradient_clip_val": 1.0,
    "gradient_clip_algorithm": "value",
    "use_distributed_sampler": True,
    "sync_batchnorm": True,
    "reload_dataloaders_every_n_epochs": 1,
}
COMPUTED = {"precision": "64-true", "deterministic": True, "benchmark": True}


def read(**flags) -> dict:
    given = {**QUIET, "accelerator": "cpu", "devices": 1, "use_distributed_sampler": False, "max_epochs": 1, **flags}
    torch.use_deterministic_algorithms(False)  # whatever ran before in this process may have left them on
    trainer = Trainer(**given)
    try:
        return {"training": {name: reader(trainer) for name, reader in TRAINING.items()}, **computing(trainer)}
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False


def test_every_flag_of_the_trainer_counts_or_has_a_reason():
    assert set(inspect.signature(Trainer).parameters) == (set(TRAINING) - {"processes"}) | set(NO_PART)
    assert set(TRAINING) == set(TRAINER) | {"strategy", "processes"}  # both need more than one process to differ
    first = digest(read())
    assert digest(read()) == first
    assert not [name for name, value in (TRAINER | COMPUTED).items() if digest(read(**{name: value})) == first]


def test_every_dependency_counts_or_has_a_reason():
    only = [
        "hydra-core",
        "jsonargparse",
        "matplotlib",
        "pandas",
        "pyarrow",
        "pydantic",
        "rich",
        "safetensors",
        "tensorboard",
    ]  # moves, reads, draws
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    needed = re.search(r"\ndependencies = \[(.*?)\n\]", text, re.DOTALL)[1]
    names = {re.match(r"[A-Za-z0-9_-]+", word)[0] for word in re.findall(r'"([^"]+)"', needed)}
    assert names - set(LIBRARIES) <= set(only)


def test_callbacks_that_change_training_or_rows_count():
    assert _callback(EarlyStopping("x"), True) != _callback(EarlyStopping("x", patience=9), True)
    assert _callback(EarlyStopping("x"), False) is None and _callback(ResultsWriter("x"), True) is None
    spectra = [_callback(SingularValueSpectrum(top_ranks=ranks), False) for ranks in ((8,), (4,))]
    assert None not in spectra and spectra[0] != spectra[1]
    assert _callback(SingularValueSpectrum(7), False) == _callback(SingularValueSpectrum(9), False)


def test_each_part_of_a_computation_is_another_cache_key(monkeypatch: pytest.MonkeyPatch):
    vlm = load_vlm("vit_clean")
    others = [
        Computation(precision="bf16-mixed"),
        Computation(device="NVIDIA H100"),
        Computation(threads=2),
        Computation(processes=2),
        Computation(batch_size=7),
        Computation(matmul=("high", True)),
        Computation(deterministic=True),
    ]
    assert len(others) == len(Computation.__dataclass_fields__)
    keys = {tower_digest(vlm, None, "fp32", "vision", computation) for computation in [Computation(), *others]}
    monkeypatch.setattr(digests, "library_versions", lambda: {"torch": "9"})
    keys.add(tower_digest(vlm, None, "fp32"))
    monkeypatch.setattr(digests, "code_digest", lambda packages: "other")
    keys.add(tower_digest(vlm, None, "fp32"))
    assert len(keys) == len(others) + 3
