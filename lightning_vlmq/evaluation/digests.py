"""What decides features, as hashes to keep them under: the tower, how it is computed, the texts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from lightning import Trainer

from lightning_vlmq.core.identity import FEATURES, code_digest, digest, library_versions, tensors_digest
from lightning_vlmq.models import VLM
from lightning_vlmq.models.vlm import TOWERS
from lightning_vlmq.quant.scheme import FULL_PRECISION, QuantScheme

log = logging.getLogger(__name__)

TEXTS = "texts_"
SPECTRA = "spectra_"
"""How the names of texts' features begin."""


@dataclass(frozen=True)
class Computation:
    """How features are computed, beyond by which model: whatever may move their last bits, or more.

    Attributes:
        precision: the Trainer's, e.g. ``"bf16-mixed"``.
        device: ``"cpu"`` or the name of the GPU.
        threads: CPU threads an operation is split over.
        processes: of a distributed run.
        batch_size: images per batch when evaluating; how many pairs are a batch, their features' names say.
        matmul: PyTorch's precision of float32 products, and whether cuDNN may use TF32.
        deterministic: whether PyTorch has to take deterministic algorithms.
    """

    precision: str = "32-true"
    device: str = "cpu"
    threads: int = 1
    processes: int = 1
    batch_size: int = 0
    matmul: tuple[str, bool] = ("highest", True)
    deterministic: bool = False

    @classmethod
    def of(cls, trainer: Trainer) -> Computation:
        """That of a Trainer whose data module is set up."""
        device, data = trainer.strategy.root_device, trainer.datamodule  # type: ignore[attr-defined]
        return cls(
            precision=str(trainer.precision),
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            threads=torch.get_num_threads(),
            processes=trainer.world_size,
            batch_size=data.batch_size,
            matmul=(torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )


def tower_digest(
    vlm: VLM,
    scheme: QuantScheme | None,
    method: str,
    tower: str = "vision",
    computation: Computation | None = None,
) -> str:
    """What decides a tower's outputs, as a hash.

    That is its tensors and structure, the preprocessing, how it is quantized, how it is computed, the code and the libraries.

    The scope counts only as far as it holds the tower: a vision tower is the same whether the text tower is quantized too or not.

    Args:
        vlm: the model.
        scheme: how it is quantized, ``None`` for full precision.
        method: by which method.
        tower: ``"vision"`` or ``"text"``.
        computation: precision, device and so on; a plain one on the CPU if not given.
    """
    quantized = scheme is not None and tower in scheme.towers
    own = {name: tensor for name, tensor in vlm.state_dict().items() if vlm.tower_of(name) == tower}
    modules = [module for name, module in vlm.model.named_children() if vlm.tower_of(f"model.{name}") == tower]
    decisive = {
        "tensors": tensors_digest(own, 64),
        "input": vlm.preprocessing if tower == "vision" else vlm.identity()["tokenizer"],
        "structure": str(modules),
        "model": vlm.name,
        "method": method if quantized else FULL_PRECISION,
        "scheme": replace(scheme, scope="vision") if scheme is not None and quantized else None,
        "computation": computation or Computation(),
        "code": code_digest(FEATURES),
        "libraries": library_versions(),
    }
    return digest(decisive, 20)


def tower_digests(vlm: VLM, scheme: QuantScheme | None, method: str, trainer: Trainer) -> dict[str, str]:
    """:func:`tower_digest` of each tower as a Trainer runs it; a warning where a process of several differs from the first."""
    towers = {tower: tower_digest(vlm, scheme, method, tower, Computation.of(trainer)) for tower in TOWERS}
    if trainer.world_size > 1 and towers != trainer.strategy.broadcast(towers):
        log.warning(
            "process %d has another model than process 0, or computes it otherwise: calibration gave other weights, or the "
            "devices differ; set trainer.deterministic, and use devices of one kind",
            trainer.global_rank,
        )
    return towers


def text_digest(texts: Sequence[str], *more: Sequence[str]) -> str:
    """A hash of lists of texts, to keep their features under."""
    return f"{TEXTS}{digest([list(texts), *map(list, more)])}"
