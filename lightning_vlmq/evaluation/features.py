"""Features, kept by content: the same tower on the same images or texts is never run twice."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_vlmq.core.atomic import replacing
from lightning_vlmq.core.identity import digest
from lightning_vlmq.data.sets import EvalSet
from lightning_vlmq.models import VLM
from lightning_vlmq.models.provenance import content_hash
from lightning_vlmq.quant.scheme import FULL_PRECISION, QuantScheme


class FeatureCache:
    """Features on disk, one safetensors file per tower and data set or list of texts.

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
        with replacing(path) as partial:
            save_file({"features": features.detach().cpu().contiguous()}, partial)

    def of(self, tower: str, dataset: str, compute: Callable[[], Tensor]) -> Tensor:
        """Features ``[n, dim]`` that are kept (on the CPU), or computed and then kept."""
        known = self.get(tower, dataset)
        if known is None:
            known = compute()
            self.put(tower, dataset, known)
        return known

    def _path(self, tower: str, dataset: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{tower}_{dataset}.safetensors"


class SetFeatures:
    """Image features of one evaluation set, batch by batch: known ones looked up, new ones collected and filed at the end.

    Args:
        cache: where they are looked up and filed.
        tower: the vision tower's digest.
        s: the evaluation set.
        kind: what the features are, where they are not those of whole images.
    """

    def __init__(self, cache: FeatureCache, tower: str, s: EvalSet, kind: str = "") -> None:
        self.cache, self.tower, self.set = cache, tower, s
        self._name = f"{kind}_{s.digest}" if kind else s.digest
        self._known = cache.get(tower, self._name)
        self._fresh: list[Tensor] = []

    def of(self, index: Tensor, encode: Callable[[], Tensor]) -> Tensor:
        """Features ``[b, ...]`` of the samples at ``index`` int64 ``[b]``; ``encode`` runs the model on this batch."""
        if self._known is not None:
            return self._known[index.cpu()].to(index.device)
        features = encode()
        if self.cache.folder is not None:
            self._fresh.append(features.cpu())
        return features

    def whole(self) -> Tensor | None:
        """Features of the whole set in sample order, or ``None`` where this process has not seen all of it (or keeps nothing)."""
        if self._known is not None:
            return self._known
        complete = sum(map(len, self._fresh)) == len(self.set.images)
        return torch.cat(self._fresh) if complete and self._fresh else None

    def keep(self) -> None:
        """File what was new, if it is the whole set."""
        if sum(map(len, self._fresh)) == len(self.set.images):
            self.cache.put(self.tower, self._name, torch.cat(self._fresh))


def tower_digest(
    vlm: VLM, scheme: QuantScheme | None, method: str, tower: str = "vision", computing: Mapping[str, Any] | None = None
) -> str:
    """What decides a tower's outputs, as a hash: its tensors, structure, preprocessing or tokenizer, quantization and computing.

    The scope counts only as far as it holds the tower: a vision tower is the same whether the text tower is quantized too or not.

    Args:
        vlm: the model.
        scheme: how it is quantized, ``None`` for full precision.
        method: by which method.
        tower: ``"vision"`` or ``"text"``.
        computing: precision, device and versions, see :func:`~lightning_vlmq.results.identity.computing`.
    """
    if scheme is not None and tower in scheme.towers:
        described = f"{method} {dataclasses.replace(scheme, scope='vision')}"
    else:
        described = f"{FULL_PRECISION} None"
    own = {name: tensor for name, tensor in vlm.state_dict().items() if vlm.tower_of(name) == tower}
    modules = [module for name, module in vlm.model.named_children() if vlm.tower_of(f"model.{name}") == tower]
    own_input = vlm.identity()["preprocessing" if tower == "vision" else "tokenizer"]
    return digest([dict(computing or {}), described, str(modules), own_input, content_hash(own)], 20)


def text_digest(texts: Sequence[str], *more: Sequence[str]) -> str:
    """A hash of lists of texts, to keep their features under."""
    return f"texts_{hashlib.sha256(json.dumps([list(texts), *map(list, more)]).encode()).hexdigest()[:16]}"
