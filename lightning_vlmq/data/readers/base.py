"""What all readers of data sets share: where to look, how to decode, and how to say that something is missing."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.roles import ROLES
from lightning_vlmq.data.images.encoded import OnBadImage
from lightning_vlmq.data.images.files import FileImages
from lightning_vlmq.data.images.pixels import Preprocess
from lightning_vlmq.data.images.sources import FileTree, ImageSource, is_litter
from lightning_vlmq.data.sets import EvalSet
from lightning_vlmq.data.text import read_lines, whole_number


class Reader(ABC):
    """A data set in its published layout. A subclass is a frozen dataclass whose fields are the set's settings.

    Nearly all have the fields ``path`` (below the data module's ``root``, or absolute) and ``expected`` (number of images that the
    published set has; ``null`` takes what is there).
    """

    @abstractmethod
    def read(self, reading: Reading) -> list[EvalSet]:
        """List the images and labels; no image is decoded.

        Raises:
            VLMQError: something is missing, or is not as published.
        """


@dataclass(frozen=True)
class Reading:
    """How sets are read.

    Attributes:
        root: folder of all data sets; made absolute, so that a path below it is one wherever it is used.
        preprocess: from a decoded file to pixels.
        on_bad_image: see :class:`~lightning_vlmq.data.images.FileImages`.
        max_images: at most this many images per set, drawn with ``seed``; ``None`` takes all.
        seed: seed of that draw; sets of the same size get the same rows.
    """

    root: Path
    preprocess: Preprocess
    on_bad_image: OnBadImage = "error"
    max_images: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", self.root.expanduser().absolute())

    def folder(self, path: str) -> Path:
        """A folder below the root. Raises :class:`VLMQError` where there is none."""
        folder = self.root / path
        if not folder.is_dir():
            raise VLMQError(
                f"data folder '{folder}' does not exist; put the data set there or set data.root or the path"
            )
        return folder

    def file(self, path: str | Path) -> Path:
        """A file below the root. Raises :class:`VLMQError` where there is none."""
        file = self.root / path
        if not file.is_file():
            raise VLMQError(f"data file '{file}' does not exist; put the data set there or set data.root or the path")
        return file

    def images(self, source: ImageSource, border: int = 0, rows: Tensor | None = None, **columns: Any) -> FileImages:
        """The source's images, decoded as this says; ``border`` pixels are cut off first.

        Where all images have one size that is smaller (CIFAR), they stay as they are: the model enlarges them on its device.
        """
        rows = torch.arange(len(source)) if rows is None else rows
        wanted = replace(self.preprocess, border=border)
        if source.side is not None and source.side < wanted.size:
            wanted = replace(wanted, size=source.side, resize_to=None)
        return FileImages(source, wanted, rows, self.on_bad_image, **columns)

    def eval_set(
        self,
        name: str,
        role: str,
        source: ImageSource,
        labels: Sequence[int] | Tensor | NDArray[Any],
        expected: int | None = None,
        border: int = 0,
        rows: Tensor | None = None,
        **about: Any,
    ) -> EvalSet:
        """An evaluation set of the source's images.

        Args:
            name: the set's name.
            role: its role; OOD roles have no labels, whatever is given.
            source: the images.
            labels: one label per image.
            expected: number of images there have to be, or ``None``.
            border: pixels to cut off at each edge.
            rows: rows of the source that make the set, by default all; ``labels`` has one per row.
            about: further fields of :class:`~lightning_vlmq.data.sets.EvalSet`.

        Raises:
            VLMQError: another number of images than expected, or none.
        """
        rows = torch.arange(len(source)) if rows is None else rows
        if expected is not None and len(rows) != expected:
            raise VLMQError(
                f"data set '{name}' has {len(rows)} images, the published one has {expected}; "
                "complete it, or set expected: null to take what is there"
            )
        target = torch.tensor(np.asarray(labels, dtype=np.int64))
        if ROLES[role].is_ood:
            target = torch.full((len(rows),), -1)
        images = self.images(source, border, rows, target=target)
        if self.max_images is not None and len(images) > self.max_images:
            images = images.subset(drawn_rows(len(images), self.max_images, self.seed))
        return EvalSet(name, role, images, **about)


def class_folders(
    folder: Path, labels: Mapping[str, int], complete: bool, below: str = ""
) -> tuple[FileTree, NDArray[np.int64]]:
    """Images in one folder per class.

    Args:
        folder: the data set's folder.
        labels: label of each class folder.
        complete: whether every class has to have its folder.
        below: where the class folders lie, below ``folder``.

    Returns:
        The images in the order of their paths, and their labels.

    Raises:
        VLMQError: class folders that are missing (if all are needed) or unknown, named and counted.
    """
    place = folder / below
    there = subfolders(place)
    if strangers := sorted(there - labels.keys()):
        raise VLMQError(f"folder '{strangers[0]}' in '{place}' is none of the {len(labels)} classes; move it away")
    if complete and (missing := sorted(labels.keys() - there)):
        raise VLMQError(
            f"{len(missing)} of {len(labels)} class folders are missing in '{place}' ({shorten(missing)}); "
            "complete the data set, or set expected: null to take what is there"
        )
    tree = FileTree.scan(folder, below)
    depth = len(Path(below).parts)
    found = np.array([_label(tree.path(row), depth, labels, place) for row in range(len(tree))], dtype=np.int64)
    return tree, found


def _label(path: str, depth: int, labels: Mapping[str, int], place: Path) -> int:
    parts = path.split("/")
    if len(parts) < depth + 2:
        raise VLMQError(f"image '{parts[-1]}' in '{place}' lies outside the class folders; move it away")
    return labels[parts[depth]]


def subfolders(folder: Path) -> set[str]:
    """Names of the folders in a folder, but for hidden ones and what systems leave there."""
    names = {entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_litter(entry.name)}
    if odd := sorted(name for name in names if any("\ud800" <= c <= "\udfff" for c in name)):
        raise VLMQError(f"the name of folder {os.fsencode(odd[0])!r} in '{folder}' is not UTF-8; rename it")
    return names


def require_images(place: Path, folders: Sequence[str], labels: NDArray[np.int64]) -> None:
    """Check that each of the class folders in ``place`` has an image, where the folders make the classes.

    Args:
        place: where the class folders lie.
        folders: their names, in label order.
        labels: label of each image that was found.

    Raises:
        VLMQError: a folder without images, and what is in it.
    """
    used = set(labels.tolist())
    if empty := [name for label, name in enumerate(folders) if label not in used]:
        raise VLMQError(
            f"class folder '{place / empty[0]}' holds no readable image ({_what_is_in(place / empty[0])}); "
            f"add images ({', '.join(IMG_EXTENSIONS)}), or move it away: its class would be predicted all the same"
        )


def files_in(folder: Path, pattern: str) -> list[Path]:
    """Files of a folder by a pattern of their names, sorted, but for what systems leave there (``._00000.tar``)."""
    try:
        found = sorted(path for path in folder.glob(pattern) if not is_litter(path.name))
    except (ValueError, NotImplementedError) as error:
        raise VLMQError(f"'{pattern}' is no pattern of files below '{folder}'; write one like *.tar") from error
    if gone := [path for path in found if path.is_symlink() and not path.exists()]:
        raise VLMQError(f"'{gone[0]}' is a link that leads nowhere; repair or remove it")
    return [path for path in found if path.is_file()]


def _what_is_in(folder: Path) -> str:
    kinds = Counter(path.suffix or "no suffix" for path in folder.rglob("*") if path.is_file())
    return ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(3)) or "it is empty"


def drawn_rows(n_there: int, n: int | None, seed: int) -> Tensor:
    """``n`` of the rows 0 .. ``n_there`` - 1 (all there are, if fewer or ``None``), drawn with a seed, ascending, int64."""
    return torch.randperm(n_there, generator=torch.Generator().manual_seed(seed))[:n].sort().values


def shorten(names: Sequence[str], shown: int = 3) -> str:
    """The first few names."""
    return ", ".join(names[:shown]) + (", …" if len(names) > shown else "")


def read_list(path: Path, published: bool = False) -> tuple[list[str], list[int]]:
    """An image list: one line per image, its path and its label, which is the last word.

    Args:
        path: the list.
        published: whether the list is a published one, which is taken as it is where it names an image twice with one label.

    Raises:
        VLMQError: a line that is not so, by its number, an image that is named twice, or an empty list.
    """
    paths, labels = [], []
    seen: dict[str, tuple[int, int]] = {}  # by the place that a path means: ./a.png is a.png
    for number, line in read_lines(path):
        name, *last = line.rsplit(maxsplit=1)
        label = whole_number(last[0]) if last else None
        if label is None:
            raise VLMQError(
                f"line {number} of '{path}' is not 'path label' with a whole number (0, not 00 or 0.0) for a label: "
                f"'{line[:80]}'; repair the list"
            )
        first, other = seen.setdefault(os.path.normpath(name), (number, label))
        if first != number and not (published and other == label):
            said = "and would count twice" if other == label else f"where its label is {other}, not {label}"
            raise VLMQError(
                f"line {number} of '{path}' names '{name}' again, after line {first}, {said}; keep one of them"
            )
        paths.append(name)
        labels.append(label)
    if not paths:
        raise VLMQError(f"image list '{path}' is empty; fetch it again")
    return paths, labels
