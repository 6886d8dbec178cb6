"""ImageNet-1k's validation images and the sets made for its classes: V2, A, R, Sketch, C, ObjectNet."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.io import loadmat

from lightning_vlmq.core.errors import VLMQError, first_line, unknown
from lightning_vlmq.data.corruptions import CORRUPTIONS
from lightning_vlmq.data.images.sources import FileTree
from lightning_vlmq.data.readers.base import Reader, Reading, class_folders, require_images, shorten, subfolders
from lightning_vlmq.data.readers.names import IMAGENET, OF_IMAGENET, TEMPLATES, imagenet_labels, imagenet_subset
from lightning_vlmq.data.sets import EvalSet
from lightning_vlmq.data.text import read_lines, read_text

BENCHMARK = tuple(
    name
    for family in ("noise", "blur", "weather", "digital")
    for name in CORRUPTIONS
    if CORRUPTIONS[name].family == family
)
"""The 15 corruptions of the benchmark; ImageNet-C holds 4 extra ones."""


@dataclass(frozen=True)
class ImageNet(Reader):
    """ImageNet-1k's validation images (Russakovsky et al. 2015).

    ``val/<wnid>/*.JPEG``, or all images in one folder and a list of their labels.

    Attributes:
        path: the folder of the class folders, or of the images.
        labels: for the flat layout, a file with one line per image in the order of the image names: a wnid, the number in
            ``ILSVRC2012_validation_ground_truth.txt`` (with ``meta.mat`` beside it, as the development kit has them), or image name
            and label in 0..999.
        name: the set's name.
        role: its role.
        expected: number of images, ``None`` takes what is there.
    """

    path: str = "imagenet/val"
    labels: str | None = None
    name: str = "imagenet"
    role: str = "id"
    expected: int | None = 50_000

    def read(self, reading: Reading) -> list[EvalSet]:
        """One set over all 1,000 classes."""
        folder = reading.folder(self.path)
        source: FileTree
        about: dict[str, Any] = dict(OF_IMAGENET)
        if self.labels is None:
            if not subfolders(folder):
                raise VLMQError(
                    f"'{folder}' has no class folders; for the flat layout set labels to the ground-truth list"
                )
            source, labels = class_folders(folder, imagenet_labels(), self.expected is not None)
            about["group"] = "imagenet"  # ImageNet-C's images are these, in this order
        else:
            source = FileTree.scan(folder)
            labels = _flat_labels(reading.file(self.labels), source)
        return [reading.eval_set(self.name, self.role, source, labels, self.expected, **about)]


@dataclass(frozen=True)
class ImageNetV2(Reader):
    """ImageNet-V2 (Recht et al. 2019): ``<label>/*.jpeg``, labels 0..999.

    Attributes:
        path: the folder of the class folders; the three samplings are three folders.
        name: the set's name.
        expected: number of images, ``None`` takes what is there.
    """

    path: str = "imagenetv2-matched-frequency-format-val"
    name: str = "imagenet_v2"
    expected: int | None = 10_000

    def read(self, reading: Reading) -> list[EvalSet]:
        """One set over all 1,000 classes."""
        numbers = {str(label): label for label in range(len(IMAGENET))}
        source, labels = class_folders(reading.folder(self.path), numbers, self.expected is not None)
        return [reading.eval_set(self.name, "shift", source, labels, self.expected, **OF_IMAGENET)]


@dataclass(frozen=True)
class _Subset(Reader):
    """A set of 200 of ImageNet's classes; a prediction is one of the classes that are present."""

    path: str
    name: str
    expected: int | None
    letter: ClassVar[str]
    """Which of the published lists of classes is the set's; see :func:`~.names.imagenet_subset`."""

    def read(self, reading: Reading) -> list[EvalSet]:
        """One set, restricted to the classes that are present."""
        wnids = {wnid: imagenet_labels()[wnid] for wnid in imagenet_subset(self.letter)}
        source, labels = class_folders(reading.folder(self.path), wnids, self.expected is not None)
        classes, targets = np.unique(labels, return_inverse=True)
        about: dict[str, Any] = {**OF_IMAGENET, "classes": tuple(classes.tolist())}
        return [reading.eval_set(self.name, "shift", source, targets, self.expected, **about)]


@dataclass(frozen=True)
class ImageNetA(_Subset):
    """ImageNet-A (Hendrycks et al. 2021, "Natural Adversarial Examples"): ``<wnid>/*.jpg``, 200 classes.

    Attributes:
        path: the folder of the class folders.
        name: the set's name.
        expected: number of images, ``None`` takes what is there.
    """

    path: str = "imagenet-a"
    name: str = "imagenet_a"
    expected: int | None = 7_500
    letter: ClassVar[str] = "a"


@dataclass(frozen=True)
class ImageNetR(_Subset):
    """ImageNet-R (Hendrycks et al. 2021, "The Many Faces of Robustness"): ``<wnid>/*.jpg``, 200 classes.

    Attributes:
        path: the folder of the class folders.
        name: the set's name.
        expected: number of images, ``None`` takes what is there.
    """

    path: str = "imagenet-r"
    name: str = "imagenet_r"
    expected: int | None = 30_000
    letter: ClassVar[str] = "r"


@dataclass(frozen=True)
class ImageNetSketch(Reader):
    """ImageNet-Sketch (Wang et al. 2019): ``<wnid>/*.JPEG``, 1,000 classes.

    Attributes:
        path: the folder of the class folders.
        name: the set's name.
        expected: number of images, ``None`` takes what is there.
    """

    path: str = "imagenet-sketch"
    name: str = "imagenet_sketch"
    expected: int | None = 50_889

    def read(self, reading: Reading) -> list[EvalSet]:
        """One set over all 1,000 classes."""
        source, labels = class_folders(reading.folder(self.path), imagenet_labels(), self.expected is not None)
        return [reading.eval_set(self.name, "shift", source, labels, self.expected, **OF_IMAGENET)]


@dataclass(frozen=True)
class ImageNetC(Reader):
    """ImageNet-C (Hendrycks & Dietterich 2019): ``<corruption>/<severity>/<wnid>/*.JPEG``.

    Attributes:
        path: the folder of the corruptions' folders.
        corruptions: which ones; the 15 of the benchmark by default.
        severities: 1..5.
        expected: number of images of each corruption and severity, ``None`` takes what is there.
    """

    path: str = "imagenet-c"
    corruptions: tuple[str, ...] = BENCHMARK
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    expected: int | None = 50_000

    def read(self, reading: Reading) -> list[EvalSet]:
        """One set per corruption and severity, named ``imagenet_c_<corruption>_<severity>``."""
        folder = reading.folder(self.path)
        check_corruptions(self.corruptions, self.severities)
        missing = [name for name in self.corruptions if not (folder / name).is_dir()]
        if missing:
            raise VLMQError(
                f"corruptions missing in '{folder}': {shorten(missing)}; complete the data set or leave them out of corruptions"
            )
        sets = []
        for corruption in self.corruptions:
            for severity in self.severities:
                below = f"{corruption}/{severity}"
                reading.folder(f"{self.path}/{below}")
                source, labels = class_folders(folder, imagenet_labels(), self.expected is not None, below)
                name = f"imagenet_c_{corruption}_{severity}"
                about: dict[str, Any] = {
                    "corruption": corruption,
                    "severity": severity,
                    "group": "imagenet",
                    **OF_IMAGENET,
                }
                sets.append(reading.eval_set(name, "corruption", source, labels, self.expected, **about))
        return sets


@dataclass(frozen=True)
class ObjectNet(Reader):
    """ObjectNet (Barbu et al. 2019), its 113 classes that ImageNet has too, under ObjectNet's own names.

    ``images/<folder>/*.png``, ``mappings/folder_to_objectnet_label.json``, ``mappings/objectnet_to_imagenet_1k.json``. The red frame
    of each image is cut off (2 pixels, as its authors ask).

    Attributes:
        path: the folder of ``images`` and ``mappings``.
        name: the set's name.
        expected: number of images of the classes shared with ImageNet, ``None`` takes what is there.
    """

    path: str = "objectnet-1.0"
    name: str = "objectnet"
    expected: int | None = 18_574

    def read(self, reading: Reading) -> list[EvalSet]:
        """One set over the 113 classes."""
        folder = reading.folder(f"{self.path}/images")
        names = _json(reading.file(f"{self.path}/mappings/folder_to_objectnet_label.json"))
        shared = _json(reading.file(f"{self.path}/mappings/objectnet_to_imagenet_1k.json"))
        folders = sorted(name for name, label in names.items() if label in shared)
        there = [name for name in folders if (folder / name).is_dir()]
        if not there or (self.expected is not None and len(there) < len(folders)):
            missing = [name for name in folders if name not in there]
            raise VLMQError(
                f"{len(missing)} of {len(folders)} class folders are missing in '{folder}' ({shorten(missing)}); complete the data set"
            )
        labels = dict.fromkeys(names, -1) | {name: label for label, name in enumerate(there)}
        source, found = class_folders(folder, labels, complete=False)
        require_images(folder, there, found)
        kept = np.flatnonzero(found >= 0)
        about: dict[str, Any] = {
            "class_names": tuple(names[name].lower() for name in there),
            "templates": TEMPLATES["photo"],
        }
        rows = torch.from_numpy(kept)
        return [reading.eval_set(self.name, "shift", source, found[kept], self.expected, border=2, rows=rows, **about)]


def check_corruptions(corruptions: Sequence[str], severities: Sequence[int]) -> None:
    """Raise :class:`VLMQError` for an unknown corruption or a severity outside 1..5."""
    for name in corruptions:
        if name not in CORRUPTIONS:
            raise unknown("corruption", name, CORRUPTIONS)
    if not set(severities) <= {1, 2, 3, 4, 5}:
        raise VLMQError(f"severities must lie in 1..5, got {list(severities)}")


def _flat_labels(listed: Path, source: FileTree) -> NDArray[np.int64]:
    """Labels of a flat folder's images, in any of the published forms; see :class:`ImageNet`."""
    lines = [line.split() for _, line in read_lines(listed)]
    if len(lines) != len(source):
        raise VLMQError(
            f"'{listed}' has {len(lines)} labels, '{source.folder}' {len(source)} images; complete the data set"
        )
    if not lines or any(len(line) != len(lines[0]) or len(line) > 2 for line in lines):
        raise VLMQError(f"'{listed}' is no list of labels, or of image names and labels, a line each; fetch it again")
    table: Mapping[str, int] = {str(label): label for label in range(len(IMAGENET))}
    if len(lines[0]) == 2:
        names = [Path(source.path(row)).name for row in range(len(source))]
        for what, own in (("names", [Path(name).name for name, _ in lines]), ("has", names)):
            if twice := next((name for name, n in Counter(own).items() if n > 1), None):
                where = listed if what == "names" else source.folder
                raise VLMQError(
                    f"'{where}' {what} an image '{twice}' more than once, so its label is not known; keep one"
                )
        by_name = {Path(name).name: label for name, label in lines}
        if stranger := next((name for name in names if name not in by_name), None):
            raise VLMQError(
                f"'{listed}' has no label for the image '{stranger}' of '{source.folder}'; complete the list"
            )
        words = [by_name[name] for name in names]
    else:
        words = [line[0] for line in lines]
        table = imagenet_labels() if words[0].startswith("n") else _development_kit(listed)
    bad = [number for number, word in enumerate(words, 1) if word not in table]
    if bad:
        raise VLMQError(
            f"label {bad[0]} of '{listed}' ('{words[bad[0] - 1]}') is no ImageNet class; fetch the list again"
        )
    return np.array([table[word] for word in words], dtype=np.int64)


def _development_kit(ground_truth: Path) -> Mapping[str, int]:
    """The numbers 1..1000 of the development kit, whose order is its own, as labels; ``meta.mat`` holds their wnids."""
    meta = ground_truth.with_name("meta.mat")
    if not meta.is_file():
        raise VLMQError(
            f"'{ground_truth}' counts classes as the development kit does; put the kit's meta.mat beside it"
        )
    try:
        synsets = np.atleast_1d(loadmat(meta, squeeze_me=True)["synsets"])
        wnids = {str(int(s["ILSVRC2012_ID"])): str(s["WNID"]) for s in synsets}
    except Exception as error:  # a damaged or foreign file makes scipy raise nearly anything
        raise VLMQError(
            f"'{meta}' is damaged or not the development kit's ({first_line(error)}); fetch it again"
        ) from error
    return {number: imagenet_labels()[wnid] for number, wnid in wnids.items() if wnid in imagenet_labels()}


def _json(path: Path) -> dict[str, str]:
    text = read_text(path)
    try:
        found = dict(json.loads(text))
        if not all(isinstance(value, str) for value in found.values()):
            raise TypeError("a value that is no text")
    except (ValueError, TypeError) as error:
        raise VLMQError(f"'{path}' is damaged; fetch it again") from error
    return found
