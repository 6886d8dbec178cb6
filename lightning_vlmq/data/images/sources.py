"""Where the images of a set come from, in files of their own or an array. Nothing is decoded before it is asked for."""

from __future__ import annotations

import io
import logging
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data.images.fingerprints import Fingerprints, pixel_hash
from lightning_vlmq.data.images.pixels import as_shown

log = logging.getLogger(__name__)


class ImageSource(ABC):
    """Images by row.

    Attributes:
        side: shortest side in pixels where all images are known to have the same size, else ``None``.
    """

    side: int | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def open(self, row: int) -> Image.Image:
        """One image, possibly not decoded yet. Raises what Pillow or the file system raises."""

    @abstractmethod
    def name(self, row: int) -> str:
        """What a message calls the image."""

    @abstractmethod
    def entry(self, row: int) -> bytes:
        """What has to be equal for the image to be taken as unchanged: its place, size and time of change."""

    def fingerprints(self) -> dict[str, Fingerprints]:
        """How to recognise the images by their pixels as stored."""
        return {"stored": Fingerprints(self._shapes, self._pixel_hash, self.name)}

    def _shapes(self) -> NDArray[np.float64]:
        return np.array([self._shape(row) for row in range(len(self))])

    def _shape(self, row: int) -> float:
        try:
            with self.open(row) as image:
                return float(image.width * 2**20 + image.height)
        except Exception:
            return np.nan  # an image that cannot be read equals no other

    def _pixel_hash(self, row: int) -> bytes:
        try:
            return pixel_hash(np.array(as_shown(self.open(row), "stored").convert("RGB")))
        except Exception:
            return os.urandom(16)


class EncodedSource(ImageSource):
    """Images as encoded bytes."""

    @abstractmethod
    def encoded(self, row: int) -> bytes:
        """The bytes of one image file."""

    @abstractmethod
    def sizes(self) -> NDArray[np.float64]:
        """Bytes an image, ``[n]``."""

    def open(self, row: int) -> Image.Image:
        """One image; the header is read, the pixels are not."""
        return Image.open(io.BytesIO(self.encoded(row)))

    def fingerprints(self) -> dict[str, Fingerprints]:
        """How to recognise the images, by their bytes too."""
        by_bytes = Fingerprints(self.sizes, lambda row: blake2b(self.encoded(row), digest_size=16).digest(), self.name)
        return {"file": by_bytes, **super().fingerprints()}


class FileTree(EncodedSource):
    """Image files below a folder.

    Args:
        folder: the folder.
        files: path below the folder (``/`` between parts), bytes and time of change in nanoseconds, a file each.
    """

    def __init__(self, folder: Path, files: Sequence[tuple[str, int, int]]) -> None:
        self.folder = folder
        # as one array of bytes: millions of strings would take far more memory, and each worker would copy them by touching them
        self._paths = np.array([os.fsencode(path) for path, _, _ in files], dtype=bytes)
        self._stats = np.array([(size, time) for _, size, time in files], dtype=np.int64).reshape(-1, 2)

    @classmethod
    def scan(cls, folder: Path, below: str = "") -> FileTree:
        """Every image in ``folder/below``, by suffix, in the order of the paths; what systems leave there is passed over.

        Images of another kind (``.gif``, ``.heic``, without a suffix) are passed over too, with a warning that counts them.

        Raises:
            VLMQError: a folder or file that cannot be read, or a folder that contains itself by a link.
        """
        files: list[tuple[str, int, int]] = []
        others: list[str] = []
        for path, status in _walk(folder, f"{below}/" if below else "", ()):
            if status is not None:
                files.append((path, status.st_size, status.st_mtime_ns))
            elif _is_image(folder / path):
                others.append(path)
        if others:
            kinds = ", ".join(sorted({Path(path).suffix or "files without a suffix" for path in others}))
            log.warning(
                "%d images under '%s' are passed over, as %s are not read: '%s' is one; convert them, or move them away",
                *(len(others), folder / below, kinds, min(others)),
            )
        return cls(folder, sorted(files))

    @classmethod
    def of(cls, folder: Path, paths: Sequence[str], listed_in: Path) -> FileTree:
        """The files that a list names, in its order.

        Args:
            folder: what the paths are relative to.
            paths: the paths.
            listed_in: the list, for messages.

        Raises:
            VLMQError: files that are not there, one of them named, all counted.
        """
        files, missing = [], []
        for path in paths:
            try:
                status = os.stat(folder / path)
            except OSError:
                missing.append(path)
                continue
            files.append((path, status.st_size, status.st_mtime_ns))
        if missing:
            raise VLMQError(
                f"'{listed_in}' names {len(paths)} images, {len(missing)} of them are not under '{folder}', "
                f"the first is '{missing[0]}'; complete the data set"
            )
        return cls(folder, files)

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, row: int) -> str:
        """Path of one image below the folder."""
        return os.fsdecode(self._paths[row])

    def name(self, row: int) -> str:
        """The image's path."""
        return str(self.folder / self.path(row))

    def encoded(self, row: int) -> bytes:
        """The file's bytes."""
        return (self.folder / self.path(row)).read_bytes()

    def sizes(self) -> NDArray[np.float64]:
        """Bytes a file, ``[n]``."""
        return self._stats[:, 0].astype(np.float64)

    def entry(self, row: int) -> bytes:
        """Relative path, size, time of change."""
        size, time = self._stats[row]
        return b"%s\0%d\0%d" % (self._paths[row], size, time)


class ArrayRows(ImageSource):
    """Images in an array, uint8 ``[n, height, width, 3]``, which may be mapped from a file.

    Args:
        array: the images.
        path: the file they come from.
    """

    def __init__(self, array: NDArray[np.uint8], path: Path) -> None:
        self.array = array
        self.file = path
        self.side = min(array.shape[1:3])
        self._status = file_status(path)

    def __len__(self) -> int:
        return len(self.array)

    def open(self, row: int) -> Image.Image:
        """One image."""
        return Image.fromarray(np.asarray(self.array[row]))

    def name(self, row: int) -> str:
        """File and row."""
        return f"{self.file}, row {row}"

    def entry(self, row: int) -> bytes:
        """File with its size and time of change, row."""
        return f"{self._status}\0{row}".encode()

    def _shapes(self) -> NDArray[np.float64]:
        height, width = self.array.shape[1:3]
        return np.full(len(self), float(width * 2**20 + height))


def is_litter(name: str) -> bool:
    """Whether a file or folder is one that operating systems and tools leave behind, never data: hidden ones, ``__MACOSX``."""
    return name.startswith(".") or name.casefold() in _LITTER


_LITTER = {
    "__macosx", "__pycache__", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "thumbs.db",
    "ehthumbs.db", "desktop.ini",
}  # fmt: skip


_OTHER_IMAGES = {
    ".apng", ".arw", ".avif", ".cr2", ".cr3", ".dib", ".dng", ".eps", ".exr", ".gif", ".hdr", ".heic", ".heif", ".ico", ".j2k", ".jfif",
    ".jp2", ".jpe", ".jxl", ".nef", ".orf", ".pbm", ".pcx", ".pfm", ".pnm", ".psd", ".raf", ".raw", ".rw2", ".svg", ".tga", ".xcf",
}  # fmt: skip
_NO_IMAGES = {
    ".bz2", ".csv", ".gz", ".html", ".json", ".jsonl", ".log", ".md", ".npy", ".npz", ".parquet", ".pdf", ".pickle", ".pkl", ".pt", ".py",
    ".tar", ".tsv", ".txt", ".xml", ".yaml", ".yml", ".zip",
}  # fmt: skip


def _is_image(path: Path) -> bool:
    """Whether a file that is not read holds an image: by its suffix, or where that tells nothing, because Pillow recognises it."""
    suffix = path.suffix.lower()
    if suffix in _OTHER_IMAGES or suffix in _NO_IMAGES:
        return suffix in _OTHER_IMAGES
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path):
            return True
    except Exception:  # no image, or one too damaged to be told from none
        return False


def _walk(folder: Path, below: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, os.stat_result | None]]:
    """The files below a folder, images with their status; ``above`` are the folders on the way, to notice a link back to one."""
    try:
        own = os.stat(folder / below)
        here = (own.st_dev, own.st_ino)
        if here in above:
            raise VLMQError(f"folder '{folder / below}' is a link to a folder that it lies in; remove the link")
        with os.scandir(folder / below) as entries:
            for entry in entries:
                if is_litter(entry.name):
                    continue
                if entry.is_dir():
                    yield from _walk(folder, f"{below}{entry.name}/", (*above, here))
                else:
                    is_image = entry.name.lower().endswith(IMG_EXTENSIONS)
                    may_be_folder = entry.is_symlink() and not Path(entry.name).suffix
                    status = entry.stat() if is_image or may_be_folder else None  # a link to them may not lead nowhere
                    yield f"{below}{entry.name}", status if is_image else None
    except OSError as error:
        where = error.filename or folder / below
        raise VLMQError(
            f"'{where}' cannot be read ({error.strerror}); check its rights, or where its link leads"
        ) from error


def file_status(path: Path) -> str:
    """Name, size and time of change of a file that holds many images."""
    status = os.stat(path)
    return f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}"
