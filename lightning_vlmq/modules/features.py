"""Image features, kept by content: the same tower on the same images is never run twice."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import uuid
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import lightning_vlmq
from lightning_vlmq.models import VLM
from lightning_vlmq.quant.scheme import QuantScheme


class FeatureCache:
    """Image features on disk, one safetensors file per vision tower and data set.

    Args:
        folder: where the files lie; ``None`` keeps nothing.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.folder = None if folder is None else Path(folder)

    def get(self, tower: str, dataset: str) -> Tensor | None:
        """Features ``[n, dim]`` in sample order, or ``None`` where nothing (or nothing readable) is kept."""
        path = self._path(tower, dataset)
        if path is None or not path.is_file():
            return None
        try:
            return load_file(path)["features"]
        except (SafetensorError, OSError, KeyError):
            return None  # a damaged cache file costs a forward pass, after which it is replaced

    def put(self, tower: str, dataset: str, features: Tensor) -> None:
        """Keep features ``[n, dim]``, written whole or not at all."""
        path = self._path(tower, dataset)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        save_file({"features": features.detach().cpu().contiguous()}, partial)
        os.replace(partial, path)

    def _path(self, tower: str, dataset: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{tower}_{dataset}.safetensors"


def tower_digest(vlm: VLM, scheme: QuantScheme | None, method: str) -> str:
    """What decides a vision tower's outputs, as a hash: its tensors, its structure, how it is quantized, and the code's version.

    The scope does not count: a vision tower is the same whether the text tower is quantized too or not.
    """
    tower = vlm.get_submodule("model.visual")
    described = None if scheme is None else dataclasses.replace(scheme, scope="vision")
    state = hashlib.sha256(f"{lightning_vlmq.__version__} {torch.__version__} {method} {described} {tower}".encode())
    for name, tensor in sorted(tower.state_dict().items()):
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        state.update(
            tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data
            if tensor.ndim
            else str(float(tensor)).encode()
        )
    return state.hexdigest()[:20]
