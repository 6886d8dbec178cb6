"""Where a model's weights come from, and what they are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

RANDOM = "none"
"""The word that asks for random weights, and the source that such a model names."""


@dataclass(frozen=True)
class Provenance:
    """What a VLM was loaded from. Only what decides its features counts as its identity: the content, not the place.

    Attributes:
        source: ``embedded``, an open_clip tag, a file, a folder, a repository, or ``none`` for random weights.
        weights: SHA-256 of every tensor's name, shape, type and bytes as loaded, hexadecimal.
        architecture: digest of what the model was built from, activation included.
        revision: commit of the repository, where it has one.
    """

    source: str = field(compare=False)
    weights: str
    architecture: str
    revision: str = field(default="", compare=False)

    @property
    def is_random(self) -> bool:
        """Whether the weights were drawn, not trained."""
        return self.source == RANDOM


def content_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256, hexadecimal, of tensors by name: names, shapes, types and bytes, whatever their order or device."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
