"""The image features of one evaluation set, batch by batch: looked up where they are known, collected and filed where they are new."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_vlmq.data.sets import EvalSet
from lightning_vlmq.evaluation.features import FeatureCache, require_unit


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
        self._known = cache.get(tower, self._name, len(s.images))
        self._fresh: list[Tensor] = []
        self._rows: list[Tensor] = []

    def of(self, rows: NDArray[np.int64], device: torch.device, encode: Callable[[], Tensor]) -> Tensor:
        """Features ``[b, ...]`` of a batch, on a device.

        Known ones are looked up without waiting for a GPU.

        Args:
            rows: int64 ``[b]``, which samples these are.
            device: where the batch is.
            encode: runs the model on it.
        """
        index = torch.from_numpy(rows)
        if self._known is not None:
            found = self._known[index]
            return (found.pin_memory() if device.type == "cuda" else found).to(device, non_blocking=True)
        start = time.perf_counter()
        features = encode()
        self.cache.seconds += time.perf_counter() - start
        self.cache.images += len(rows)
        require_unit(features, f"images of '{self.set.name}'")
        if self.cache.folder is not None:
            self._fresh.append(features.detach().cpu())
            self._rows.append(index)
        return features

    def whole(self) -> Tensor | None:
        """Features of the whole set in sample order, or ``None`` where this process has not seen all of it (or keeps nothing)."""
        if self._known is not None:
            return self._known
        index, fresh = self._seen()
        if len(index) != len(self.set.images):
            return None
        order = index.argsort()
        return fresh if torch.equal(order, torch.arange(len(order))) else fresh[order]

    def keep(self) -> None:
        """File what was new, if it is the whole set."""
        fresh = self.whole()
        if fresh is not None and self._known is None:
            self.cache.put(self.tower, self._name, fresh)

    def put_part(self, process: int) -> None:
        """Put by what was new to this process of several, which together see the whole set."""
        index, fresh = self._seen()
        if len(index):
            self.cache.put_part(self.tower, self._name, process, index, fresh)

    def merge(self, processes: int) -> bool:
        """File what all processes put by, after each has; ``False`` where some did not, though there were samples for all."""
        n = len(self.set.images)
        return self.cache.merge(self.tower, self._name, processes, n) >= min(processes, n)

    def drop_part(self, process: int) -> None:
        """Take away what this process put by."""
        self.cache.drop_part(self.tower, self._name, process)

    def _seen(self) -> tuple[Tensor, Tensor]:
        if not self._fresh:
            return torch.empty(0, dtype=torch.int64), torch.empty(0)
        return torch.cat(self._rows), torch.cat(self._fresh)
