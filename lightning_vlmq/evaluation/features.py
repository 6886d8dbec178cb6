"""Features, kept by content: the same tower on the same images or texts, computed the same way, is never run twice."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_vlmq.core.atomic import MACHINE, STALE_SECONDS, is_alive, replacing
from lightning_vlmq.core.errors import VLMQError, first_line
from lightning_vlmq.core.identity import tensors_digest
from lightning_vlmq.evaluation.digests import SPECTRA, TEXTS

log = logging.getLogger(__name__)

Kept = Literal["all", "reference", "none"]


class FeatureCache:
    """Features on disk, one safetensors file per tower and data set or list of texts.

    An entry carries a digest of its content. One that is damaged, of another shape or not finite is deleted and made anew; one that
    cannot be written costs a warning, and the run goes on without.

    Args:
        folder: where the files lie; ``None`` keeps nothing.
        kept: which image features: of ``"all"`` towers; of ``"reference"`` ones, see :attr:`lasting`, those of any other only
            until this process files those of the next, so that scopes that share a vision tower share its features; or ``"none"``.
            Features of texts and full precision's spectra are few, and are kept unless nothing is.

    Attributes:
        lasting: digests of the towers whose image features stay under ``"reference"``: full precision's.
        hits: look-ups that found something.
        misses: those that did not.
        seconds: spent in the model on images that were not known.
        images: number of these.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, kept: Kept = "all") -> None:
        self.folder = None if folder is None or kept == "none" else Path(folder)
        self.kept = kept
        self.lasting: set[str] = set()
        self.hits = self.misses = 0
        self.seconds, self.images = 0.0, 0
        self._warned = False

    def settle(self, folder: Path) -> None:
        """Take a folder where none was given and features are to be kept."""
        if self.folder is None and self.kept != "none":
            self.folder = folder

    def get(self, tower: str, dataset: str, n: int | None = None) -> Tensor | None:
        """Features ``[n, ...]`` in sample order, or ``None`` where nothing (or nothing sound) is kept.

        Args:
            tower: the tower's digest.
            dataset: the digest of what it was run on.
            n: number of samples that there have to be.
        """
        found = self._read(tower, dataset, n)
        if found is None:
            self.misses += 1
        else:
            self.hits += 1
        return found

    def _read(self, tower: str, dataset: str, n: int | None) -> Tensor | None:
        places = (self._path(tower, dataset), self._passing(tower, dataset))
        path = next((place for place in places if place is not None and place.is_file()), None)
        if path is None:
            return None
        try:
            with safe_open(str(path), "pt") as file:
                features, found = file.get_tensor("features"), (file.metadata() or {}).get("digest")
            problem = _problem(features, found, n)
        except (SafetensorError, OSError, KeyError, RuntimeError, ValueError, MemoryError) as error:
            problem = first_line(error)
        if not problem:
            return features
        log.warning("cached features '%s' are damaged (%s) and are computed again", path, problem)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._warn(path, error)
        return None

    def put(self, tower: str, dataset: str, features: Tensor) -> None:
        """Keep features ``[n, ...]``, written whole or not at all; those that are not finite are not kept."""
        path = self._path(tower, dataset)
        if self.kept == "reference" and tower not in self.lasting and not dataset.startswith((TEXTS, SPECTRA)):
            path = self._passing(tower, dataset)
            self._pass_on(tower)
        if path is None or not torch.isfinite(features).all():
            return
        kept = {"features": features.detach().cpu().contiguous()}
        try:
            with replacing(path) as partial:
                save_file(kept, partial, {"digest": tensors_digest(kept)})
        except OSError as error:
            self._warn(path, error)

    def put_part(self, tower: str, dataset: str, process: int, index: Tensor, features: Tensor) -> None:
        """Put by what one process has of a set, until :meth:`merge`: features ``[m, ...]`` of the samples at ``index`` int64 ``[m]``."""
        path = self._path(tower, dataset)
        if path is None:
            return
        try:
            with replacing(self._part(path, process)) as partial:
                save_file({"features": features.contiguous(), "index": index}, partial)
        except OSError as error:
            self._warn(path, error)

    def merge(self, tower: str, dataset: str, processes: int, n: int) -> int:
        """Make one entry of what all processes put by, if that is the whole set, and take the parts away.

        Args:
            tower: as in :meth:`put_part`.
            dataset: likewise.
            processes: how many there are.
            n: number of samples of the whole set.

        Returns:
            Number of parts that were found; that of the processes where the entry is there already.
        """
        path = self._path(tower, dataset)
        if path is None or path.is_file():
            return processes
        whole, seen, found = None, torch.zeros(n, dtype=torch.bool), 0
        for process in range(processes):
            try:
                with safe_open(str(self._part(path, process)), "pt") as file:
                    index, features = file.get_tensor("index"), file.get_tensor("features")
            except (SafetensorError, OSError):
                continue  # a process that saw nothing of the set, or does not share this folder
            whole = features.new_empty(n, *features.shape[1:]) if whole is None else whole
            whole[index], seen[index] = features, True
            found += 1
        if whole is not None and seen.all():
            self.put(tower, dataset, whole)
        return found

    def drop_part(self, tower: str, dataset: str, process: int) -> None:
        """Take away what a process put by."""
        if (path := self._path(tower, dataset)) is not None:
            with suppress(OSError):
                self._part(path, process).unlink(missing_ok=True)

    def of(self, tower: str, dataset: str, compute: Callable[[], Tensor], n: int | None = None) -> Tensor:
        """Features ``[n, dim]`` that are kept (on the CPU), or computed and then kept."""
        known = self.get(tower, dataset, n)
        if known is None:
            known = compute()
            require_unit(known, "texts or images that belong to all sets")
            self.put(tower, dataset, known)
        return known

    @staticmethod
    def _part(path: Path, process: int) -> Path:
        return path.with_suffix(f".part{process}")

    def _path(self, tower: str, dataset: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{tower}_{dataset}.safetensors"

    def _passing(self, tower: str, dataset: str) -> Path | None:
        """Where this process keeps features that do not stay."""
        if self.folder is None or self.kept != "reference":
            return None
        return self.folder / "passing" / f"{MACHINE}-{os.getpid()}" / f"{tower}_{dataset}.safetensors"

    def _pass_on(self, tower: str) -> None:
        """Delete features of this process's earlier towers, and all of processes that are gone (of other machines, a day old)."""
        place = self._passing(tower, "")
        if place is None or not place.parent.parent.is_dir():
            return
        for folder in place.parent.parent.iterdir():
            machine, _, pid = folder.name.rpartition("-")
            with suppress(OSError):
                is_left = machine == MACHINE and pid.isdigit() and not is_alive(int(pid))
                is_left |= folder != place.parent and time.time() - folder.stat().st_mtime > STALE_SECONDS
                for path in folder.glob("*.safetensors"):
                    if is_left or (folder == place.parent and not path.name.startswith(f"{tower}_")):
                        path.unlink(missing_ok=True)
                if is_left:
                    folder.rmdir()

    def _warn(self, path: Path, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            reason = getattr(error, "strerror", None) or first_line(error)
            log.warning("features cannot be kept in '%s' (%s); the run goes on without", path.parent, reason)


def _problem(features: Tensor, found: str | None, n: int | None) -> str:
    if found != tensors_digest({"features": features}):
        return "the content is not what was written"
    if features.ndim < 2 or (n is not None and len(features) != n):
        return f"of shape {tuple(features.shape)} where {n} samples are asked for"
    return "" if torch.isfinite(features).all() else "not finite"


def require_unit(features: Tensor, what: str) -> None:
    """Refuse features ``[n, dim]`` that are no directions: not finite, or zero, which is what overflowing activations become.

    Metrics of them would be those of a constant prediction, and look like a result. Of features ``[n, patches, dim]`` some may be zero: a
    patch of which nothing is left after an activation function or rounding says nothing, and is as near to each class as to any other.

    Raises:
        VLMQError: there are such.
    """
    length = features.detach().float().norm(dim=-1)  # of finite values that overflow here: infinite
    if features.ndim == 2:
        length = length[:, None]
    bad = int((~length.isfinite().all(1) | ~(length > 0.5).any(1)).sum())
    if bad:
        raise VLMQError(
            f"the model has no features for {bad} of {len(features)} {what}: they are not finite or zero, so activations overflow; "
            "its weights have exploded, or are too large for this precision: give other weights, or --trainer.precision 32-true"
        )
