"""Images decoded once into a file that every process maps into its memory, instead of once a run."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_vlmq.core.atomic import replacing
from lightning_vlmq.data.images.files import FileImages
from lightning_vlmq.data.images.fingerprints import Fingerprints
from lightning_vlmq.data.sets import Batch, as_is

log = logging.getLogger(__name__)

SUM_BYTES = 8
"""Of a checksum, one an image, at the end of the file."""


class MappedImages(Dataset[Batch]):
    """Images of files, decoded before into one file: pixels, then a checksum an image. What does not match its checksum is decoded anew.

    Args:
        origin: where they come from.
        path: the file.
    """

    def __init__(self, origin: FileImages, path: Path) -> None:
        self.origin, self.path = origin, path
        self._pixels: NDArray[np.uint8] | None = None
        self._sums: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.origin)

    def __getitem__(self, i: int) -> Batch:
        batch = self.__getitems__([i])
        return {name: i if name == "index" else column[0] for name, column in batch.items()}

    def __getitems__(self, rows: list[int]) -> Batch:
        """A whole batch: ``image`` uint8 ``[b, 3, size, size]``, ``index`` int64 ``[b]``, and each column's values."""
        pixels, sums = self._mapped()
        images = []
        for i in rows:
            image = np.array(pixels[i])
            if checksum(image) != sums[i].tobytes():
                log.warning("image %d in '%s' is not what was decoded, and is decoded again", i, self.path)
                images.append(self.origin.decode(i))
            else:
                images.append(torch.from_numpy(image))
        index = torch.tensor(rows, dtype=torch.int64)
        batch: Batch = {"image": torch.stack(images), "index": index}
        for name, column in self.origin.columns.items():
            batch[name] = column[index] if isinstance(column, Tensor) else [column[i] for i in rows]
        return batch

    def digest(self) -> str:
        """The hash of the files' listing: features of them are known by it, decoded or not."""
        return self.origin.digest()

    def fingerprints(self) -> Mapping[str, Fingerprints]:
        """How to recognise the images: as those of the files."""
        return self.origin.fingerprints()

    def _mapped(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        if self._pixels is None or self._sums is None:
            n, size = len(self.origin), self.origin.preprocess.size
            self._pixels = np.memmap(self.path, np.uint8, "r", shape=(n, 3, size, size))
            self._sums = np.memmap(self.path, np.uint8, "r", offset=n * 3 * size**2, shape=(n, SUM_BYTES))
        return self._pixels, self._sums

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_pixels": None, "_sums": None}  # a loader's process maps the file itself


def file_bytes(images: FileImages) -> int:
    """Size of the file that a set is decoded to."""
    return len(images) * (3 * images.preprocess.size**2 + SUM_BYTES)


def decoded_path(images: FileImages, folder: Path) -> Path:
    """The file that a set is decoded to."""
    return folder / f"{images.digest()}.pixels"


def decoded_files(folder: Path) -> dict[str, int]:
    """Bytes of each file of decoded images in a folder, by name."""
    return {path.name: path.stat().st_size for path in folder.glob("*.pixels")}


def map_decoded(images: FileImages, folder: Path, num_workers: int) -> FileImages | MappedImages:
    """A set from the file that it was decoded to, which is made where it is not there; processes that ask for one at once wait for one.

    A set with images that cannot be read stays as it is: which ones to leave out is said whenever it is evaluated.

    Args:
        images: the set.
        folder: where such files are.
        num_workers: processes that decode.

    Raises:
        OSError: the folder cannot be written; ``filename`` says where.
    """
    path = decoded_path(images, folder)
    with locked(path):
        if not path.is_file() or path.stat().st_size != file_bytes(images):
            size, readable = images.preprocess.size, True
            with replacing(path) as partial, open(partial, "wb") as file:
                sums = []
                for batch in DataLoader(images, 32, num_workers=num_workers, collate_fn=as_is):
                    pixels = batch["image"].numpy()
                    sums += [checksum(image) for image in pixels]
                    file.write(pixels.tobytes())
                file.write(b"".join(sums))
                file.flush()
                readable = len(sums) == len(images)
            if not readable:
                path.unlink()
                log.warning(
                    "a set of %d images (%d pixels) has some that cannot be read, and is not kept decoded",
                    len(images),
                    size,
                )
                return images
    return MappedImages(images, path)


def checksum(image: NDArray[np.uint8]) -> bytes:
    """Of one image's pixels."""
    return blake2b(np.ascontiguousarray(image).data, digest_size=SUM_BYTES).digest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Nobody else makes the file meanwhile; its folder is there then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with suppress(OSError):  # a file system without locks: at worst two decode the same
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
