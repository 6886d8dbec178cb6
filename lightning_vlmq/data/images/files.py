"""Image sets that are decoded when a batch is asked for, in whatever process asks."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property, lru_cache
from hashlib import sha256

import numpy as np
import PIL
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_vlmq.core.errors import VLMQError, first_line
from lightning_vlmq.data.images.encoded import OnBadImage
from lightning_vlmq.data.images.fingerprints import Fingerprints, shown
from lightning_vlmq.data.images.pixels import Preprocess, UnreadableImage
from lightning_vlmq.data.images.sources import ImageSource
from lightning_vlmq.data.sets import Batch, TensorImages, as_is

log = logging.getLogger(__name__)


class FileImages(Dataset[Batch]):
    """Images of a source, decoded batch by batch, with one value of each further column per image.

    Args:
        source: where the images are.
        preprocess: from a decoded file to pixels.
        rows: rows of the source, int64 ``[n]``, in the set's order.
        on_bad_image: at an image that cannot be read ``"error"`` raises :class:`UnreadableImage`; ``"skip"`` leaves it out of its
            batch with a warning that names it, so that batches may have fewer images than were asked for, or none.
        columns: tensors ``[n, ...]`` or lists of ``n`` strings.
    """

    def __init__(
        self,
        source: ImageSource,
        preprocess: Preprocess,
        rows: Tensor,
        on_bad_image: OnBadImage = "error",
        **columns: Tensor | list[str],
    ) -> None:
        self.source = source
        self.preprocess = preprocess
        self.rows = rows
        self.on_bad_image = on_bad_image
        self.columns = columns

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Batch:
        return {"image": self.decode(i), "index": i, **{k: v[i] for k, v in self.columns.items()}}

    def __getitems__(self, rows: list[int]) -> Batch:
        """A whole batch: ``image`` uint8 ``[b, 3, size, size]``, ``index`` int64 ``[b]``, and each column's values."""
        images, kept = [], []
        for i in rows:
            try:
                images.append(self.decode(i))
            except UnreadableImage as error:
                if self.on_bad_image == "error":
                    raise
                log.warning("%s; it is left out", error)
                continue
            kept.append(i)
        index = torch.tensor(kept, dtype=torch.int64)
        size = self.preprocess.size
        batch: Batch = {"image": torch.stack(images) if images else torch.empty(0, 3, size, size, dtype=torch.uint8)}
        batch["index"] = index
        for name, column in self.columns.items():
            batch[name] = column[index] if isinstance(column, Tensor) else [column[i] for i in kept]
        return batch

    def decode(self, i: int) -> Tensor:
        """One image, uint8 ``[3, size, size]``. Raises :class:`UnreadableImage`."""
        row = int(self.rows[i])
        try:
            with self.source.open(row) as image:
                return self.preprocess(image)
        except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
            reason = (
                "no image that is known here" if isinstance(error, PIL.UnidentifiedImageError) else first_line(error)
            )
            advice = "" if self.on_bad_image == "skip" else "; replace it or set on_bad_image: skip"
            raise UnreadableImage(f"image '{self.source.name(row)}' cannot be read ({reason}){advice}") from error

    def subset(self, index: Tensor) -> FileImages:
        """The images at ``index``, int64 ``[m]``."""
        columns = {
            name: column[index] if isinstance(column, Tensor) else [column[i] for i in index.tolist()]
            for name, column in self.columns.items()
        }
        return FileImages(self.source, self.preprocess, self.rows[index], self.on_bad_image, **columns)

    def digest(self) -> str:
        """A hash of the listing (relative path, size, time of change), the columns, the preprocessing and Pillow's version.

        No image is read for it. A file that changes but keeps its size and time of change is not noticed.
        """
        return self._digest

    @cached_property
    def _digest(self) -> str:
        state = sha256(f"{self.preprocess} {self.on_bad_image} {PIL.__version__}\n".encode())
        for row in self.rows.tolist():
            state.update(self.source.entry(row) + b"\n")
        for name, column in sorted(self.columns.items()):
            values = column.numpy().tobytes() if isinstance(column, Tensor) else "\0".join(column).encode()
            state.update(f"{name} {len(values)}\n".encode() + values)
        return state.hexdigest()[:16]

    def fingerprints(self) -> Mapping[str, Fingerprints]:
        """How to recognise the images: by their files where they have any, by their pixels as stored or as shown."""
        rows = self.rows.numpy()

        def of(prints: Fingerprints) -> Fingerprints:
            return Fingerprints(
                lambda: prints.cheap()[rows], lambda i: prints.exact(int(rows[i])), lambda i: prints.name(int(rows[i]))
            )

        stored = {level: of(prints) for level, prints in self.source.fingerprints().items()}
        numel = float(3 * self.preprocess.size**2)
        by_sight = Fingerprints(
            cheap=lambda: np.full(len(self), numel),
            exact=lambda i: shown(self.decode(i)[None]).exact(0),
            name=lambda i: self.source.name(int(rows[i])),
        )
        return {**stored, "shown": by_sight}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FileImages) and self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())


class DecodedImages(TensorImages):
    """Images of files, decoded once and kept.

    Args:
        origin: where they came from: the readable ones alone.
        images: uint8 ``[n, 3, size, size]``.
    """

    def __init__(self, origin: FileImages, images: Tensor) -> None:
        super().__init__(images, **origin.columns)
        self.origin = origin

    def digest(self) -> str:
        """The hash of the files' listing."""
        return self.origin.digest()

    def fingerprints(self) -> Mapping[str, Fingerprints]:
        """How to recognise the images: as those of the files."""
        return {**self.origin.fingerprints(), **super().fingerprints()}


@lru_cache(maxsize=2)
def decode_all(images: FileImages, num_workers: int, what: str) -> DecodedImages:
    """Decode a set into memory; the same files are not decoded again by this process.

    Args:
        images: the set.
        num_workers: processes that decode.
        what: what the images are, for messages.

    Returns:
        The readable images, in order.

    Raises:
        UnreadableImage: at the first image that cannot be read, unless such are skipped.
        VLMQError: none is readable.
    """
    batches = list(DataLoader(images, 32, num_workers=num_workers, collate_fn=as_is))
    index = torch.cat([batch["index"] for batch in batches])
    if len(index) == 0:
        raise VLMQError(f"none of the {len(images)} {what} can be read; repair the files")
    if len(index) < len(images):
        log.warning("%d of %d %s cannot be read and are left out", len(images) - len(index), len(images), what)
    return DecodedImages(images.subset(index), torch.cat([batch["image"] for batch in batches]))
